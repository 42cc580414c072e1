// Summaries of the pages that a step wrote to.
#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace sparseserve::cpu {

// Threads share the heads and dims, never the tokens: a unit is folded in the order of its tokens.
void summarize_pages(const SummarizeParams& params) {
  const int64_t blocks = params.head_dim / 16;
  const int64_t bytes = params.tokens * params.kv_heads * params.head_dim * size_of(params.dtype);
  for_each_item(params.kv_heads * blocks, bytes,
                [&](int64_t i, int64_t) { isa().summarize_dims(params, i / blocks, i % blocks * 16); });
}

}  // namespace sparseserve::cpu
