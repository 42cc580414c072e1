// The instructions that kernels use beyond CUDA C++, with the meaning that PTX gives them.
#pragma once

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

// A reference to a variable of shared memory: SPARSESERVE_SHARED(float, sums, [kWarps][kHeads]).
#define SPARSESERVE_SHARED(type, name, ...) auto& name = ::sparseserve::sim::shared_variable<type __VA_ARGS__>([] {})

// A pointer to the shared memory that the launch asked for.
#define SPARSESERVE_DYNAMIC_SHARED(name) \
  auto* const name = static_cast<unsigned char*>(::sparseserve::sim::dynamic_shared_memory())

namespace sparseserve::sim {

// A load as wide as T, which must be aligned to its width.
template <class T>
T load(const char* operation, const void* address, const Location& where) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail(where, "%s: %p is not aligned", operation, address);
  return *static_cast<const T*>(address);
}

template <class T>
float element(uint32_t pair, int i) {
  const auto bits = static_cast<unsigned short>(pair >> 16 * i);
  if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(bits));
  return __bfloat162float(__ushort_as_bfloat16(bits));
}

// What a lane holds of D = A B + C; each register of A and B holds two neighbours.
struct Fragments {
  float (&c)[4];
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];
  bool done;
};

template <class T>
void multiply(Lanes<Fragments> lanes) {
  using Four [[gnu::vector_size(16), gnu::may_alias]] = float;
  if (!lanes.all()) return;
  float a[16][16];
  alignas(Four) float b[16][8], c[16][8];
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const Fragments& held = *lanes[lane];
    const unsigned group = lane / 4, pair = lane % 4 * 2;
    for (unsigned r = 0; r < 4; ++r)
      for (unsigned i = 0; i < 2; ++i) a[group + r % 2 * 8][pair + r / 2 * 8 + i] = element<T>(held.a[r], i);
    for (unsigned r = 0; r < 2; ++r)
      for (unsigned i = 0; i < 2; ++i) b[pair + r * 8 + i][group] = element<T>(held.b[r], i);
    for (unsigned i = 0; i < 4; ++i) c[group + i / 2 * 8][pair + i % 2] = held.c[i];
  }
  for (int row = 0; row < 16; ++row) {
    auto* sums = reinterpret_cast<Four*>(c[row]);
    Four low = sums[0], high = sums[1];
    for (int k = 0; k < 16; ++k) {
      const auto* factors = reinterpret_cast<const Four*>(b[k]);
      low += a[row][k] * factors[0];
      high += a[row][k] * factors[1];
    }
    sums[0] = low;
    sums[1] = high;
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const unsigned group = lane / 4, pair = lane % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) lanes[lane]->c[i] = c[group + i / 2 * 8][pair + i % 2];
    lanes[lane]->done = true;
  }
}

}  // namespace sparseserve::sim

namespace sparseserve::cuda {

// Memory that is read once and that nobody writes.
inline uint4 load_stream16(const void* address, sim::Location where = sim::Location::current()) {
  return sim::load<uint4>("load_stream16", address, where);
}

inline uint2 load_stream8(const void* address, sim::Location where = sim::Location::current()) {
  return sim::load<uint2>("load_stream8", address, where);
}

// 2^x, a subnormal result as 0.
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < FLT_MIN ? 0.f : y;
}

// The transpose of an 8x8 matrix of 16 bits; lane 4 i + j holds elements 2 j and 2 j + 1 of row i.
inline uint32_t transpose8x8(uint32_t a, sim::Location where = sim::Location::current()) {
  struct Operand {
    uint32_t pair, result;
    bool done;
  } operand{a, 0, false};
  const auto complete = [](sim::Lanes<Operand> lanes) {
    if (!lanes.all()) return;
    const auto at = [&](unsigned row, unsigned column) {
      return lanes[row * 4 + column / 2]->pair >> column % 2 * 16 & 0xffff;
    };
    for (unsigned lane = 0; lane < sim::kWarpSize; ++lane) {
      const unsigned row = lane / 4, column = lane % 4 * 2;
      lanes[lane]->result = at(column, row) | at(column + 1, row) << 16;
      lanes[lane]->done = true;
    }
  };
  sim::together("transpose8x8", sim::kAllLanes, operand, complete, where);
  if (!operand.done) sim::fail(where, "transpose8x8: lanes of the warp have exited");
  return operand.result;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// c += a b with A 16x16 by rows, B 16x8 by columns.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         sim::Location where = sim::Location::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  sim::Fragments fragments{c, a, b, false};
  const auto complete = [](sim::Lanes<sim::Fragments> lanes) { sim::multiply<T>(lanes); };
  sim::together("mma", sim::kAllLanes, fragments, complete, where);
  if (!fragments.done) sim::fail(where, "mma: lanes of the warp have exited");
}

// Zeros unless inside; `global` is not read then.
inline void copy_async16(void* shared, const void* global, bool inside,
                         sim::Location where = sim::Location::current()) {
  sim::start_copy(shared, inside ? global : nullptr, where);
}

// Ends a group of copies.
inline void commit_copies() { sim::commit_copies(); }

// Waits for all groups but the last N.
template <int N>
void wait_copies() {
  sim::finish_copies(N);
}

}  // namespace sparseserve::cuda
