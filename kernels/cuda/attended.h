// The tokens that a row and selection head attends to, as tiles of 16: the first span, the units, the last span.
#pragma once

#include "fragments.h"

namespace sparseserve::cuda {

// Where a lane finds token lane % 16 of a tile, and which of the 16 tokens count.
struct TileRows {
  int64_t offset;  // elements from the first key of the head
  unsigned mask;
};

class Attended {
 public:
  __device__ Attended(const AttendParams& params, int row, int head, int kv_head)
      : cache_(params.cache),
        pages_(params.cache.pages(row, kv_head)),
        length_(params.cache.table.seq_lens[row]) {
    const Selection& selection = params.selection;
    const int64_t at = row * selection.heads + head;
    const int unit = static_cast<int>(selection.unit_tokens);
    units_ = selection.units + at * selection.slots;
    shift_ = __ffs(unit) - 1;
    count_ = selection.count[at];
    first_ = min(max(selection.spans[2 * at], 0), length_);
    last_ = min(max(selection.spans[2 * at + 1], first_), length_);
    if (first_ == last_) first_ = last_ = length_;  // everything, however it is written, is cut into the same tiles
    head_tiles_ = (first_ + kTileTokens - 1) / kTileTokens;
    unit_tiles_ = first_ < last_ ? ((count_ << shift_) + kTileTokens - 1) / kTileTokens : 0;
    const int tail = last_ / kTileTokens, end = (length_ + kTileTokens - 1) / kTileTokens;
    tiles_ = head_tiles_ + unit_tiles_ + (last_ < length_ ? end - tail : 0);
  }

  __device__ __forceinline__ int tiles() const { return tiles_; }

  __device__ __forceinline__ TileRows locate(int tile, int lane) const {
    const int r = lane % kTileTokens;
    int position;
    bool counts;
    if (tile < head_tiles_) {
      position = tile * kTileTokens + r;
      counts = position < first_;
    } else if (tile < head_tiles_ + unit_tiles_) {
      const int entry = (tile - head_tiles_) * kTileTokens + r, unit = entry >> shift_;
      position = unit < count_ ? (units_[unit] << shift_) + (entry & ((1 << shift_) - 1)) : -1;
      counts = position >= first_ && position < last_;
    } else {
      position = (last_ / kTileTokens + tile - head_tiles_ - unit_tiles_) * kTileTokens + r;
      counts = position >= last_ && position < length_;
    }
    // What does not count is read as the row's first token and masked.
    position = counts ? position : 0;
    const Pool& pool = cache_.key;  // the value's strides are the same
    const int page_size = static_cast<int>(cache_.page_size), page = position / page_size;
    const int64_t offset = pages_[page] * pool.page_stride + (position - page * page_size) * pool.token_stride;
    return {offset, __ballot_sync(kAllLanes, counts) & 0xffff};
  }

  // Tokens in the union; every lane of a warp calls it and gets the sum.
  __device__ __forceinline__ int tokens(int lane) const {
    int inside = 0;
    for (int i = lane; i < count_; i += 32) {
      const int begin = units_[i] << shift_, end = begin + (1 << shift_);
      inside += max(0, min(end, last_) - max(begin, first_));
    }
    return first_ + length_ - last_ + static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(inside)));
  }

 private:
  const Cache& cache_;
  const int32_t* pages_;
  const int32_t* units_;
  int length_, first_, last_, count_, shift_;
  int head_tiles_, unit_tiles_, tiles_;
};

}  // namespace sparseserve::cuda
