// Summaries of units, from the keys of the cache. Sums run in sixteen fixed lanes and nothing is a fused multiply-add:
// the bits depend neither on the machine nor on how a unit was filled.
#pragma once

#include "../isa.h"
#include "simd.h"

namespace sparseserve::cpu::SPARSESERVE_ISA {

constexpr int kBlockVectors = 16 / kLanes;

// Sixteen lanes into one, the same tree on every instruction set.
template <class Fold>
SPARSESERVE_INLINE float fold_lanes(const Float (&x)[kBlockVectors], Fold fold) {
  float lanes[16];
  for (int v = 0; v < kBlockVectors; ++v) store(lanes + v * kLanes, x[v]);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = fold(lanes[i], lanes[i + half]);
  return lanes[0];
}

constexpr auto kLess = [](auto a, auto b) { return b < a ? b : a; };
constexpr auto kMore = [](auto a, auto b) { return a < b ? b : a; };
constexpr auto kPlus = [](auto a, auto b) { return a + b; };

// Folds map(x) over the keys of one dim, `tokens` a multiple of 16.
template <class T, class Map, class Fold>
SPARSESERVE_INLINE float fold_tokens(const T* key, int64_t tokens, Map map, Fold fold) {
  Float x[kBlockVectors];
  for (int v = 0; v < kBlockVectors; ++v) x[v] = map(load(key + v * kLanes));
  for (int64_t i = 16; i < tokens; i += 16)
    for (int v = 0; v < kBlockVectors; ++v) x[v] = fold(x[v], map(load(key + i + v * kLanes)));
  return fold_lanes(x, fold);
}

template <class T>
void summarize_unit_as(const SummarizeParams& params, int64_t last_slot) {
  const Written& from = params.written;
  const int64_t dims = from.head_dim, tokens = from.unit_tokens, begin = last_slot + 1 - tokens;
  const int64_t page = begin / from.page_size, column = begin % from.page_size;
  const auto itself = [](Float x) { return x; };
  for (int64_t head = 0; head < from.kv_heads; ++head) {
    const T* key =
        static_cast<const T*>(from.key.data) + page * from.key.page_stride + head * from.key.head_stride + column;
    T* out = static_cast<T*>(params.summary.data) + page * params.summary.page_stride +
             head * params.summary.head_stride + column / tokens * 2 * dims;
    for (int64_t d = 0; d < dims; ++d, key += from.page_size) {
      if (params.bound == Bound::kMinMax) {
        store_scalar(out + d, fold_tokens(key, tokens, itself, kLess));
        store_scalar(out + dims + d, fold_tokens(key, tokens, itself, kMore));
      } else {
        const float mean = fold_tokens(key, tokens, itself, kPlus) / static_cast<float>(tokens);
        const auto square = [mean](Float x) { return (x - mean) * (x - mean); };
        const float variance = fold_tokens(key, tokens, square, kPlus) / static_cast<float>(tokens);
        store_scalar(out + d, mean);
        store_scalar(out + dims + d, __builtin_sqrtf(variance));
      }
    }
  }
}

inline void summarize_unit(const SummarizeParams& params, int64_t last_slot) {
  switch (params.written.dtype) {
    case DType::kBFloat16:
      return summarize_unit_as<bf16>(params, last_slot);
    case DType::kHalf:
      return summarize_unit_as<fp16>(params, last_slot);
    case DType::kFloat:
      return summarize_unit_as<float>(params, last_slot);
  }
}

}  // namespace sparseserve::cpu::SPARSESERVE_ISA
