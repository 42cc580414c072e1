// torch tensors -> params -> kernel, on torch's stable ABI. Schemas are defined in sparseserve/ops/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace {

using namespace sparseserve;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_shape(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(), " dimensions, not ",
                  x.dim());
  int64_t i = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size < 0 || x.size(i) == size, name, ".shape[", i, "] must be ", size, ", not ", x.size(i));
    ++i;
  }
}

void check_type(const Tensor& x, const char* name, ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", not ",
                  torch::headeronly::toString(x.scalar_type()));
}

// A stride of a dimension of size 1 is never used and may be anything.
void check_stride(const Tensor& x, const char* name, int64_t dim, int64_t stride) {
  STD_TORCH_CHECK(x.size(dim) == 1 || x.stride(dim) == stride, name, ".stride(", dim, ") must be ", stride, ", not ",
                  x.stride(dim));
}

template <class T>
T* dense(const Tensor& x, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  check_shape(x, name, shape);
  check_type(x, name, type);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  return static_cast<T*>(x.mutable_data_ptr());
}

DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::Float:
      return DType::kFloat;
    default:
      STD_TORCH_CHECK(false, name, " must be bfloat16, float16 or float32, not ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

int64_t check_head_dim(int64_t dim) {
  STD_TORCH_CHECK(dim % 16 == 0 && dim > 0 && dim <= 256, "head_dim must be a multiple of 16 up to 256, not ", dim);
  return dim;
}

Query query_of(const Tensor& query) {
  check_shape(query, "query", {-1, -1, -1});
  check_stride(query, "query", 2, 1);
  return {query.const_data_ptr(), dtype_of(query, "query"), query.size(0),   query.size(1),
          check_head_dim(query.size(2)), query.stride(0),   query.stride(1)};
}

// Pages [B, N] and lengths [B]; no row may be longer than its pages.
struct Rows {
  const int32_t* pages;
  int64_t pages_stride;
  const int32_t* seq_lens;
};

Rows rows_of(const Tensor& pages, const Tensor& seq_lens, int64_t rows, int64_t page_size) {
  check_shape(pages, "pages", {rows, -1});
  check_type(pages, "pages", ScalarType::Int);
  check_stride(pages, "pages", 1, 1);
  const int32_t* lens = dense<int32_t>(seq_lens, "seq_lens", ScalarType::Int, {rows});
  for (int64_t b = 0; b < rows; ++b)
    STD_TORCH_CHECK(lens[b] >= 0 && lens[b] <= pages.size(1) * page_size, "seq_lens[", b, "] = ", lens[b],
                    " does not fit ", pages.size(1), " pages of ", page_size, " tokens");
  return {static_cast<const int32_t*>(pages.const_data_ptr()), pages.stride(0), lens};
}

void check_heads(int64_t heads, int64_t kv_heads, int64_t selection_heads) {
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " query heads cannot share ", kv_heads, " KV heads");
  STD_TORCH_CHECK(selection_heads == 1 || selection_heads == kv_heads || selection_heads == heads,
                  "selection heads must be 1, ", kv_heads, " or ", heads, ", not ", selection_heads);
}

// The key half of a cache; K of a page and head is [D, P].
Cache key_cache(const Tensor& key, const Query& query, const Tensor& pages, const Tensor& seq_lens) {
  check_shape(key, "key", {-1, -1, -1, query.head_dim});
  STD_TORCH_CHECK(dtype_of(key, "key") == query.dtype, "query and key must have the same dtype");
  const int64_t page_size = key.size(2);
  STD_TORCH_CHECK(page_size > 0 && page_size % 32 == 0, "the page size must be a multiple of 32, not ", page_size);
  check_stride(key, "key", 2, 1);
  check_stride(key, "key", 3, page_size);
  const Rows rows = rows_of(pages, seq_lens, query.rows, page_size);
  return {{key.const_data_ptr(), key.stride(0), key.stride(1)}, {}, query.dtype, key.size(1), page_size, rows.pages,
          rows.pages_stride, rows.seq_lens};
}

