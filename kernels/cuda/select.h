// The selection of one row and head from its scores, by a whole block.
#pragma once

#include "best.h"
#include "blocks.h"

namespace sparseserve::cuda {

template <int Threads>
__device__ void select_row(const Scores& of, const Wanted& wanted, int row, int head, BestShared<Threads>& shared) {
  const Selection& selection = wanted.selection;
  const int64_t at = row * selection.heads + head;
  const int unit = static_cast<int>(selection.unit_tokens), length = wanted.seq_lens[row];
  int32_t *spans = selection.spans + 2 * at, *units = selection.units + at * selection.slots;
  if (wanted.takes_all(row, head)) {
    if (threadIdx.x == 0) spans[0] = spans[1] = length, selection.count[at] = 0;
    return;
  }
  const int sink = wanted.sink[head], recent = wanted.recent[head];
  const int first = sink / unit, middle = (length - recent + unit - 1) / unit - first;
  const float* scores = of.of(row, head) + first;
  const auto write = [&](int to, int i) { units[to] = first + i; };
  int count;
  if (wanted.by_threshold) {
    const auto kind = [&](int i) { return scores[i] > wanted.threshold ? 2 : 0; };
    count = write_taken<Threads>(middle, 0, kind, write, shared);
  } else {
    count = min(min(middle, wanted.unit_budget(row, head) / unit), static_cast<int>(selection.slots));
    if (count > 0) write_best<Threads>(middle, count, [&](int i) { return key_of(scores[i]); }, write, shared);
  }
  if (threadIdx.x == 0) {
    spans[0] = min(sink, length);
    spans[1] = max(length - recent, spans[0]);
    selection.count[at] = max(count, 0);
  }
}

// The same by the block that is the last of `blocks` to have left its scores.
template <int Threads>
__device__ void select_last(const Scores& scores, const Wanted& wanted, Counters* counters, int blocks, int row,
                            int head, BestShared<Threads>& shared) {
  if (is_last(&counters->done, blocks, &shared.rank)) select_row(scores, wanted, row, head, shared);
}

}  // namespace sparseserve::cuda
