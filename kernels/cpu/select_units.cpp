// The best units of every row and selection head within its budget.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace sparseserve::cpu {

namespace {

constexpr int64_t kBytesPerUnit = 32;  // its score, and its key in every pass

// Larger for a better score. NaN counts as -inf, and -0 ties with +0.
uint32_t key_of(float score) {
  uint32_t bits;
  score = score == score ? score + 0.f : -INFINITY;
  std::memcpy(&bits, &score, sizeof bits);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000);
}

// The `rank`-th largest of the keys, rank >= 1, digit by digit; leaves in `rank` its rank among equal keys.
uint32_t nth_largest(const uint32_t* keys, int64_t count, int64_t& rank) {
  constexpr int kBits = 8, kDigits = 1 << kBits;
  uint32_t prefix = 0;
  for (int shift = 32 - kBits; shift >= 0; shift -= kBits) {
    const uint64_t above = ~uint64_t{0} << (shift + kBits);
    int64_t histogram[kDigits] = {};
    for (int64_t i = 0; i < count; ++i) histogram[keys[i] >> shift & (kDigits - 1)] += !((keys[i] ^ prefix) & above);
    uint32_t digit = kDigits - 1;
    for (; rank > histogram[digit]; --digit) rank -= histogram[digit];
    prefix |= digit << shift;
  }
  return prefix;
}

// Writes the `count` best of units [first, last), ascending; of equal ones the lower.
void take_best(const float* scores, int64_t first, int64_t last, int64_t count, int32_t* units) {
  thread_local Scratch<uint32_t> scratch;
  uint32_t* keys = scratch.get(last - first);
  for (int64_t u = first; u < last; ++u) keys[u - first] = key_of(scores[u]);
  int64_t equal = count;
  const uint32_t threshold = nth_largest(keys, last - first, equal);
  for (int64_t i = 0, taken = 0; taken < count; ++i) {
    const bool tie = keys[i] == threshold;
    const bool take = keys[i] > threshold || (tie && equal > 0);
    equal -= tie;
    units[taken] = static_cast<int32_t>(first + i);
    taken += take;
  }
}

// Writes those of units [first, last) that score above the threshold, ascending; returns how many.
int64_t take_above(const float* scores, int64_t first, int64_t last, float threshold, int32_t* units) {
  int64_t taken = 0;
  for (int64_t u = first; u < last; ++u)
    if (scores[u] > threshold) units[taken++] = static_cast<int32_t>(u);
  return taken;
}

void select(const SelectParams& params, int64_t row, int64_t head) {
  const Wanted& wanted = params.wanted;
  const Selection& selection = wanted.selection;
  const int64_t at = row * selection.heads + head, unit = selection.unit_tokens;
  const int64_t length = wanted.seq_lens[row], sink = wanted.sink[head], recent = wanted.recent[head];
  int32_t* spans = selection.spans + 2 * at;
  selection.count[at] = 0;
  if (wanted.takes_all(row, head)) {
    spans[0] = spans[1] = static_cast<int32_t>(length);
    return;
  }
  spans[0] = static_cast<int32_t>(std::min(sink, length));
  spans[1] = static_cast<int32_t>(std::max(length - recent, int64_t{spans[0]}));
  const int64_t first = sink / unit, last = (length - recent + unit - 1) / unit;
  const float* scores = params.scores.of(row, head);
  int32_t* units = selection.units + at * selection.slots;
  if (wanted.by_threshold) {
    selection.count[at] = static_cast<int32_t>(take_above(scores, first, last, wanted.threshold, units));
    return;
  }
  const int64_t count = std::min({last - first, wanted.unit_budget(row, head) / unit, selection.slots});
  if (count <= 0) return;
  selection.count[at] = static_cast<int32_t>(count);
  take_best(scores, first, last, count, units);
}

}  // namespace

void select_units(const SelectParams& params) {
  const Wanted& wanted = params.wanted;
  const int64_t heads = wanted.selection.heads;
  int64_t bytes = 0;
  for (int64_t row = 0; row < params.rows; ++row)
    bytes += wanted.seq_lens[row] / wanted.selection.unit_tokens * heads * kBytesPerUnit;
  for_each_item(params.rows * heads, bytes, [&](int64_t i, int64_t) { select(params, i / heads, i % heads); });
}

}  // namespace sparseserve::cpu
