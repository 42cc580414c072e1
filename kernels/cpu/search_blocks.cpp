// HiP's search: chunks by a few of their keys, the best ones split and searched again.
#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace sparseserve::cpu {

namespace {

constexpr int64_t kItemChunks = 32;

// One row and selection head, and what its last page remembers of earlier steps: the length at which it was searched,
// how many chunks every stage kept, and where they start.
struct Search {
  int64_t row, head, length;
  int64_t limit;  // chunks start before it
  int stage;      // the first stage that is searched; kStages when nothing is
  int32_t* state;
  std::vector<int32_t> chunks;
  std::vector<float> scores;

  int32_t& searched_at() const { return state[0]; }
  int32_t& count(int of) const { return state[1 + of]; }
};

class BlockSearch {
 public:
  explicit BlockSearch(const SearchBlocksParams& params)
      : params_(params),
        wanted_(params.wanted),
        selection_(params.wanted.selection),
        kv_heads_(selection_.heads == 1 ? params.cache.heads : 1),
        heads_per_kv_(selection_.heads == params.query.heads ? 1 : params.query.heads / params.cache.heads),
        size_(size_of(params.cache.dtype)) {}

  void run() {
    for (int64_t row = 0; row < params_.query.rows; ++row)
      for (int64_t head = 0; head < selection_.heads; ++head) begin(row, head);
    for (int stage = 0; stage < kStages; ++stage) run_stage(stage);
    for (const Search& search : searches_) finish(search);
  }

 private:
  struct Item {
    Search* search;
    int64_t begin, end;  // of its chunks
  };

  void begin(int64_t row, int64_t head) {
    const Cache& cache = params_.cache;
    const int64_t at = row * selection_.heads + head, length = cache.table.seq_lens[row];
    int32_t* spans = selection_.spans + 2 * at;
    if (wanted_.takes_all(row, head)) {
      spans[0] = spans[1] = static_cast<int32_t>(length);
      selection_.count[at] = 0;
      return;
    }
    const int64_t recent = wanted_.recent[head];
    spans[0] = static_cast<int32_t>(std::min<int64_t>(wanted_.sink[head], length));
    spans[1] = static_cast<int32_t>(std::max<int64_t>(length - recent, spans[0]));
    const int64_t page = cache.table.pages[row * cache.table.stride + (length - 1) / cache.page_size];
    int32_t* state = params_.state + page * params_.state_page_stride + head * params_.state_head_stride;
    searches_.push_back({row, head, length, length - std::max<int64_t>(0, recent - params_.chunk_tokens[0]),
                         first_stage(length, *state), state, {}, {}});
  }

  int first_stage(int64_t length, int64_t searched_at) const {
    const int64_t offset = (length - 1) % params_.cache.page_size;
    const bool known = searched_at >= length - offset && searched_at < length;  // on an earlier token of this page
    int stage = 0;
    while (known && stage < kStages && offset % params_.refresh_steps[stage] != 0) ++stage;
    return stage;
  }

  int32_t* kept(const Search& search, int stage) const {
    int64_t at = 1 + kStages;
    for (int i = 0; i < stage; ++i) at += most(search, i);
    return search.state + at;
  }

  // The most chunks that a stage keeps.
  int64_t most(const Search& search, int stage) const {
    if (stage + 1 < kStages) return params_.stage_tokens[stage] / params_.chunk_tokens[stage];
    const int64_t tokens = std::max(0, wanted_.unit_budget(search.row, search.head));
    return std::min(tokens / params_.chunk_tokens[stage], selection_.slots);
  }

  void run_stage(int stage) {
    std::vector<Search*> searched;
    std::vector<Item> items;
    for (Search& search : searches_) {
      if (stage < search.stage) continue;
      searched.push_back(&search);
      collect(search, stage);
      const auto chunks = static_cast<int64_t>(search.chunks.size());
      search.scores.assign(chunks, -INFINITY);
      if (chunks <= most(search, stage)) continue;  // all are kept
      for (int64_t i = 0; i < chunks; i += kItemChunks)
        items.push_back({&search, i, std::min(i + kItemChunks, chunks)});
    }
    const int64_t bytes = static_cast<int64_t>(items.size()) * kItemChunks * params_.chunk_tokens[stage] * kv_heads_ *
                          params_.query.head_dim * size_;
    for_each_item(items.size(), bytes, [&](int64_t i, int64_t) { score(items[i], stage); });
    for_each_item(searched.size(), searched.size() * kBytesPerWorker,
                  [&](int64_t i, int64_t) { keep(*searched[i], stage); });
  }

