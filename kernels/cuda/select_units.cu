// The best units of every row and selection head within its budget.
#include <algorithm>

#include "best.h"
#include "launch.h"

namespace sparseserve::cuda {

namespace {

__global__ void __launch_bounds__(kBestThreads, 3) select_kernel(const __grid_constant__ SelectParams p) {
  SPARSESERVE_DYNAMIC_SHARED(raw);
  BestShared& shared = *reinterpret_cast<BestShared*>(raw);
  const int head = blockIdx.x, row = blockIdx.y, unit = static_cast<int>(p.selection.unit_tokens);
  const int64_t at = row * p.selection.heads + head;
  const int length = p.seq_lens[row], sink = p.sink[head], recent = p.recent[head], budget = p.budget[head];
  int32_t *spans = p.selection.spans + 2 * at, *units = p.selection.units + at * p.selection.slots;
  if (!p.by_threshold && length <= budget) {
    if (threadIdx.x == 0) spans[0] = spans[1] = length, p.selection.count[at] = 0;
    return;
  }
  const int first = sink / unit, middle = (length - recent + unit - 1) / unit - first;
  const float* scores = p.scores + row * p.scores_row_stride + head * p.scores_head_stride + first;
  const auto write = [&](int to, int i) { units[to] = first + i; };
  int count;
  if (p.by_threshold) {
    count = write_taken(middle, 0, [&](int i) { return scores[i] > p.threshold ? 2 : 0; }, write, shared);
  } else {
    count = min(min(middle, (budget - sink - recent) / unit), static_cast<int>(p.selection.slots));
    if (count > 0) write_best(middle, count, [&](int i) { return key_of(scores[i]); }, write, shared);
  }
  if (threadIdx.x == 0) {
    spans[0] = min(sink, length);
    spans[1] = max(length - recent, spans[0]);
    p.selection.count[at] = max(count, 0);
  }
}

}  // namespace

void select_units(const SelectParams& params) {
  launch(select_kernel, dim3(params.selection.heads, params.rows), kBestThreads, sizeof(BestShared), params);
}

}  // namespace sparseserve::cuda
