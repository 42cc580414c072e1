// The ops on torch's stable ABI, for each library. Schemas are defined in sparseserve/ops/.
#include "arguments.h"

namespace {

using namespace sparseserve;

void attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& pages, const Tensor& seq_lens,
            const Tensor& spans, const Tensor& units, const Tensor& count, int64_t unit_tokens, double scale,
            Tensor out, Tensor lse, Tensor attended, std::optional<Tensor> places, std::optional<Tensor> scratch) {
  const DeviceOf device(query);
  const Query q = query_of(query);
  const Cache cache = kv_cache(key, value, q, pages, seq_lens, places);
  const Selection selection = selection_of(spans, units, count, unit_tokens, q.rows);
  check_heads(q.heads, cache.heads, selection.heads);
  if (selection.heads == 1) check_one_table(cache);
  check_shape(out, "out", {q.rows, q.heads, q.head_dim});
  check_type(out, "out", query.scalar_type());
  check_stride(out, "out", 2, 1);
  kernels::attend({q, cache, selection, static_cast<float>(scale), out.mutable_data_ptr(), out.stride(0), out.stride(1),
                   dense<float>(lse, "lse", ScalarType::Float, {q.rows, q.heads}),
                   dense<int32_t>(attended, "attended", ScalarType::Int, {q.rows, selection.heads}),
                   scratch_of(scratch, q)});
}

void score_tokens(const Tensor& query, const Tensor& key, const Tensor& pages, const Tensor& seq_lens,
                  const Tensor& lse, double scale, int64_t unit_tokens, Tensor scores,
                  std::optional<Tensor> sink, std::optional<Tensor> recent, std::optional<Tensor> budget,
                  std::optional<double> threshold, std::optional<Tensor> row_budget, std::optional<Tensor> spans,
                  std::optional<Tensor> units, std::optional<Tensor> count,
                  std::optional<Tensor> scratch) {
  const DeviceOf device(query);
  const Query q = query_of(query);
  const Cache cache = key_cache(key, q, pages, seq_lens);
  STD_TORCH_CHECK(unit_tokens == 1 || unit_tokens == 16 || unit_tokens == 32 || unit_tokens == 64,
                  "unit_tokens must be 1, 16, 32 or 64, not ", unit_tokens);
  const Scores to = scores_of(scores, q.rows, scores.size(1), cache.table.seq_lens, unit_tokens);
  check_heads(q.heads, cache.heads, scores.size(1));
  const Wanted wanted = wanted_of(unit_tokens, q.rows, cache.table.seq_lens, sink, recent, budget, threshold,
                                  row_budget, spans, units, count);
  check_wanted(wanted, scores.size(1));
  kernels::score_tokens({q, cache, dense<float>(lse, "lse", ScalarType::Float, {q.rows, q.heads}),
                         static_cast<float>(scale), unit_tokens, scores.size(1), to, wanted,
                         wanted.any() ? scratch_of(scratch, q) : nullptr});
}

void score_pages(const Tensor& query, const Tensor& summary, const Tensor& pages, const Tensor& seq_lens,
                 int64_t unit_tokens, int64_t bound, Tensor scores,
                 std::optional<Tensor> sink, std::optional<Tensor> recent, std::optional<Tensor> budget,
                 std::optional<double> threshold, std::optional<Tensor> row_budget, std::optional<Tensor> spans,
                 std::optional<Tensor> units, std::optional<Tensor> count,
                 std::optional<Tensor> scratch) {
  const DeviceOf device(query);
  const Query q = query_of(query);
  const SummaryPool pool = summary_of(summary, -1, q.head_dim, query.scalar_type());
  const int64_t kv_heads = summary.size(1);
  check_heads(q.heads, kv_heads, 1);
  const PageTable table = table_of(pages, seq_lens, q.rows, pool.units * unit_tokens);
  const Scores to = scores_of(scores, q.rows, kv_heads, table.seq_lens, unit_tokens);
  const Wanted wanted =
      wanted_of(unit_tokens, q.rows, table.seq_lens, sink, recent, budget, threshold, row_budget, spans, units, count);
  check_wanted(wanted, kv_heads);
  kernels::score_pages({q, pool, kv_heads, table, unit_tokens, bound_of(bound), to, wanted,
                        wanted.any() ? scratch_of(scratch, q) : nullptr});
}

void summarize_pages(const Tensor& key, const Tensor& slots, Tensor summary, int64_t bound) {
  const DeviceOf device(key);
  check_shape(summary, "summary", {-1, -1, -1, 2, -1});
  const Written written = written_of(key, slots, summary);
  kernels::summarize_pages({written, bound_of(bound),
                        summary_of(summary, written.kv_heads, written.head_dim, key.scalar_type())});
}