  // The chunks of a stage: the whole row's, or those that the stage before kept, split.
  void collect(Search& search, int stage) const {
    const auto tokens = static_cast<int32_t>(params_.chunk_tokens[stage]);
    const auto limit = static_cast<int32_t>(search.limit);
    search.chunks.clear();
    if (stage == 0) {
      for (int32_t start = wanted_.sink[search.head]; start < limit; start += tokens) search.chunks.push_back(start);
      return;
    }
    const int32_t* parents = kept(search, stage - 1);
    for (int64_t i = 0; i < search.count(stage - 1); ++i) {
      const int32_t end = std::min(parents[i] + static_cast<int32_t>(params_.chunk_tokens[stage - 1]), limit);
      for (int32_t start = parents[i]; start < end; start += tokens) search.chunks.push_back(start);
    }
  }

  void score(const Item& item, int stage) const {
    const Search& search = *item.search;
    const Query& query = params_.query;
    const Cache& cache = params_.cache;
    thread_local Scratch<float> queries, dots;
    const Chunks chunks{cache.table.pages + search.row * cache.table.stride, search.chunks.data() + item.begin,
                        item.end - item.begin, params_.chunk_tokens[stage], search.length};
    float* scores = item.search->scores.data() + item.begin;
    for (int64_t i = 0; i < kv_heads_; ++i) {
      const int64_t head = (search.head * kv_heads_ + i) * heads_per_kv_;  // of the queries
      const int64_t kv_head = head * cache.heads / query.heads;
      const HeadGroup group{
          static_cast<const char*>(query.data) + (search.row * query.row_stride + head * query.head_stride) * size_,
          query.head_stride, heads_per_kv_,
          static_cast<const char*>(cache.key.data) + kv_head * cache.key.head_stride * size_, nullptr};
      isa().chunk_scores(params_, group, chunks, queries.get(heads_per_kv_ * query.head_dim),
                         dots.get(kDotTiles * heads_per_kv_ * kTileTokens), scores);
    }
  }

  // The best chunks, by position; of equally good ones the first.
  void keep(const Search& search, int stage) const {
    const auto chunks = static_cast<int64_t>(search.chunks.size());
    const int64_t count = std::min(chunks, most(search, stage));
    std::vector<int32_t> order(chunks);
    for (int64_t i = 0; i < chunks; ++i) order[i] = static_cast<int32_t>(i);
    if (count < chunks)
      std::nth_element(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
        return search.scores[a] > search.scores[b] || (search.scores[a] == search.scores[b] && a < b);
      });
    std::sort(order.begin(), order.begin() + count);
    int32_t* to = kept(search, stage);
    for (int64_t i = 0; i < count; ++i) to[i] = search.chunks[order[i]];
    search.count(stage) = static_cast<int32_t>(count);
  }

  void finish(const Search& search) const {
    const int64_t at = search.row * selection_.heads + search.head;
    const auto unit = static_cast<int32_t>(selection_.unit_tokens);
    const int32_t count = search.count(kStages - 1);
    std::transform(kept(search, kStages - 1), kept(search, kStages - 1) + count,
                   selection_.units + at * selection_.slots, [&](int32_t start) { return start / unit; });
    selection_.count[at] = count;
    if (search.stage < kStages) search.searched_at() = static_cast<int32_t>(search.length);
  }

  static constexpr int kStages = kSearchStages;
  const SearchBlocksParams& params_;
  const Wanted& wanted_;
  const Selection& selection_;
  const int64_t kv_heads_;      // that a selection head covers
  const int64_t heads_per_kv_;  // query heads of each
  const int64_t size_;          // bytes of an element
  std::vector<Search> searches_;
};

}  // namespace

void search_blocks(const SearchBlocksParams& params) { BlockSearch(params).run(); }

}  // namespace sparseserve::cpu
