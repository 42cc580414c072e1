// Scores of units by their summaries.
#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace sparseserve::cpu {

namespace {

constexpr int64_t kChunkSummaries = 64;

class PageScores {
 public:
  explicit PageScores(const ScorePagesParams& params)
      : params_(params),
        group_(params.query.heads / params.kv_heads),
        page_size_(params.summary.units * params.unit_tokens),
        chunk_pages_(std::max<int64_t>(1, kChunkSummaries / (params.kv_heads * params.summary.units))) {}

  void run() {
    const int64_t unit_bytes = 2 * params_.query.head_dim * size_of(params_.query.dtype);
    int64_t bytes = 0;
    for (int64_t row = 0; row < params_.query.rows; ++row) {
      const int64_t pages = (params_.table.seq_lens[row] + page_size_ - 1) / page_size_;
      bytes += pages * params_.kv_heads * params_.summary.units * unit_bytes;
      for (int64_t page = 0; page < pages; page += chunk_pages_)
        items_.push_back({row, page, std::min(page + chunk_pages_, pages)});
    }
    for_each_item(items_.size(), bytes,
                  [&](int64_t i, int64_t next) { score(items_[i], next < 0 ? nullptr : &items_[next]); });
  }

 private:
  struct Item {
    int64_t row, begin, end;  // logical pages
  };

  const char* summary(int64_t row, int64_t page, int64_t head) const {
    const SummaryPool& pool = params_.summary;
    const int64_t at = params_.table.pages[row * params_.table.stride + page] * pool.page_stride + head * pool.head_stride;
    return static_cast<const char*>(pool.data) + at * size_of(params_.query.dtype);
  }

  // All heads of a page in a row: their summaries lie side by side.
  void score(const Item& item, const Item* next) {
    thread_local Scratch<float> scratch;
    const int64_t dims = params_.query.head_dim, units = params_.summary.units;
    float* queries = scratch.get(params_.query.heads * dims);
    isa().load_queries(params_.query, item.row, 0, params_.query.heads, queries);
    const int64_t last = (params_.table.seq_lens[item.row] - 1) / params_.unit_tokens;
    for (int64_t page = item.begin; page < item.end; ++page) {
      const int64_t first = page * units, complete = std::min(units, last - first);
      for (int64_t head = 0; head < params_.kv_heads; ++head) {
        const char* ahead = page + 1 < item.end ? summary(item.row, page + 1, head)
                            : next              ? summary(next->row, next->begin, head)
                                                : nullptr;
        float* scores = params_.scores.of(item.row, head);
        isa().score_units(params_, queries + head * group_ * dims, group_, summary(item.row, page, head), complete,
                          ahead, scores + first);
        if (last < first + units) scores[last] = INFINITY;
      }
    }
  }

  const ScorePagesParams& params_;
  const int64_t group_;
  const int64_t page_size_;
  const int64_t chunk_pages_;
  std::vector<Item> items_;
};

}  // namespace

void score_pages(const ScorePagesParams& params) {
  PageScores(params).run();
  if (params.wanted.any()) select_units({params.scores, params.query.rows, params.wanted});
}

}  // namespace sparseserve::cpu