Cache kv_cache(const Tensor& key, const Tensor& value, const Query& query, const Tensor& pages,
               const Tensor& seq_lens) {
  Cache cache = key_cache(key, query, pages, seq_lens);
  check_shape(value, "value", {key.size(0), key.size(1), key.size(2), key.size(3)});
  STD_TORCH_CHECK(dtype_of(value, "value") == query.dtype, "query and value must have the same dtype");
  check_stride(value, "value", 2, query.head_dim);
  check_stride(value, "value", 3, 1);
  cache.value = {value.const_data_ptr(), value.stride(0), value.stride(1)};
  return cache;
}

Selection selection_of(const Tensor& spans, const Tensor& units, const Tensor& count, int64_t unit_tokens,
                       int64_t rows) {
  check_shape(units, "units", {rows, -1, -1});
  const int64_t heads = units.size(1), slots = units.size(2);
  STD_TORCH_CHECK(unit_tokens > 0, "unit_tokens must be positive, not ", unit_tokens);
  return {heads, slots, unit_tokens,
          dense<int32_t>(spans, "spans", ScalarType::Int, {rows, heads, 2}),
          dense<int32_t>(units, "units", ScalarType::Int, {rows, heads, slots}),
          dense<int32_t>(count, "count", ScalarType::Int, {rows, heads})};
}

struct Scores {
  float* data;
  int64_t row_stride, head_stride;
};

// [B, heads, >= units of the longest row]
Scores scores_of(const Tensor& scores, int64_t rows, int64_t heads, const int32_t* seq_lens, int64_t unit_tokens) {
  check_shape(scores, "scores", {rows, heads, -1});
  check_type(scores, "scores", ScalarType::Float);
  check_stride(scores, "scores", 2, 1);
  for (int64_t b = 0; b < rows; ++b)
    STD_TORCH_CHECK((seq_lens[b] + unit_tokens - 1) / unit_tokens <= scores.size(2), "scores.shape[2] = ",
                    scores.size(2), " is too small for ", seq_lens[b], " tokens in units of ", unit_tokens);
  return {static_cast<float*>(scores.mutable_data_ptr()), scores.stride(0), scores.stride(1)};
}

SummaryPool summary_of(const Tensor& summary, int64_t kv_heads, int64_t head_dim, ScalarType type) {
  check_shape(summary, "summary", {-1, kv_heads, -1, 2, head_dim});
  check_type(summary, "summary", type);
  check_stride(summary, "summary", 2, 2 * head_dim);
  check_stride(summary, "summary", 3, head_dim);
  check_stride(summary, "summary", 4, 1);
  return {summary.mutable_data_ptr(), summary.stride(0), summary.stride(1), summary.size(2)};
}

// Tokens [T] at `slots`, -1 for padding, just written to the keys of a pool whose pages have `units` units.
Written written_of(const Tensor& key, const Tensor& slots, const Tensor& summary) {
  check_shape(key, "key", {-1, -1, -1, -1});
  const int64_t page_size = key.size(2), units = summary.size(2), unit = page_size / units;
  check_stride(key, "key", 2, 1);
  check_stride(key, "key", 3, page_size);
  STD_TORCH_CHECK(page_size % units == 0 && unit % 16 == 0, "a unit must be a multiple of 16 tokens, not ", page_size,
                  " / ", units);
  STD_TORCH_CHECK(summary.size(0) == key.size(0), "key and summary must have the same pages");
  const int64_t* slot = dense<int64_t>(slots, "slots", ScalarType::Long, {-1});
  for (int64_t t = 0; t < slots.size(0); ++t)
    STD_TORCH_CHECK(slot[t] >= -1 && slot[t] < key.size(0) * page_size, "slots[", t, "] = ", slot[t],
                    " lies outside ", key.size(0) * page_size, " tokens");
  return {{key.const_data_ptr(), key.stride(0), key.stride(1)}, dtype_of(key, "key"), key.size(1),
          check_head_dim(key.size(3)), page_size, unit, slots.size(0), slot};
}

Bound bound_of(int64_t bound) {
  STD_TORCH_CHECK(bound == 0 || bound == 1, "unknown bound ", bound);
  return static_cast<Bound>(bound);
}

void attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& pages, const Tensor& seq_lens,
            const Tensor& spans, const Tensor& units, const Tensor& count, int64_t unit_tokens, double scale,
            Tensor out, Tensor lse, Tensor attended) {
  const Query q = query_of(query);
  const Cache cache = kv_cache(key, value, q, pages, seq_lens);
  const Selection selection = selection_of(spans, units, count, unit_tokens, q.rows);
  check_heads(q.heads, cache.heads, selection.heads);
  check_shape(out, "out", {q.rows, q.heads, q.head_dim});
  check_type(out, "out", query.scalar_type());
  check_stride(out, "out", 2, 1);
  cpu::attend({q, cache, selection, static_cast<float>(scale), out.mutable_data_ptr(), out.stride(0), out.stride(1),
               dense<float>(lse, "lse", ScalarType::Float, {q.rows, q.heads}),
               dense<int32_t>(attended, "attended", ScalarType::Int, {q.rows, selection.heads})});
}

void score_tokens(const Tensor& query, const Tensor& key, const Tensor& pages, const Tensor& seq_lens,
                  const Tensor& lse, double scale, int64_t unit_tokens, Tensor scores) {
  const Query q = query_of(query);
  const Cache cache = key_cache(key, q, pages, seq_lens);
  STD_TORCH_CHECK(unit_tokens == 1 || unit_tokens == 16 || unit_tokens == 32 || unit_tokens == 64,
                  "unit_tokens must be 1, 16, 32 or 64, not ", unit_tokens);
  const Scores to = scores_of(scores, q.rows, scores.size(1), cache.seq_lens, unit_tokens);
  check_heads(q.heads, cache.heads, scores.size(1));
  cpu::score_tokens({q, cache, dense<float>(lse, "lse", ScalarType::Float, {q.rows, q.heads}),
                     static_cast<float>(scale), unit_tokens, scores.size(1), to.data, to.row_stride, to.head_stride});
}

void score_pages(const Tensor& query, const Tensor& summary, const Tensor& pages, const Tensor& seq_lens,
                 int64_t unit_tokens, int64_t bound, Tensor scores) {
  const Query q = query_of(query);
  const SummaryPool pool = summary_of(summary, -1, q.head_dim, query.scalar_type());
  const int64_t kv_heads = summary.size(1);
  check_heads(q.heads, kv_heads, 1);
  const Rows rows = rows_of(pages, seq_lens, q.rows, pool.units * unit_tokens);
  const Scores to = scores_of(scores, q.rows, kv_heads, rows.seq_lens, unit_tokens);
  cpu::score_pages({q, pool, kv_heads, rows.pages, rows.pages_stride, rows.seq_lens, unit_tokens, bound_of(bound),
                    to.data, to.row_stride, to.head_stride});
}

void summarize_pages(const Tensor& key, const Tensor& slots, Tensor summary, int64_t bound) {
  check_shape(summary, "summary", {-1, -1, -1, 2, -1});
  const Written written = written_of(key, slots, summary);
  cpu::summarize_pages({written, bound_of(bound),
                        summary_of(summary, written.kv_heads, written.head_dim, key.scalar_type())});
}

void select_units(const Tensor& scores, const Tensor& seq_lens, const Tensor& sink, const Tensor& recent,
                  const Tensor& budget, int64_t unit_tokens, std::optional<double> threshold, Tensor spans,
                  Tensor units, Tensor count) {
  const int64_t rows = scores.size(0);
  const Selection selection = selection_of(spans, units, count, unit_tokens, rows);
  const int32_t* lens = dense<int32_t>(seq_lens, "seq_lens", ScalarType::Int, {rows});
  const Scores from = scores_of(scores, rows, selection.heads, lens, unit_tokens);
  for (int64_t b = 0; b < rows && threshold; ++b)
    STD_TORCH_CHECK((lens[b] + unit_tokens - 1) / unit_tokens <= selection.slots, "units.shape[2] = ", selection.slots,
                    " is too small for every unit of ", lens[b], " tokens");
  cpu::select_units({from.data, from.row_stride, from.head_stride, rows, lens,
                     dense<int32_t>(sink, "sink", ScalarType::Int, {selection.heads}),
                     dense<int32_t>(recent, "recent", ScalarType::Int, {selection.heads}),
                     dense<int32_t>(budget, "budget", ScalarType::Int, {selection.heads}), threshold.has_value(),
                     static_cast<float>(threshold.value_or(0)), selection});
}

