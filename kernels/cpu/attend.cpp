// Attention over a selection: lists of tiles, cut into chunks that all threads share, merged in order.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "tiles.h"

namespace sparseserve::cpu {

namespace {

// How a list is cut depends on its length alone, or a row's result would depend on its neighbours or on the machine.
constexpr int64_t kMinChunkTiles = 8;
constexpr int64_t kMaxChunks = 32;

int64_t chunk_tiles(int64_t tiles) { return std::max(kMinChunkTiles, (tiles + kMaxChunks - 1) / kMaxChunks); }

// The list of one row and selection head.
struct List {
  const Tile* tiles;
  int64_t size;
};

// One row and the query heads that share a list and a KV head.
struct Output {
  int64_t row;
  int64_t head;
  int64_t first_item;
  int64_t chunks;
  std::atomic<int64_t> missing;  // chunks that are not done yet
};

// A chunk of a list.
struct Item {
  const Tile* tiles;
  int64_t size;
  Output* output;
};

class Attention {
 public:
  explicit Attention(const AttendParams& params)
      : params_(params),
        group_(params.query.heads / std::max(params.cache.heads, params.selection.heads)),
        stride_((group_ * (2 + params.query.head_dim) + 15) / 16 * 16) {}

  void run() {
    list_tiles();
    cut();
    thread_local Scratch<float> partials;
    partials_ = partials.get(static_cast<int64_t>(items_.size()) * stride_);
    for_each_item(items_.size(), bytes_, [&](int64_t i, int64_t next) {
      attend_item(i, next);
      // Whoever does the last chunk merges all of them, in their order.
      Output& output = *items_[i].output;
      if (output.missing.fetch_sub(1, std::memory_order_acq_rel) == 1) merge(output);
    });
  }

 private:
  void list_tiles() {
    const int64_t heads = params_.selection.heads, rows = params_.query.rows;
    int64_t most = 0;
    for (int64_t row = 0; row < rows; ++row) most += tile_count(params_.cache.table.seq_lens[row]);
    thread_local Scratch<Tile> scratch;
    Tile* tiles = scratch.get(most * heads);
    lists_.reserve(rows * heads);
    for (int64_t i = 0; i < rows * heads; ++i) {
      const TileList list = selected_tiles(params_, i / heads, i % heads, tiles);
      params_.attended[i] = static_cast<int32_t>(list.tokens());
      lists_.push_back({tiles, list.size()});
      tiles += list.size();
    }
  }

  void cut() {
    const int64_t groups = params_.query.heads / group_;
    outputs_ = std::make_unique<Output[]>(params_.query.rows * groups);
    for (int64_t row = 0; row < params_.query.rows; ++row)
      for (int64_t g = 0; g < groups; ++g) {
        Output& output = outputs_[row * groups + g];
        output.row = row;
        output.head = g * group_;
        output.first_item = static_cast<int64_t>(items_.size());
        const List& list = lists_[row * params_.selection.heads + (params_.selection.heads == 1 ? 0 : g)];
        const int64_t step = chunk_tiles(list.size);
        for (int64_t i = 0; i < list.size; i += step)
          items_.push_back({list.tiles + i, std::min(step, list.size - i), &output});
        output.missing = output.chunks = static_cast<int64_t>(items_.size()) - output.first_item;
        bytes_ += list.size * kTileTokens * params_.query.head_dim * 2 * size_of(params_.cache.dtype);
        if (list.size == 0) merge(output);
      }
  }

  HeadGroup heads_of(const Item& item) const {
    const Query& query = params_.query;
    const Cache& cache = params_.cache;
    const int64_t row = item.output->row, head = item.output->head;
    const int64_t slot = cache.slot(head / (query.heads / cache.heads)), size = size_of(cache.dtype);
    return {static_cast<const char*>(query.data) + (row * query.row_stride + head * query.head_stride) * size,
            query.head_stride, group_,
            static_cast<const char*>(cache.key.data) + slot * cache.key.head_stride * size,
            static_cast<const char*>(cache.value.data) + slot * cache.value.head_stride * size};
  }

  Ahead ahead_of(const Item& item) const {
    const HeadGroup heads = heads_of(item);
    const Cache& cache = params_.cache;
    const Tile& tile = item.tiles[0];
    const int64_t size = size_of(cache.dtype);
    return {heads.key + (tile.page * cache.key.page_stride + tile.column) * size,
            heads.value + (tile.page * cache.value.page_stride + tile.column * params_.query.head_dim) * size,
            tile.mask};
  }

  void attend_item(int64_t i, int64_t next) {
    thread_local Scratch<float> queries;
    const Item& item = items_[i];
    isa().attend_chunk(params_, heads_of(item), item.tiles, item.size, next < 0 ? Ahead{} : ahead_of(items_[next]),
                       queries.get(group_ * params_.query.head_dim), partials_ + i * stride_);
  }

  void merge(const Output& output) {
    char* out = static_cast<char*>(params_.out) + size_of(params_.query.dtype) * (output.row * params_.out_row_stride +
                                                                                 output.head * params_.out_head_stride);
    isa().merge_chunks(params_, partials_ + output.first_item * stride_, output.chunks, stride_, group_, out,
                       params_.lse + output.row * params_.query.heads + output.head);
  }

  const AttendParams& params_;
  const int64_t group_;   // query heads per item
  const int64_t stride_;  // floats of a partial result
  float* partials_ = nullptr;
  std::vector<List> lists_;
  std::vector<Item> items_;
  std::unique_ptr<Output[]> outputs_;
  int64_t bytes_ = 0;
};

}  // namespace

void attend(const AttendParams& params) { Attention(params).run(); }

}  // namespace sparseserve::cpu