void write_tokens(const Tensor& key, const Tensor& value, const Tensor& slots, Tensor to_key, Tensor to_value,
                  const Tensor& places) {
  const DeviceOf device(key);
  const Pool keys = keys_of(to_key), values = values_of(to_value, to_key);
  check_shape(key, "key", {-1, -1, -1});
  const int64_t tokens = key.size(0), heads = key.size(1), page_size = to_key.size(2);
  check_shape(slots, "slots", {-1, -1});
  check_type(slots, "slots", ScalarType::Long);
  check_stride(slots, "slots", 1, 1);
  STD_TORCH_CHECK(slots.size(1) >= tokens, "slots.shape[1] must be at least ", tokens, ", not ", slots.size(1));
  check_shape(places, "places", {heads, 2});
  kernels::write_tokens({token_rows_of(key, "key", tokens, heads, to_key),
                         token_rows_of(value, "value", tokens, heads, to_key), dtype_of(key, "key"), tokens, heads,
                         check_head_dim(to_key.size(3)), keys, values, page_size,
                         places_of(places, slots.size(0), to_key.size(1)),
                         static_cast<const int64_t*>(slots.const_data_ptr()), slots.stride(0)});
}

void compare_outputs(Tensor out, const Tensor& lse, const Tensor& dense_out, const Tensor& dense_lse, Tensor recall,
                     Tensor error, double floor) {
  const DeviceOf device(out);
  check_shape(out, "out", {-1, -1, -1});
  const int64_t rows = out.size(0), heads = out.size(1), dim = check_head_dim(out.size(2));
  const ScalarType type = out.scalar_type();
  kernels::compare_outputs({outputs_of(out, "out", lse, "lse", rows, heads, dim, type),
                            outputs_of(dense_out, "dense_out", dense_lse, "dense_lse", rows, heads, dim, type),
                            dtype_of(out, "out"), rows, heads, dim,
                            dense<float>(recall, "recall", ScalarType::Float, {rows}),
                            dense<float>(error, "error", ScalarType::Float, {rows}), out.mutable_data_ptr(),
                            static_cast<float>(floor)});
}

void select_units(const Tensor& scores, const Tensor& seq_lens, int64_t unit_tokens, const Tensor& sink,
                  const Tensor& recent, const Tensor& budget, std::optional<double> threshold,
                  std::optional<Tensor> row_budget, Tensor spans, Tensor units, Tensor count) {
  const DeviceOf device(scores);
  const int64_t rows = scores.size(0);
  const int32_t* lens = dense<int32_t>(seq_lens, "seq_lens", ScalarType::Int, {rows});
  const Wanted wanted =
      wanted_of(unit_tokens, rows, lens, sink, recent, budget, threshold, row_budget, spans, units, count);
  kernels::select_units({scores_of(scores, rows, wanted.selection.heads, lens, unit_tokens), rows, wanted});
}

void summarize_gates(const Tensor& key, const Tensor& slots, const Tensor& positions, const Tensor& weight,
                     std::optional<Tensor> norm, const Tensor& unrope, std::optional<Tensor> rope, Tensor summary) {
  const DeviceOf device(key);
  check_shape(summary, "summary", {-1, -1, -1, -1});
  const Written written = written_of(key, slots, summary);
  const int64_t unit = written.unit_tokens, dim = written.head_dim;
  const GateBranch gate = gate_of(weight, written.kv_heads, 3 * dim, dim, norm, unrope, rope);
  const SummaryPool pool = gate_keys_of(summary, written.kv_heads, gate.dim);
  const int64_t* position = dense<int64_t>(positions, "positions", ScalarType::Long, {written.tokens});
  check_values(written.tokens, [&](int64_t t) {
    STD_TORCH_CHECK(!written.completes_unit(t) || (position[t] + 1 >= unit && position[t] < unrope.size(0)),
                    "positions[", t, "] = ", position[t], " ends no block of ", unit, " of ", unrope.size(0),
                    " tokens");
  });
  kernels::summarize_gates({written, position, gate, pool});
}

