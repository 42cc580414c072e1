// Attention mass of units of tokens.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "tiles.h"

namespace sparseserve::cpu {

namespace {

constexpr int64_t kChunkTiles = 16;  // a multiple of every unit
constexpr int64_t kChunkTokens = kChunkTiles * kTileTokens;

float sum(const float* x, int64_t count) {
  if (count == 1) return x[0];
  float lanes[16] = {};
  for (int64_t i = 0; i < count; i += 16)
    for (int64_t j = 0; j < 16; ++j) lanes[j] += x[i + j];
  for (int64_t half = 8; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

class TokenScores {
 public:
  explicit TokenScores(const ScoreTokensParams& params)
      : params_(params),
        group_(params.query.heads / params.cache.heads),
        per_head_(params.heads == params.query.heads),
        size_(size_of(params.cache.dtype)) {}

  void run() {
    int64_t bytes = 0;
    for (int64_t row = 0; row < params_.query.rows; ++row)
      for (int64_t head = 0; head < (params_.heads == 1 ? 1 : params_.cache.heads); ++head)
        for (int64_t begin = 0; begin < params_.cache.table.seq_lens[row]; begin += kChunkTokens)
          items_.push_back({row, head, begin, std::min<int64_t>(begin + kChunkTokens, params_.cache.table.seq_lens[row])});
    for (int64_t row = 0; row < params_.query.rows; ++row)
      bytes += params_.cache.table.seq_lens[row] * params_.cache.heads * params_.query.head_dim * size_;
    for_each_item(items_.size(), bytes,
                  [&](int64_t i, int64_t next) { score(items_[i], next < 0 ? nullptr : &items_[next]); });
  }

 private:
  // Tokens [begin, end) of a row for one KV head, or for all of them.
  struct Item {
    int64_t row, head, begin, end;
  };

  HeadGroup heads_of(int64_t row, int64_t kv_head) const {
    const Query& query = params_.query;
    const int64_t first = row * query.row_stride + kv_head * group_ * query.head_stride;
    return {static_cast<const char*>(query.data) + first * size_, query.head_stride, group_, key_of(kv_head), nullptr};
  }

  const char* key_of(int64_t kv_head) const {
    return static_cast<const char*>(params_.cache.key.data) + kv_head * params_.cache.key.head_stride * size_;
  }

  Ahead ahead(int64_t row, int64_t kv_head, int64_t token) const {
    const Cache& cache = params_.cache;
    const int64_t page = cache.table.pages[row * cache.table.stride + token / cache.page_size];
    return {key_of(kv_head) + (page * cache.key.page_stride + token % cache.page_size) * size_, nullptr, 0};
  }

  void score(const Item& item, const Item* next) {
    Tile tiles[kChunkTiles];
    TileList list(params_.cache, item.row, item.head, tiles);
    list.append(item.begin, item.end);
    const int64_t tokens = list.size() * kTileTokens, out_heads = per_head_ ? group_ : 1;
    thread_local Scratch<float> masses, queries;
    float* mass = masses.get(out_heads * tokens);
    std::fill_n(mass, out_heads * tokens, 0.f);
    const int64_t last = params_.heads == 1 ? params_.cache.heads - 1 : item.head;
    for (int64_t h = item.head; h <= last; ++h) {
      const Ahead then = h < last ? ahead(item.row, h + 1, item.begin)
                         : next   ? ahead(next->row, next->head, next->begin)
                                  : Ahead{};
      isa().token_mass(params_, heads_of(item.row, h), params_.lse + item.row * params_.query.heads + h * group_, tiles,
                       list.size(), then, per_head_, queries.get(group_ * params_.query.head_dim), mass);
    }
    for (int64_t g = 0; g < out_heads; ++g) store_units(item, item.head * out_heads + g, mass + g * tokens);
  }

  void store_units(const Item& item, int64_t head, const float* mass) {
    const int64_t unit = params_.unit_tokens;
    float* scores = params_.scores.of(item.row, head);
    // Tokens of the last tiles that the row lacks have no mass, but a unit may be wider than the tiles there are.
    const int64_t known = tile_count(item.end - item.begin) * kTileTokens;
    for (int64_t token = item.begin; token < item.end; token += unit)
      scores[token / unit] = sum(mass + token - item.begin, std::min(unit, known - (token - item.begin)));
  }

  const ScoreTokensParams& params_;
  const int64_t group_;
  const bool per_head_;
  const int64_t size_;  // bytes of an element
  std::vector<Item> items_;
};

}  // namespace

void score_tokens(const ScoreTokensParams& params) {
  TokenScores(params).run();
  if (params.wanted.any()) select_units({params.scores, params.query.rows, params.wanted});
}

}  // namespace sparseserve::cpu
