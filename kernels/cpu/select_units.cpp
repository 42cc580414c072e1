// The best units of every row and selection head within its budget.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "kernels.h"
#include "parallel.h"

namespace sparseserve::cpu {

namespace {

// Orders by score, then the lower unit first; all keys differ, so any selection algorithm gives the same set.
uint64_t key_of(float score, uint32_t unit) {
  if (std::isnan(score)) score = -INFINITY;
  score += 0.f;  // -0 ties with +0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits & 0x80000000 ? ~bits : bits | 0x80000000;
  return uint64_t{bits} << 32 | (UINT32_MAX - unit);
}

// Writes the `count` best of units [first, last), ascending.
void take_best(const float* scores, int64_t first, int64_t last, int64_t count, int32_t* units) {
  thread_local Scratch<uint64_t> scratch;
  const int64_t candidates = last - first;
  uint64_t* keys = scratch.get(candidates);
  for (int64_t u = first; u < last; ++u) keys[u - first] = key_of(scores[u], static_cast<uint32_t>(u));
  std::nth_element(keys, keys + count - 1, keys + candidates, std::greater<>());
  for (int64_t i = 0; i < count; ++i) units[i] = static_cast<int32_t>(UINT32_MAX - static_cast<uint32_t>(keys[i]));
  std::sort(units, units + count);
}

void select(const SelectParams& params, int64_t row, int64_t head) {
  const Selection& selection = params.selection;
  const int64_t at = row * selection.heads + head, unit = selection.unit_tokens;
  const int64_t length = params.seq_lens[row], sink = params.sink[head], recent = params.recent[head];
  int32_t* spans = selection.spans + 2 * at;
  selection.count[at] = 0;
  if (length <= params.budget[head]) {
    spans[0] = spans[1] = static_cast<int32_t>(length);
    return;
  }
  spans[0] = static_cast<int32_t>(sink);
  spans[1] = static_cast<int32_t>(length - recent);
  const int64_t first = sink / unit, last = (length - recent + unit - 1) / unit;
  const int64_t count =
      std::min({last - first, (params.budget[head] - sink - recent) / unit, selection.slots});
  if (count <= 0) return;
  selection.count[at] = static_cast<int32_t>(count);
  take_best(params.scores + row * params.scores_row_stride + head * params.scores_head_stride, first, last, count,
            selection.units + at * selection.slots);
}

}  // namespace

void select_units(const SelectParams& params) {
  const int64_t heads = params.selection.heads;
  for_each_item(params.rows * heads, [&](int64_t i, int64_t) { select(params, i / heads, i % heads); });
}

}  // namespace sparseserve::cpu
