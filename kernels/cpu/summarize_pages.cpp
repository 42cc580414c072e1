// Summaries of the units that a step completed.
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace sparseserve::cpu {

void summarize_pages(const SummarizeParams& params) {
  std::vector<int64_t> last;  // slots that complete a unit
  const Written& from = params.written;
  for (int64_t t = 0; t < from.tokens; ++t)
    if (from.completes_unit(t)) last.push_back(from.slots[t]);
  const int64_t unit_bytes = from.unit_tokens * from.kv_heads * from.head_dim * size_of(from.dtype);
  for_each_item(last.size(), last.size() * unit_bytes,
                [&](int64_t i, int64_t) { isa().summarize_unit(params, last[i]); });
}

}  // namespace sparseserve::cpu
