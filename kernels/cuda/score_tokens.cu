// Attention mass of every unit: a warp takes 64 tokens, every lane two of each 16 and two query heads. The block that
// finishes a row and head last selects, if a selection is wanted.
#include <algorithm>

#include "launch.h"
#include "select.h"

namespace sparseserve::cuda {

namespace {

constexpr int kTiles = 4, kWarpTokens = kTiles * kTileTokens, kBlockTokens = kWarps * kWarpTokens;

// The mass of the 64 tokens from `begin` on, by one warp.
template <class T, int D, int NT>
__device__ __forceinline__ void score_tiles(const ScoreTokensParams& p, int begin, int length) {
  if (begin >= length) return;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = blockIdx.z, head = blockIdx.y;
  const int kv_heads = static_cast<int>(p.cache.heads), selection_heads = gridDim.y;
  const int parts = selection_heads == 1 ? kv_heads : 1;  // KV heads that share a selection
  const int group = static_cast<int>(p.query.heads) / (selection_heads * parts);
  const int page_size = static_cast<int>(p.cache.page_size);
  const int32_t* pages = p.cache.table.pages + row * p.cache.table.stride;
  const int64_t stride = p.cache.key.token_stride;

  float mass[kTiles][2] = {};
  for (int part = 0; part < parts; ++part) {
    const int first = (head * parts + part) * group, kv_head = first / (static_cast<int>(p.query.heads) / kv_heads);
    const T* key = static_cast<const T*>(p.cache.key.data) + kv_head * p.cache.key.head_stride;
    Queries<T, D, NT> queries;
    queries.load(p.query, row, first, group, lane);
    float lse[NT][2];
    for (int n = 0; n < NT; ++n)
      for (int j = 0; j < 2; ++j) {
        const int query_head = 8 * n + 2 * t + j;
        lse[n][j] = query_head < group ? p.lse[row * p.query.heads + first + query_head] * kLog2E : INFINITY;
      }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int token = begin + i * kTileTokens;
      if (token >= length) break;
      const int page = token / page_size;
      const T* tile = key + pages[page] * p.cache.key.page_stride + (token - page * page_size) * stride;
      Keys<T, D> keys;
      keys.load(tile + g * stride, tile + (g + 8) * stride, t);
      float s[NT][4] = {};
      dot(keys, queries, s);
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) mass[i][j / 2] += exp2_fast(s[n][j] * (p.scale * kLog2E) - lse[n][j % 2]);
    }
  }

  float* scores = p.scores.of(row, head);
  const int unit = static_cast<int>(p.unit_tokens);
  float tile_mass[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    tile_mass[i] = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = begin + i * kTileTokens + g + 8 * r;
      const float x = sum_of_heads(mass[i][r]);
      if (unit == 1 && t == 0 && token < length) scores[token] = x;
      tile_mass[i] += token < length ? x : 0.f;
    }
    tile_mass[i] = sum_of_rows(tile_mass[i]);
  }
  if (unit == 1 || lane != 0) return;
  const int tiles = unit / kTileTokens;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int token = begin + i * kTileTokens;
    if (i % tiles != 0 || token >= length) continue;
    float x = 0.f;
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
      if (k >= i && k < i + tiles) x += tile_mass[k];
    scores[token / unit] = x;
  }
}

template <class T, int D, int NT>
__global__ void __launch_bounds__(kThreads, D * NT <= 128 ? 4 : 2)
    score_tokens_kernel(const __grid_constant__ ScoreTokensParams p) {
  SPARSESERVE_DYNAMIC_SHARED(shared);
  const int row = blockIdx.z, head = blockIdx.y, length = p.cache.table.seq_lens[row];
  const int blocks = max(1, (length + kBlockTokens - 1) / kBlockTokens);
  if (static_cast<int>(blockIdx.x) >= blocks) return;
  score_tiles<T, D, NT>(p, (blockIdx.x * kWarps + threadIdx.x / 32) * kWarpTokens, length);
  if (!p.wanted.any()) return;
  Counters* counters = counters_of(p.scratch, p.query, row, head * static_cast<int>(p.query.heads / p.heads));
  select_last(p.scores, p.wanted, counters, blocks, row, head, *reinterpret_cast<BestShared<kThreads>*>(shared));
}

}  // namespace

void score_tokens(const ScoreTokensParams& params) {
  const int64_t group = params.query.heads / std::max(params.cache.heads, params.heads);
  const int64_t tokens = params.cache.table.width * params.cache.page_size;
  const dim3 grid((tokens + kBlockTokens - 1) / kBlockTokens, params.heads, params.query.rows);
  for_type(params.query.dtype, params.query.head_dim, [&]<class T, int D>() {
    if (group <= 8)
      launch(score_tokens_kernel<T, D, 1>, grid, kThreads, sizeof(BestShared<kThreads>), params);
    else
      launch(score_tokens_kernel<T, D, 2>, grid, kThreads, sizeof(BestShared<kThreads>), params);
  });
}

}  // namespace sparseserve::cuda
