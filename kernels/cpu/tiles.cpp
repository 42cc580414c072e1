#include "tiles.h"

#include <algorithm>

namespace sparseserve::cpu {

void TileList::append(int64_t begin, int64_t end) {
  if (begin >= end) return;
  tokens_ += end - begin;
  for (int64_t tile = begin / kTileTokens; tile * kTileTokens < end; ++tile) {
    const int64_t first = tile * kTileTokens;
    const int64_t low = std::max(begin - first, int64_t{0}), high = std::min<int64_t>(end - first, kTileTokens);
    const uint32_t mask = static_cast<uint32_t>(((uint64_t{1} << high) - 1) >> low << low);
    if (tile == last_) {
      tiles_[size_ - 1].mask |= mask;
    } else {
      tiles_[size_++] = {pages_[first / page_size_], static_cast<int32_t>(first % page_size_), mask};
      last_ = tile;
    }
  }
}

TileList selected_tiles(const AttendParams& params, int64_t row, int64_t head, Tile* tiles) {
  const Selection& selection = params.selection;
  const int64_t at = row * selection.heads + head, length = params.cache.table.seq_lens[row];
  const int64_t first_end = std::clamp<int64_t>(selection.spans[2 * at], 0, length);
  const int64_t second_begin = std::clamp<int64_t>(selection.spans[2 * at + 1], first_end, length);
  TileList list(params.cache, row, head * params.cache.heads / selection.heads, tiles);
  list.append(0, first_end);
  int64_t covered = first_end;
  for (int64_t i = 0; i < selection.count[at]; ++i) {
    const int64_t unit = selection.units[at * selection.slots + i];
    const int64_t begin = std::max(unit * selection.unit_tokens, covered);
    const int64_t end = std::min((unit + 1) * selection.unit_tokens, second_begin);
    list.append(begin, end);
    covered = std::max(covered, end);
  }
  list.append(second_begin, length);
  return list;
}

}  // namespace sparseserve::cpu
