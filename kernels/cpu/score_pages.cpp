// Scores of units by their summaries.
#include <algorithm>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace sparseserve::cpu {

namespace {

constexpr int64_t kChunkUnits = 64;

class PageScores {
 public:
  explicit PageScores(const ScorePagesParams& params)
      : params_(params),
        group_(params.query.heads / params.kv_heads),
        page_size_(params.summary.units * params.unit_tokens),
        chunk_pages_(std::max<int64_t>(1, kChunkUnits / params.summary.units)) {}

  void run() {
    int64_t bytes = 0;
    for (int64_t row = 0; row < params_.query.rows; ++row) {
      const int64_t pages = (params_.seq_lens[row] + page_size_ - 1) / page_size_;
      bytes += pages * params_.kv_heads * params_.summary.units * 2 * params_.query.head_dim * 4;
      for (int64_t head = 0; head < params_.kv_heads; ++head)
        for (int64_t page = 0; page < pages; page += chunk_pages_)
          items_.push_back({row, head, page, std::min(page + chunk_pages_, pages)});
    }
    for_each_item(items_.size(), bytes,
                  [&](int64_t i, int64_t next) { score(items_[i], next < 0 ? nullptr : &items_[next]); });
  }

 private:
  struct Item {
    int64_t row, head, begin, end;  // logical pages
  };

  const float* summary(const Item& item, int64_t page) const {
    return params_.summary.data + params_.pages[item.row * params_.pages_stride + page] * params_.summary.page_stride +
           item.head * params_.summary.head_stride;
  }

  void score(const Item& item, const Item* next) {
    thread_local Scratch<float> scratch;
    float* queries = scratch.get(group_ * params_.query.head_dim);
    isa().load_queries(params_.query, item.row, item.head * group_, group_, queries);
    float* scores = params_.scores + item.row * params_.scores_row_stride + item.head * params_.scores_head_stride;
    const int64_t unit = params_.unit_tokens;
    for (int64_t page = item.begin; page < item.end; ++page) {
      const int64_t tokens = std::min(page_size_, params_.seq_lens[item.row] - page * page_size_);
      const int64_t units = (tokens + unit - 1) / unit;
      const float* ahead = page + 1 < item.end ? summary(item, page + 1) : next ? summary(*next, next->begin) : nullptr;
      isa().score_units(params_, queries, group_, summary(item, page), units, tokens - (units - 1) * unit, ahead,
                        scores + page * params_.summary.units);
    }
  }

  const ScorePagesParams& params_;
  const int64_t group_;
  const int64_t page_size_;
  const int64_t chunk_pages_;
  std::vector<Item> items_;
};

}  // namespace

void score_pages(const ScorePagesParams& params) { PageScores(params).run(); }

}  // namespace sparseserve::cpu
