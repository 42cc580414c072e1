// The instructions of ptx.h. Lanes print what they hold; the test knows which element of which matrix it is.
#include <ptx.h>

#include "support.h"

namespace {

using namespace sparseserve::cuda;

template <class T>
uint32_t pair(float x, float y) {
  const auto bits = [](float value) -> uint32_t {
    if constexpr (std::is_same_v<T, __half>) return __half_as_ushort(value);
    return __bfloat16_as_ushort(value);
  };
  return bits(x) | bits(y) << 16;
}

// Each lane: 8 elements of A, 4 of B, 4 of C, all small integers over 8; then 4 of the result.
template <class T>
__global__ void multiply(float* held) {
  float* mine = held + threadIdx.x * 20;
  for (int i = 0; i < 16; ++i) mine[i] = static_cast<float>((threadIdx.x * 16 + i) * 2654435761u >> 27) / 8 - 2;
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = pair<T>(mine[2 * i], mine[2 * i + 1]);
  for (int i = 0; i < 2; ++i) b[i] = pair<T>(mine[8 + 2 * i], mine[9 + 2 * i]);
  for (int i = 0; i < 4; ++i) c[i] = mine[12 + i];
  mma<T>(c, a, b);
  for (int i = 0; i < 4; ++i) mine[16 + i] = c[i];
}

__global__ void transpose(uint32_t* pairs) {
  const uint32_t first = threadIdx.x * 2;
  const uint32_t result = transpose8x8(first | (first + 1) << 16);
  pairs[2 * threadIdx.x] = result & 0xffff;
  pairs[2 * threadIdx.x + 1] = result >> 16;
}

// Three groups of copies, of which the last is left under way; the second source lies outside.
__global__ void copies(const float* in, float* out) {
  SPARSESERVE_DYNAMIC_SHARED(bytes);
  auto* shared = reinterpret_cast<float*>(bytes);
  for (int group = 0; group < 3; ++group) {
    copy_async16(shared + 4 * group, in + 4 * group, group != 1);
    commit_copies();
  }
  wait_copies<1>();
  for (int i = 0; i < 12; ++i) out[i] = shared[i];
  wait_copies<0>();
  for (int i = 8; i < 12; ++i) out[4 + i] = shared[i];
}

__global__ void loads(const float* in, float* out) {
  const uint4 four = load_stream16(in + 4);
  const uint2 two = load_stream8(in + 10);
  const unsigned bits[] = {four.x, four.y, four.z, four.w, two.x, two.y};
  for (int i = 0; i < 6; ++i) out[i] = __uint_as_float(bits[i]);
}

}  // namespace

int main() {
  std::vector<float> held(32 * 20);
  launch(multiply<__nv_bfloat16>, 1, 32, 0, held.data());
  print("mma_bf16", held);
  launch(multiply<__half>, 1, 32, 0, held.data());
  print("mma_fp16", held);

  std::vector<uint32_t> pairs(64);
  launch(transpose, 1, 32, 0, pairs.data());
  print("transpose", pairs);

  alignas(16) const float in[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  std::vector<float> out(16);
  launch(copies, 1, 1, 48, in, out.data());
  print("copies", out);
  std::vector<float> loaded(6);
  launch(loads, 1, 1, 0, in, loaded.data());
  print("loads", loaded);

  const float exponents[] = {0, -3.5f, -126, -127, -INFINITY};
  std::vector<float> powers;
  for (const float x : exponents) powers.push_back(exp2_fast(x));
  print("exp2", powers);
  const uint32_t selectors[] = {0x5410, 0x7632, 0x0123};
  std::vector<uint32_t> permuted;
  for (const uint32_t selector : selectors) permuted.push_back(permute_bytes(0x83828180, 0x07868504, selector));
  print("permute", permuted);
}
