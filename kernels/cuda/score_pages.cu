// Scores of units by their summaries: a warp takes 16 units. q.center + |q|.half is a dot product of the summary's two
// rows with weights made of the query: min(q, 0) and max(q, 0) for minimum and maximum, q and |q| for mean and
// deviation. The block that finishes a row and head last selects, if a selection is wanted.
#include <algorithm>

#include "blocks.h"
#include "launch.h"
#include "select.h"

namespace sparseserve::cuda {

namespace {

// Both numbers of x where their sign is set, or where it is not.
__device__ __forceinline__ uint32_t negatives(uint32_t x) { return x & ((x >> 15 & 0x00010001) * 0xffff); }
__device__ __forceinline__ uint32_t positives(uint32_t x) { return x & ~((x >> 15 & 0x00010001) * 0xffff); }
__device__ __forceinline__ uint32_t magnitudes(uint32_t x) { return x & 0x7fff7fff; }

template <class F>
__device__ __forceinline__ uint4 each(uint4 x, F f) {
  return make_uint4(f(x.x), f(x.y), f(x.z), f(x.w));
}

constexpr int kBlockUnits = kWarps * kTileTokens;

// The 16 units from `begin` on, by one warp; the row's last one is `last`.
template <class T, int D, int NT>
__device__ __forceinline__ void score_tile(const ScorePagesParams& p, int begin, int last) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = blockIdx.z, head = blockIdx.y;
  if (begin > last) return;
  float* scores = p.scores.of(row, head);
  if (last < begin + kTileTokens && lane == 0) scores[last] = INFINITY;
  if (begin == last) return;

  const int group = static_cast<int>(p.query.heads / p.kv_heads), units = static_cast<int>(p.summary.units);
  const T* rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int unit = min(begin + g + 8 * r, last - 1), page = p.table.pages[row * p.table.stride + unit / units];
    rows[r] = static_cast<const T*>(p.summary.data) + page * p.summary.page_stride + head * p.summary.head_stride +
              unit % units * 2 * D;
  }
  const bool min_max = p.bound == Bound::kMinMax;
  float s[NT][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Keys<T, D> keys;
    keys.load(rows[0] + half * D, rows[1] + half * D, t);
    Queries<T, D, NT> weights;
    weights.load(p.query, row, head * group, group, lane);
#pragma unroll
    for (auto& parts : weights.part)
#pragma unroll
      for (uint4& q : parts)
        q = min_max ? (half == 0 ? each(q, negatives) : each(q, positives)) : half == 0 ? q : each(q, magnitudes);
    dot(keys, weights, s);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float best = -INFINITY;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (8 * n + 2 * t + j < group) best = fmaxf(best, s[n][2 * r + j]);
    best = max_of_heads(best);
    const int unit = begin + g + 8 * r;
    if (t == 0 && unit < last) scores[unit] = best;
  }
}

template <class T, int D, int NT>
__global__ void __launch_bounds__(kThreads, D * NT <= 128 ? 4 : 2)
    score_pages_kernel(const __grid_constant__ ScorePagesParams p) {
  SPARSESERVE_DYNAMIC_SHARED(shared);
  const int row = blockIdx.z, head = blockIdx.y, unit = static_cast<int>(p.unit_tokens);
  const int units = (p.table.seq_lens[row] + unit - 1) / unit, blocks = max(1, (units + kBlockUnits - 1) / kBlockUnits);
  if (static_cast<int>(blockIdx.x) >= blocks) return;
  score_tile<T, D, NT>(p, (blockIdx.x * kWarps + threadIdx.x / 32) * kTileTokens, units - 1);
  if (!p.wanted.any()) return;
  Counters* counters = counters_of(p.scratch, p.query, row, head * static_cast<int>(p.query.heads / p.kv_heads));
  select_last(p.scores, p.wanted, counters, blocks, row, head, *reinterpret_cast<BestShared<kThreads>*>(shared));
}

}  // namespace

void score_pages(const ScorePagesParams& params) {
  const int64_t units = params.table.width * params.summary.units;
  const dim3 grid((units + kBlockUnits - 1) / kBlockUnits, params.kv_heads, params.query.rows);
  for_type(params.query.dtype, params.query.head_dim, [&]<class T, int D>() {
    if (params.query.heads / params.kv_heads <= 8)
      launch(score_pages_kernel<T, D, 1>, grid, kThreads, sizeof(BestShared<kThreads>), params);
    else
      launch(score_pages_kernel<T, D, 2>, grid, kThreads, sizeof(BestShared<kThreads>), params);
  });
}

}  // namespace sparseserve::cuda