const float* table_of(const Tensor& table, const char* name, int64_t positions, int64_t dim) {
  return dense<float>(table, name, ScalarType::Float, {positions, dim});
}

// Weights [H, inputs, E], with what follows the projection.
GateBranch gate_of(const Tensor& weight, int64_t kv_heads, int64_t inputs, int64_t head_dim,
                   const std::optional<Tensor>& norm, const Tensor& unrope, const std::optional<Tensor>& rope) {
  const int64_t dim = check_head_dim(weight.size(weight.dim() - 1)), positions = unrope.size(0);
  STD_TORCH_CHECK(weight.numel() == kv_heads * inputs * dim, "weight must have ", kv_heads, " x ", inputs, " x ", dim,
                  " elements, not ", weight.numel());
  check_type(weight, "weight", ScalarType::Float);
  STD_TORCH_CHECK(weight.is_cpu() && weight.is_contiguous(), "weight must be a contiguous CPU tensor");
  return {static_cast<const float*>(weight.const_data_ptr()), dim,
          norm ? dense<float>(*norm, "norm", ScalarType::Float, {dim}) : nullptr,
          table_of(unrope, "unrope", positions, head_dim), rope ? table_of(*rope, "rope", positions, dim) : nullptr};
}

// Gate keys [M, H, U, E].
SummaryPool gate_keys_of(const Tensor& summary, int64_t kv_heads, int64_t dim) {
  check_shape(summary, "summary", {-1, kv_heads, -1, dim});
  check_type(summary, "summary", ScalarType::Float);
  check_stride(summary, "summary", 2, dim);
  check_stride(summary, "summary", 3, 1);
  return {summary.mutable_data_ptr(), summary.stride(0), summary.stride(1), summary.size(2)};
}

void summarize_gates(const Tensor& key, const Tensor& slots, const Tensor& positions, const Tensor& weight,
                     std::optional<Tensor> norm, const Tensor& unrope, std::optional<Tensor> rope, Tensor summary) {
  check_shape(summary, "summary", {-1, -1, -1, -1});
  const Written written = written_of(key, slots, summary);
  const int64_t unit = written.unit_tokens, dim = written.head_dim;
  const GateBranch gate = gate_of(weight, written.kv_heads, 3 * dim, dim, norm, unrope, rope);
  const SummaryPool pool = gate_keys_of(summary, written.kv_heads, gate.dim);
  const int64_t* position = dense<int64_t>(positions, "positions", ScalarType::Long, {written.tokens});
  for (int64_t t = 0; t < written.tokens; ++t)
    STD_TORCH_CHECK(!written.completes_unit(t) || (position[t] + 1 >= unit && position[t] < unrope.size(0)),
                    "positions[", t, "] = ", position[t], " ends no block of ", unit, " of ", unrope.size(0),
                    " tokens");
  cpu::summarize_gates({written, position, gate, pool});
}

void score_gates(const Tensor& query, const Tensor& summary, const Tensor& pages, const Tensor& seq_lens,
                 int64_t unit_tokens, const Tensor& weight, std::optional<Tensor> norm, const Tensor& unrope,
                 std::optional<Tensor> rope, Tensor scores) {
  const Query q = query_of(query);
  const int64_t kv_heads = summary.size(1);
  check_heads(q.heads, kv_heads, 1);
  const GateBranch gate = gate_of(weight, kv_heads, q.heads / kv_heads * q.head_dim, q.head_dim, norm, unrope, rope);
  const SummaryPool pool = gate_keys_of(summary, kv_heads, gate.dim);
  const Rows rows = rows_of(pages, seq_lens, q.rows, pool.units * unit_tokens);
  const Scores to = scores_of(scores, q.rows, kv_heads, rows.seq_lens, unit_tokens);
  for (int64_t b = 0; b < q.rows; ++b)
    STD_TORCH_CHECK(rows.seq_lens[b] <= unrope.size(0), "seq_lens[", b, "] = ", rows.seq_lens[b],
                    " exceeds the ", unrope.size(0), " positions of unrope");
  cpu::score_gates({q, pool, kv_heads, rows.pages, rows.pages_stride, rows.seq_lens, unit_tokens, gate, to.data,
                    to.row_stride, to.head_stride});
}