void score_gates(const Tensor& query, const Tensor& summary, const Tensor& pages, const Tensor& seq_lens,
                 int64_t unit_tokens, const Tensor& weight, std::optional<Tensor> norm, const Tensor& unrope,
                 std::optional<Tensor> rope, Tensor scores,
                 std::optional<Tensor> sink, std::optional<Tensor> recent, std::optional<Tensor> budget,
                 std::optional<double> threshold, std::optional<Tensor> row_budget, std::optional<Tensor> spans,
                 std::optional<Tensor> units, std::optional<Tensor> count) {
  const DeviceOf device(query);
  const Query q = query_of(query);
  const int64_t kv_heads = summary.size(1);
  check_heads(q.heads, kv_heads, 1);
  const GateBranch gate = gate_of(weight, kv_heads, q.heads / kv_heads * q.head_dim, q.head_dim, norm, unrope, rope);
  const SummaryPool pool = gate_keys_of(summary, kv_heads, gate.dim);
  const PageTable table = table_of(pages, seq_lens, q.rows, pool.units * unit_tokens);
  const Scores to = scores_of(scores, q.rows, kv_heads, table.seq_lens, unit_tokens);
  check_values(q.rows, [&](int64_t b) {
    STD_TORCH_CHECK(table.seq_lens[b] <= unrope.size(0), "seq_lens[", b, "] = ", table.seq_lens[b], " exceeds the ",
                    unrope.size(0), " positions of unrope");
  });
  const Wanted wanted =
      wanted_of(unit_tokens, q.rows, table.seq_lens, sink, recent, budget, threshold, row_budget, spans, units, count);
  check_wanted(wanted, kv_heads);
  kernels::score_gates({q, pool, kv_heads, table, unit_tokens, gate, to, wanted});
}

void search_blocks(const Tensor& query, const Tensor& key, const Tensor& pages, const Tensor& seq_lens, Tensor state,
                   std::vector<int64_t> chunk_tokens, std::vector<int64_t> stage_tokens,
                   std::vector<int64_t> refresh_steps, const Tensor& sink, const Tensor& recent, const Tensor& budget,
                   std::optional<Tensor> row_budget, Tensor spans, Tensor units, Tensor count,
                   std::optional<Tensor> scores, std::optional<Tensor> scratch) {
  const DeviceOf device(query);
  SearchBlocksParams params{};
  copy_list(chunk_tokens, "chunk_tokens", params.chunk_tokens);
  copy_list(stage_tokens, "stage_tokens", params.stage_tokens);
  copy_list(refresh_steps, "refresh_steps", params.refresh_steps);
  const Query& q = params.query = query_of(query);
  params.cache = key_cache(key, q, pages, seq_lens);
  const int64_t unit = params.chunk_tokens[kSearchStages - 1];
  const Wanted& wanted = params.wanted =
      wanted_of(unit, q.rows, params.cache.table.seq_lens, sink, recent, budget, {}, row_budget, spans, units, count);
  const int64_t heads = wanted.selection.heads;
  check_heads(q.heads, params.cache.heads, heads);
  check_values(heads, [&](int64_t h) {
    STD_TORCH_CHECK(wanted.sink[h] % unit == 0, "sink[", h, "] must be a multiple of ", unit, ", not ", wanted.sink[h]);
  });
  check_shape(state, "state", {key.size(0), heads, -1});
  check_type(state, "state", ScalarType::Int);
  check_stride(state, "state", 2, 1);
  int64_t words = 1 + kSearchStages + wanted.selection.slots;
  for (int i = 0; i + 1 < kSearchStages; ++i) {
    STD_TORCH_CHECK(params.chunk_tokens[i] % params.chunk_tokens[i + 1] == 0, "chunk_tokens[", i,
                    "] must be a multiple of chunk_tokens[", i + 1, "]");
    words += params.stage_tokens[i] / params.chunk_tokens[i];
  }
  STD_TORCH_CHECK(state.size(2) >= words, "state.shape[2] must be at least ", words, ", not ", state.size(2));
  params.state = static_cast<int32_t*>(state.mutable_data_ptr());
  params.state_page_stride = state.stride(0);
  params.state_head_stride = state.stride(1);
  if (!kValuesReadable) {
    STD_TORCH_CHECK(scores, "scores are needed on ", kDevice);
    check_shape(*scores, "scores", {q.rows, heads, -1});
    STD_TORCH_CHECK(scores->size(2) >= params.most_chunks(), "scores.shape[2] must be at least ", params.most_chunks(),
                    ", the chunks of a stage, not ", scores->size(2));
    params.scores = scores_of(*scores, q.rows, heads, nullptr, unit);
    params.scratch = scratch_of(scratch, q);
  }
  kernels::search_blocks(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SPARSESERVE_LIBRARY, SPARSESERVE_DISPATCH_KEY, m) {
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("score_tokens", TORCH_BOX(&score_tokens));
  m.impl("score_pages", TORCH_BOX(&score_pages));
  m.impl("summarize_pages", TORCH_BOX(&summarize_pages));
  m.impl("select_units", TORCH_BOX(&select_units));
  m.impl("write_tokens", TORCH_BOX(&write_tokens));
  m.impl("compare_outputs", TORCH_BOX(&compare_outputs));
  m.impl("summarize_gates", TORCH_BOX(&summarize_gates));
  m.impl("score_gates", TORCH_BOX(&score_gates));
  m.impl("search_blocks", TORCH_BOX(&search_blocks));
}

