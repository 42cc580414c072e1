// Online softmax over a chunk of tiles, and the merge of chunks.
#pragma once

#include <cmath>

#include "dot.h"

namespace sparseserve::cpu::SPARSESERVE_ISA {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr uint32_t kAllTokens = 0xffffffff;

template <class T>
struct TileView {
  const T* key;
  const T* value;
  int64_t page_size;
  int64_t dims;
  uint32_t mask;
};

template <class T>
SPARSESERVE_INLINE TileView<T> view(const Cache& cache, int64_t dims, const HeadGroup& group, const Tile& tile) {
  return {reinterpret_cast<const T*>(group.key) + tile.page * cache.key.page_stride + tile.column,
          reinterpret_cast<const T*>(group.value) + tile.page * cache.value.page_stride + tile.column * dims,
          cache.page_size, dims, tile.mask};
}

template <class T>
SPARSESERVE_INLINE Fetch fetch_of(const TileView<T>& tile) {
  return {reinterpret_cast<const char*>(tile.key), tile.page_size * static_cast<int64_t>(sizeof(T)),
          tile.mask == kAllTokens ? reinterpret_cast<const char*>(tile.value) : nullptr};
}

// Turns scores into weights 2^(scale * s - maximum); returns what earlier weights are to be multiplied with.
SPARSESERVE_INLINE float softmax_step(Float (&s)[kVectors], uint32_t mask, float scale, float& maximum_, float& sum) {
  Float top = splat(-INFINITY);
  for (int j = 0; j < kVectors; ++j) {
    s[j] = keep(s[j] * scale, mask >> (j * kLanes), splat(-INFINITY));
    top = maximum(top, s[j]);
  }
  const float tile_maximum = reduce_max(top);
  const float updated = tile_maximum > maximum_ ? tile_maximum : maximum_;
  Float total{};
  for (int j = 0; j < kVectors; ++j) {
    s[j] = keep(exp2(s[j] - updated), mask >> (j * kLanes), Float{});
    total += s[j];
  }
  const float rescale = exp2(splat(maximum_ - updated))[0];
  sum = sum * rescale + reduce_add(total);
  maximum_ = updated;
  return rescale;
}

template <class Dot, int N>
SPARSESERVE_INLINE void attend_block(const TileView<typename Dot::Scalar>& tile, const Tokens& tokens,
                                     const Fetch& fetch, float scale, const float* queries, float* maxima, float* sums,
                                     float* acc) {
  Float s[N][kVectors];
  Dot::template scores<N>(queries, tile.dims, tile.key, tile.page_size, fetch, s);
  alignas(64) float weights[N][kTileTokens];
  float rescale[N];
  for (int n = 0; n < N; ++n) {
    rescale[n] = softmax_step(s[n], tile.mask, scale, maxima[n], sums[n]);
    Dot::store_weights(weights[n], s[n], tokens, tile.mask);
  }
  Dot::template accumulate<N>(weights[0], rescale, tile.value, tokens, tile.dims, acc);
}

template <class T>
SPARSESERVE_INLINE Fetch next_fetch(const AttendParams& params, const HeadGroup& group, const Tile* tile, bool last,
                                    const Ahead& ahead) {
  if (!last) return fetch_of(view<T>(params.cache, params.query.head_dim, group, tile[1]));
  return {ahead.key, params.cache.page_size * static_cast<int64_t>(sizeof(T)),
          ahead.mask == kAllTokens ? ahead.value : nullptr};
}

template <class Dot>
SPARSESERVE_INLINE void attend_chunk_with(const AttendParams& params, const HeadGroup& group, const Tile* tiles,
                                          int64_t count, const Ahead& ahead, float* queries, float* partial) {
  using T = typename Dot::Scalar;
  const int64_t dims = params.query.head_dim, heads = group.heads;
  float *maxima = partial, *sums = partial + heads, *acc = partial + 2 * heads;
  for (int64_t g = 0; g < heads; ++g) maxima[g] = -INFINITY;
  std::memset(sums, 0, heads * (1 + dims) * sizeof(float));
  Dot::pack(group, dims, queries);
  const Tokens all(kAllTokens);
  for (int64_t i = 0; i < count; ++i) {
    const auto tile = view<T>(params.cache, dims, group, tiles[i]);
    const Fetch fetch = next_fetch<T>(params, group, tiles + i, i + 1 == count, ahead);
    const Tokens some = tile.mask == kAllTokens ? all : Tokens(tile.mask);
    for_each_block(heads, [&]<int N>(int64_t g) {
      attend_block<Dot, N>(tile, some, g == 0 ? fetch : Fetch{}, params.scale * kLog2E, queries + g * dims, maxima + g,
                           sums + g, acc + g * dims);
    });
  }
}

inline void attend_chunk(const AttendParams& params, const HeadGroup& group, const Tile* tiles, int64_t count,
                         const Ahead& ahead, float* queries, float* partial) {
  with_dot(params.cache.dtype, [&](auto dot) {
    attend_chunk_with<decltype(dot)>(params, group, tiles, count, ahead, queries, partial);
  });
}

template <class T>
void merge_head(const float* partials, int64_t chunks, int64_t stride, int64_t heads, int64_t dims, int64_t g, T* out,
                float* lse) {
  float top = -INFINITY, sum = 0;
  for (int64_t c = 0; c < chunks; ++c) top = partials[c * stride + g] > top ? partials[c * stride + g] : top;
  float acc[kMaxHeadDim] = {};
  for (int64_t c = 0; c < chunks; ++c) {
    const float* partial = partials + c * stride;
    const float weight = exp2f(partial[g] - top);
    const float* row = partial + 2 * heads + g * dims;
    sum += weight * partial[heads + g];
    for (int64_t d = 0; d < dims; ++d) acc[d] += weight * row[d];
  }
  const float inverse = chunks ? 1 / sum : 0;
  for (int64_t d = 0; d < dims; ++d) store_scalar(out + d, acc[d] * inverse);
  *lse = chunks ? top * kLn2 + logf(sum) : -INFINITY;
}

template <class T>
void merge_as(const AttendParams& params, const float* partials, int64_t chunks, int64_t stride, int64_t heads,
              char* out, float* lse) {
  for (int64_t g = 0; g < heads; ++g)
    merge_head(partials, chunks, stride, heads, params.query.head_dim, g,
               reinterpret_cast<T*>(out) + g * params.out_head_stride, lse + g);
}

inline void merge_chunks(const AttendParams& params, const float* partials, int64_t chunks, int64_t stride,
                         int64_t heads, char* out, float* lse) {
  switch (params.query.dtype) {
    case DType::kBFloat16:
      return merge_as<bf16>(params, partials, chunks, stride, heads, out, lse);
    case DType::kHalf:
      return merge_as<fp16>(params, partials, chunks, stride, heads, out, lse);
    case DType::kFloat:
      return merge_as<float>(params, partials, chunks, stride, heads, out, lse);
  }
}

}  // namespace sparseserve::cpu::SPARSESERVE_ISA