// A list of positive numbers of tokens or steps.
template <size_t N>
void copy_list(const std::vector<int64_t>& list, const char* name, int64_t (&to)[N]) {
  STD_TORCH_CHECK(list.size() == N, name, " must have ", N, " elements, not ", list.size());
  for (size_t i = 0; i < N; ++i) {
    STD_TORCH_CHECK(list[i] > 0, name, "[", i, "] must be positive, not ", list[i]);
    to[i] = list[i];
  }
}

void search_blocks(const Tensor& query, const Tensor& key, const Tensor& pages, const Tensor& seq_lens, Tensor state,
                   std::vector<int64_t> chunk_tokens, std::vector<int64_t> stage_tokens,
                   std::vector<int64_t> refresh_steps, const Tensor& sink, const Tensor& recent, const Tensor& budget,
                   Tensor spans, Tensor units, Tensor count) {
  SearchBlocksParams params{};
  copy_list(chunk_tokens, "chunk_tokens", params.chunk_tokens);
  copy_list(stage_tokens, "stage_tokens", params.stage_tokens);
  copy_list(refresh_steps, "refresh_steps", params.refresh_steps);
  params.query = query_of(query);
  params.cache = key_cache(key, params.query, pages, seq_lens);
  const int64_t unit = params.chunk_tokens[kSearchStages - 1];
  params.selection = selection_of(spans, units, count, unit, params.query.rows);
  const int64_t heads = params.selection.heads;
  check_heads(params.query.heads, params.cache.heads, heads);
  params.sink = dense<int32_t>(sink, "sink", ScalarType::Int, {heads});
  for (int64_t h = 0; h < heads; ++h)
    STD_TORCH_CHECK(params.sink[h] % unit == 0, "sink[", h, "] must be a multiple of ", unit, ", not ", params.sink[h]);
  params.recent = dense<int32_t>(recent, "recent", ScalarType::Int, {heads});
  params.budget = dense<int32_t>(budget, "budget", ScalarType::Int, {heads});
  check_shape(state, "state", {key.size(0), heads, -1});
  check_type(state, "state", ScalarType::Int);
  check_stride(state, "state", 2, 1);
  int64_t words = 1 + kSearchStages + params.selection.slots;
  for (int i = 0; i + 1 < kSearchStages; ++i) {
    STD_TORCH_CHECK(params.chunk_tokens[i] % params.chunk_tokens[i + 1] == 0, "chunk_tokens[", i,
                    "] must be a multiple of chunk_tokens[", i + 1, "]");
    words += params.stage_tokens[i] / params.chunk_tokens[i];
  }
  STD_TORCH_CHECK(state.size(2) >= words, "state.shape[2] must be at least ", words, ", not ", state.size(2));
  params.state = static_cast<int32_t*>(state.mutable_data_ptr());
  params.state_page_stride = state.stride(0);
  params.state_head_stride = state.stride(1);
  cpu::search_blocks(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseserve, CPU, m) {
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("score_tokens", TORCH_BOX(&score_tokens));
  m.impl("score_pages", TORCH_BOX(&score_pages));
  m.impl("summarize_pages", TORCH_BOX(&summarize_pages));
  m.impl("select_units", TORCH_BOX(&select_units));
  m.impl("summarize_gates", TORCH_BOX(&summarize_gates));
  m.impl("score_gates", TORCH_BOX(&score_gates));
  m.impl("search_blocks", TORCH_BOX(&search_blocks));
}

// Without tensors there is nothing to dispatch on: these two are called through ctypes.
extern "C" {
[[gnu::visibility("default")]] const char* sparseserve_isa() { return cpu::isa_name(); }
[[gnu::visibility("default")]] int sparseserve_use_isa(const char* name) { return cpu::use_isa(name); }
}
