// A selection as a list of tiles.
#pragma once

#include "isa.h"

namespace sparseserve::cpu {

// The most tiles that a row of `length` tokens can have.
inline int64_t tile_count(int64_t length) { return (length + kTileTokens - 1) / kTileTokens; }

// The tiles of tokens [begin, end) of a row and KV head, appended to an ascending list.
class TileList {
 public:
  TileList(const Cache& cache, int64_t row, int64_t kv_head, Tile* tiles)
      : pages_(cache.pages(row, kv_head)), page_size_(cache.page_size), tiles_(tiles) {}

  // begin must not lie before the end of the range before.
  void append(int64_t begin, int64_t end);

  int64_t size() const { return size_; }
  int64_t tokens() const { return tokens_; }

 private:
  const int32_t* pages_;
  int64_t page_size_;
  Tile* tiles_;
  int64_t size_ = 0;
  int64_t tokens_ = 0;
  int64_t last_ = -1;  // logical number of the last tile
};

// Both spans and the units of one row and selection head, every token once.
TileList selected_tiles(const AttendParams& params, int64_t row, int64_t head, Tile* tiles);

}  // namespace sparseserve::cpu
