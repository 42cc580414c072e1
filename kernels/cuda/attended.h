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
        selection_(params.selection),
        first_page_(static_cast<int>(params.cache.pages(row, kv_head) - params.cache.table.pages)),
        length_(params.cache.table.seq_lens[row]) {
    const int64_t at = row * selection_.heads + head;
    const int unit = static_cast<int>(selection_.unit_tokens);
    first_unit_ = static_cast<int>(at * selection_.slots);
    shift_ = __ffs(unit) - 1;
    count_ = selection_.count[at];
    first_ = min(max(selection_.spans[2 * at], 0), length_);
    last_ = min(max(selection_.spans[2 * at + 1], first_), length_);
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
      position = unit < count_ ? (unit_at(unit) << shift_) + (entry & ((1 << shift_) - 1)) : -1;
      counts = position >= first_ && position < last_;
    } else {
      position = (last_ / kTileTokens + tile - head_tiles_ - unit_tiles_) * kTileTokens + r;
      counts = position >= last_ && position < length_;
    }
    // What does not count is read as the row's first token and masked.
    position = counts ? position : 0;
    const Pool& pool = cache_.key;  // the value's strides are the same
    const int page_size = static_cast<int>(cache_.page_size), page = position / page_size;
    const int64_t offset = cache_.table.pages[first_page_ + page] * pool.page_stride +
                           (position - page * page_size) * pool.token_stride;
    return {offset, __ballot_sync(kAllLanes, counts) & 0xffff};
  }

  // Tokens in the union; every lane of a warp calls it and gets the sum.
  __device__ __forceinline__ int tokens(int lane) const {
    int inside = 0;
    for (int i = lane; i < count_; i += 32) {
      const int begin = unit_at(i) << shift_, end = begin + (1 << shift_);
      inside += max(0, min(end, last_) - max(begin, first_));
    }
    return first_ + length_ - last_ + static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(inside)));
  }

 private:
  __device__ __forceinline__ int unit_at(int i) const { return selection_.units[first_unit_ + i]; }

  const Cache& cache_;
  const Selection& selection_;
  int first_page_, first_unit_;  // indices of 32 bits: registers are few
  int length_, first_, last_, count_, shift_;
  int head_tiles_, unit_tiles_, tiles_;
};

}  // namespace sparseserve::cuda
