// Gate keys of the blocks that a step completed, and the scores that a gate gives to all blocks.
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace sparseserve::cpu {

void summarize_gates(const SummarizeGatesParams& params) {
  std::vector<int64_t> last;  // tokens that complete a block
  const Written& from = params.written;
  for (int64_t t = 0; t < from.tokens; ++t)
    if (from.completes_unit(t)) last.push_back(t);
  const int64_t weights = from.kv_heads * 3 * from.head_dim * params.gate.dim;
  for_each_item(last.size(), last.size() * weights * 4, [&](int64_t i, int64_t) {
    thread_local Scratch<float> angles;
    isa().summarize_gate(params, last[i], angles.get(from.head_dim * from.unit_tokens));
  });
}

// Row after row under one head: they share its weights.
void score_gates(const ScoreGatesParams& params) {
  const int64_t rows = params.query.rows;
  int64_t bytes = 0;
  for (int64_t row = 0; row < rows; ++row)
    bytes += (params.query.heads * params.query.head_dim +
              params.kv_heads * (params.table.seq_lens[row] / params.unit_tokens)) * params.gate.dim * 4;
  for_each_item(rows * params.kv_heads, bytes, [&](int64_t i, int64_t) {
    if (params.table.seq_lens[i % rows] > 0) isa().score_gates(params, i % rows, i / rows);
  });
  if (params.wanted.any()) select_units({params.scores, rows, params.wanted});
}

}  // namespace sparseserve::cpu
