// Scores of tokens by their attention mass, and of units by the bound that their summary gives.
#pragma once

#include "attend.h"

namespace sparseserve::cpu::SPARSESERVE_ISA {

template <class Dot, int N>
SPARSESERVE_INLINE void mass_block(const TileView<typename Dot::Scalar>& tile, const Fetch& fetch, float scale,
                                   const float* queries, const float* lse, float* mass, int64_t mass_stride) {
  Float s[N][kVectors];
  Dot::template scores<N>(queries, tile.dims, tile.key, tile.page_size, fetch, s);
  for (int n = 0; n < N; ++n)
    for (int j = 0; j < kVectors; ++j) {
      const Float p = keep(exp2(s[n][j] * scale - lse[n] * kLog2E), tile.mask >> (j * kLanes), Float{});
      float* to = mass + n * mass_stride + j * kLanes;
      store(to, load(to) + p);
    }
}

template <class Dot>
SPARSESERVE_INLINE void token_mass_with(const ScoreTokensParams& params, const HeadGroup& group, const float* lse,
                                        const Tile* tiles, int64_t count, const Ahead& ahead, bool per_head,
                                        float* queries, float* mass) {
  using T = typename Dot::Scalar;
  const int64_t dims = params.query.head_dim, mass_stride = per_head ? count * kTileTokens : 0;
  const int64_t key_bytes = params.cache.page_size * static_cast<int64_t>(sizeof(T));
  Dot::pack(group, dims, queries);
  for (int64_t i = 0; i < count; ++i) {
    const auto tile = view<T>(params.cache, dims, group, tiles[i]);
    const char* next =
        i + 1 < count ? reinterpret_cast<const char*>(view<T>(params.cache, dims, group, tiles[i + 1]).key) : ahead.key;
    for_each_block(group.heads, [&]<int N>(int64_t g) {
      mass_block<Dot, N>(tile, g == 0 ? Fetch{next, key_bytes, nullptr} : Fetch{}, params.scale * kLog2E,
                         queries + g * dims, lse + g, mass + g * mass_stride + i * kTileTokens, mass_stride);
    });
  }
}

inline void token_mass(const ScoreTokensParams& params, const HeadGroup& group, const float* lse, const Tile* tiles,
                       int64_t count, const Ahead& ahead, bool per_head, float* queries, float* mass) {
  with_dot(params.cache.dtype, [&](auto dot) {
    token_mass_with<decltype(dot)>(params, group, lse, tiles, count, ahead, per_head, queries, mass);
  });
}

template <class T>
void load_rows(const Query& query, const char* first, int64_t heads, float* queries) {
  for (int64_t g = 0; g < heads; ++g)
    for (int64_t d = 0; d < query.head_dim; d += kLanes)
      store(queries + g * query.head_dim + d, load(reinterpret_cast<const T*>(first) + g * query.head_stride + d));
}

inline void load_queries(const Query& query, int64_t row, int64_t head, int64_t heads, float* queries) {
  const char* first = static_cast<const char*>(query.data) +
                      (row * query.row_stride + head * query.head_stride) * size_of(query.dtype);
  switch (query.dtype) {
    case DType::kBFloat16:
      return load_rows<bf16>(query, first, heads, queries);
    case DType::kHalf:
      return load_rows<fp16>(query, first, heads, queries);
    case DType::kFloat:
      return load_rows<float>(query, first, heads, queries);
  }
}

// The highest score among N query heads. Quest (arXiv 2406.10774): sum_d max(q_d min_d, q_d max_d) = q.center +
// |q|.half; mean and standard deviation (arXiv 2605.27740) are a centre and a half width themselves.
template <int N, class T>
SPARSESERVE_INLINE float best_score(const T* first, const T* second, bool min_max, const float* queries, int64_t dims) {
  Float total[N];
  for (Float& x : total) x = Float{};
  for (int64_t d = 0; d < dims; d += kLanes) {
    const Float a = load(first + d), b = load(second + d);
    const Float center = min_max ? (a + b) * 0.5f : a, half = min_max ? (b - a) * 0.5f : b;
    for (int n = 0; n < N; ++n) {
      const Float q = load(queries + n * dims + d);
      total[n] = fma(absolute(q), half, fma(q, center, total[n]));
    }
  }
  float best = -INFINITY;
  for (int n = 0; n < N; ++n) {
    const float score = reduce_add(total[n]);
    best = score > best ? score : best;
  }
  return best;
}

template <class T>
void score_units_as(const ScorePagesParams& params, const float* queries, int64_t group, const char* summary,
                    int64_t units, const char* ahead, float* scores) {
  const int64_t dims = params.query.head_dim, bytes = 2 * dims * static_cast<int64_t>(sizeof(T));
  const bool min_max = params.bound == Bound::kMinMax;
  for (int64_t u = 0; u < units; ++u) {
    const T *first = reinterpret_cast<const T*>(summary + u * bytes), *second = first + dims;
    if (ahead)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + u * bytes + i, 0, 3);
    float best = -INFINITY;
    for_each_block(group, [&]<int N>(int64_t g) {
      const float score = min_max ? best_score<N>(first, second, true, queries + g * dims, dims)
                                  : best_score<N>(first, second, false, queries + g * dims, dims);
      best = score > best ? score : best;
    });
    scores[u] = best;
  }
}

inline void score_units(const ScorePagesParams& params, const float* queries, int64_t group, const char* summary,
                        int64_t units, const char* ahead, float* scores) {
  switch (params.query.dtype) {
    case DType::kBFloat16:
      return score_units_as<bf16>(params, queries, group, summary, units, ahead, scores);
    case DType::kHalf:
      return score_units_as<fp16>(params, queries, group, summary, units, ahead, scores);
    case DType::kFloat:
      return score_units_as<float>(params, queries, group, summary, units, ahead, scores);
  }
}

}  // namespace sparseserve::cpu::SPARSESERVE_ISA
