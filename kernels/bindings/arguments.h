// torch tensors -> the kernels' parameters. What is wrong is named, by argument, value and what is allowed.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "target.h"

namespace sparseserve {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_shape(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(on_device(x), name, " must be a ", kDevice, " tensor");
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(), " dimensions, not ",
                  x.dim());
  int64_t i = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size < 0 || x.size(i) == size, name, ".shape[", i, "] must be ", size, ", not ", x.size(i));
    ++i;
  }
}

inline void check_type(const Tensor& x, const char* name, ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", not ",
                  torch::headeronly::toString(x.scalar_type()));
}

// Checks values that the host can read.
template <class Check>
inline void check_values(int64_t count, const Check& check) {
  if constexpr (kValuesReadable)
    for (int64_t i = 0; i < count; ++i) check(i);
}

// A stride of a dimension of size 1 is never used and may be anything.
inline void check_stride(const Tensor& x, const char* name, int64_t dim, int64_t stride) {
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

// CUDA reads rows of numbers 16 bytes at a time.
inline void check_aligned(const Tensor& x, const char* name) {
  if (kValuesReadable) return;
  const int64_t numbers = 16 / x.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) aligned = aligned && (x.size(i) == 1 || x.stride(i) % numbers == 0);
  STD_TORCH_CHECK(aligned, name, " must begin at a multiple of 16 bytes, and so must all of its rows");
}

inline DType dtype_of(const Tensor& x, const char* name) {
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

inline int64_t check_head_dim(int64_t dim) {
  STD_TORCH_CHECK(dim % 16 == 0 && dim > 0 && dim <= 256, "head_dim must be a multiple of 16 up to 256, not ", dim);
  return dim;
}

inline Query query_of(const Tensor& query) {
  check_shape(query, "query", {-1, -1, -1});
  check_stride(query, "query", 2, 1);
  check_aligned(query, "query");
  return {query.const_data_ptr(), dtype_of(query, "query"), query.size(0),   query.size(1),
          check_head_dim(query.size(2)), query.stride(0),   query.stride(1)};
}

// Pages [B, N], or [R, B, N] of several tables, and lengths [B]; no row may be longer than its pages.
inline PageTable table_of(const Tensor& pages, const Tensor& seq_lens, int64_t rows, int64_t page_size,
                          bool several = false) {
  if (several)
    check_shape(pages, "pages", {-1, rows, -1});
  else
    check_shape(pages, "pages", {rows, -1});
  check_type(pages, "pages", ScalarType::Int);
  const int64_t last = pages.dim() - 1, width = pages.size(last);
  check_stride(pages, "pages", last, 1);
  int64_t reach = 0;  // CUDA counts them in 32 bits, and units
  for (int64_t i = 0; i <= last; ++i) reach += (pages.size(i) - 1) * pages.stride(i);
  STD_TORCH_CHECK(reach <= INT32_MAX, "pages must lie within 2^31 elements");
  const int32_t* lens = dense<int32_t>(seq_lens, "seq_lens", ScalarType::Int, {rows});
  check_values(rows, [&](int64_t b) {
    STD_TORCH_CHECK(lens[b] >= 0 && lens[b] <= width * page_size, "seq_lens[", b, "] = ", lens[b],
                    " does not fit ", width, " pages of ", page_size, " tokens");
  });
  return {static_cast<const int32_t*>(pages.const_data_ptr()), several ? pages.stride(0) : 0, pages.stride(last - 1),
          width, lens};
}

// Where blocks of a row meet.
inline void* scratch_of(const std::optional<Tensor>& scratch, const Query& query) {
  if (kValuesReadable) return nullptr;
  STD_TORCH_CHECK(scratch, "scratch is needed on ", kDevice);
  const int64_t words = scratch_words(query.rows, query.heads, query.head_dim);
  STD_TORCH_CHECK(scratch->numel() >= words, "scratch must have at least ", words, " elements, not ", scratch->numel());
  return dense<float>(*scratch, "scratch", ScalarType::Float, {-1});
}

inline void check_heads(int64_t heads, int64_t kv_heads, int64_t selection_heads) {
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " query heads cannot share ", kv_heads, " KV heads");
  STD_TORCH_CHECK(selection_heads == 1 || selection_heads == kv_heads || selection_heads == heads,
                  "selection heads must be 1, ", kv_heads, " or ", heads, ", not ", selection_heads);
}

// A selection of all heads is one list of pages.
inline void check_one_table(const Cache& cache) {
  check_values(cache.places ? cache.heads : 0, [&](int64_t h) {
    STD_TORCH_CHECK(cache.places[2 * h] == cache.places[0], "places[", h, "][0] = ", cache.places[2 * h],
                    " must be ", cache.places[0], ", as of head 0: heads of several tables need ", cache.heads,
                    " selection heads, not 1");
  });
}

// The keys [M, H, P, D] of a pool.
inline Pool keys_of(const Tensor& key) {
  check_shape(key, "key", {-1, -1, -1, -1});
  const int64_t page_size = key.size(2);
  STD_TORCH_CHECK(page_size > 0 && page_size % kPageMultiple == 0, "the page size must be a multiple of ",
                  kPageMultiple, ", not ", page_size);
  if (kTransposedKeys) check_stride(key, "key", 2, 1);
  check_stride(key, "key", 3, kTransposedKeys ? page_size : 1);
  check_aligned(key, "key");
  return {key.const_data_ptr(), key.stride(0), key.stride(1), key.stride(2)};
}

// Table and slot [H, 2] of every KV head.
inline const int32_t* places_of(const Tensor& places, int64_t tables, int64_t slots) {
  const int32_t* place = dense<int32_t>(places, "places", ScalarType::Int, {-1, 2});
  check_values(places.size(0), [&](int64_t h) {
    STD_TORCH_CHECK(place[2 * h] >= 0 && place[2 * h] < tables, "places[", h, "][0] = ", place[2 * h], " is none of ",
                    tables, " tables");
    STD_TORCH_CHECK(place[2 * h + 1] >= 0 && place[2 * h + 1] < slots, "places[", h, "][1] = ", place[2 * h + 1],
                    " is none of ", slots, " slots");
  });
  return place;
}

// Numbers [T, H, D] to be written.
inline TokenRows token_rows_of(const Tensor& x, const char* name, int64_t tokens, int64_t heads, const Tensor& pool) {
  check_shape(x, name, {tokens, heads, pool.size(3)});
  check_type(x, name, pool.scalar_type());
  check_stride(x, name, 2, 1);
  check_aligned(x, name);
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

// Outputs [B, Hq, D] of attention, with their log-sum-exp.
inline Outputs outputs_of(const Tensor& out, const char* name, const Tensor& lse, const char* lse_name, int64_t rows,
                          int64_t heads, int64_t head_dim, ScalarType type) {
  check_shape(out, name, {rows, heads, head_dim});
  check_type(out, name, type);
  check_stride(out, name, 2, 1);
  return {out.const_data_ptr(), out.stride(0), out.stride(1),
          dense<float>(lse, lse_name, ScalarType::Float, {rows, heads})};
}

inline Cache key_cache(const Tensor& key, const Query& query, const Tensor& pages, const Tensor& seq_lens,
                       const std::optional<Tensor>& places = {}) {
  const Pool keys = keys_of(key);
  check_shape(key, "key", {-1, -1, -1, query.head_dim});
  STD_TORCH_CHECK(dtype_of(key, "key") == query.dtype, "query and key must have the same dtype");
  const PageTable table = table_of(pages, seq_lens, query.rows, key.size(2), places.has_value());
  return {keys, {}, query.dtype, places ? places->size(0) : key.size(1), key.size(2), table,
          places ? places_of(*places, pages.size(0), key.size(1)) : nullptr};
}

// The values [M, S, P, D] of a pool with these keys.
inline Pool values_of(const Tensor& value, const Tensor& key) {
  check_shape(value, "value", {key.size(0), key.size(1), key.size(2), key.size(3)});
  STD_TORCH_CHECK(value.scalar_type() == key.scalar_type(), "key and value must have the same dtype");
  if (kTransposedKeys) check_stride(value, "value", 2, key.size(3));
  check_stride(value, "value", 3, 1);
  check_aligned(value, "value");
  for (int64_t i = 0; i < 3 && !kTransposedKeys; ++i) check_stride(value, "value", i, key.stride(i));
  return {value.const_data_ptr(), value.stride(0), value.stride(1), value.stride(2)};
}

inline Cache kv_cache(const Tensor& key, const Tensor& value, const Query& query, const Tensor& pages,
               const Tensor& seq_lens, const std::optional<Tensor>& places) {
  Cache cache = key_cache(key, query, pages, seq_lens, places);
  cache.value = values_of(value, key);
  return cache;
}

inline Selection selection_of(const Tensor& spans, const Tensor& units, const Tensor& count, int64_t unit_tokens,
                       int64_t rows) {
  check_shape(units, "units", {rows, -1, -1});
  const int64_t heads = units.size(1), slots = units.size(2);
  STD_TORCH_CHECK(units.numel() <= INT32_MAX, "units must have less than 2^31 elements, not ", units.numel());
  STD_TORCH_CHECK(unit_tokens > 0, "unit_tokens must be positive, not ", unit_tokens);
  return {heads, slots, unit_tokens,
          dense<int32_t>(spans, "spans", ScalarType::Int, {rows, heads, 2}),
          dense<int32_t>(units, "units", ScalarType::Int, {rows, heads, slots}),
          dense<int32_t>(count, "count", ScalarType::Int, {rows, heads})};
}

inline Scores scores_of(const Tensor& scores, int64_t rows, int64_t heads, const int32_t* seq_lens, int64_t unit_tokens) {
  check_shape(scores, "scores", {rows, heads, -1});
  check_type(scores, "scores", ScalarType::Float);
  check_stride(scores, "scores", 2, 1);
  check_values(rows, [&](int64_t b) {
    STD_TORCH_CHECK((seq_lens[b] + unit_tokens - 1) / unit_tokens <= scores.size(2), "scores.shape[2] = ",
                    scores.size(2), " is too small for ", seq_lens[b], " tokens in units of ", unit_tokens);
  });
  return {static_cast<float*>(scores.mutable_data_ptr()), scores.stride(0), scores.stride(1)};
}

// None without `count`.
inline Wanted wanted_of(int64_t unit_tokens, int64_t rows, const int32_t* seq_lens, const std::optional<Tensor>& sink,
                        const std::optional<Tensor>& recent, const std::optional<Tensor>& budget,
                        std::optional<double> threshold, const std::optional<Tensor>& row_budget,
                        const std::optional<Tensor>& spans, const std::optional<Tensor>& units,
                        const std::optional<Tensor>& count) {
  if (!count) return {};
  STD_TORCH_CHECK(sink && recent && budget && spans && units, "a selection has spans, units, sink, recent and budget");
  const Selection selection = selection_of(*spans, *units, *count, unit_tokens, rows);
  check_values(threshold ? rows : 0, [&](int64_t b) {
    STD_TORCH_CHECK((seq_lens[b] + unit_tokens - 1) / unit_tokens <= selection.slots, "units.shape[2] = ",
                    selection.slots, " is too small for every unit of ", seq_lens[b], " tokens");
  });
  return {selection, seq_lens,
          dense<int32_t>(*sink, "sink", ScalarType::Int, {selection.heads}),
          dense<int32_t>(*recent, "recent", ScalarType::Int, {selection.heads}),
          dense<int32_t>(*budget, "budget", ScalarType::Int, {selection.heads}),
          row_budget ? dense<int32_t>(*row_budget, "row_budget", ScalarType::Int, {rows}) : nullptr,
          threshold.has_value(), static_cast<float>(threshold.value_or(0))};
}

// Of a selection that is filled by scores of `heads` heads.
inline void check_wanted(const Wanted& wanted, int64_t heads) {
  STD_TORCH_CHECK(!wanted.any() || wanted.selection.heads == heads, "units.shape[1] must be ", heads,
                  ", the heads of the scores, not ", wanted.selection.heads);
}

inline SummaryPool summary_of(const Tensor& summary, int64_t kv_heads, int64_t head_dim, ScalarType type) {
  check_shape(summary, "summary", {-1, kv_heads, -1, 2, head_dim});
  check_type(summary, "summary", type);
  check_aligned(summary, "summary");
  check_stride(summary, "summary", 2, 2 * head_dim);
  check_stride(summary, "summary", 3, head_dim);
  check_stride(summary, "summary", 4, 1);
  return {summary.mutable_data_ptr(), summary.stride(0), summary.stride(1), summary.size(2)};
}

// Tokens [T] at `slots`, -1 for padding, just written to the keys of a pool whose pages have `units` units.
inline Written written_of(const Tensor& key, const Tensor& slots, const Tensor& summary) {
  const Pool keys = keys_of(key);
  const int64_t page_size = key.size(2), units = summary.size(2), unit = page_size / units;
  STD_TORCH_CHECK(page_size % units == 0 && unit % 16 == 0, "a unit must be a multiple of 16 tokens, not ", page_size,
                  " / ", units);
  STD_TORCH_CHECK(summary.size(0) == key.size(0), "key and summary must have the same pages");
  const int64_t* slot = dense<int64_t>(slots, "slots", ScalarType::Long, {-1});
  check_values(slots.size(0), [&](int64_t t) {
    STD_TORCH_CHECK(slot[t] >= -1 && slot[t] < key.size(0) * page_size, "slots[", t, "] = ", slot[t],
                    " lies outside ", key.size(0) * page_size, " tokens");
  });
  return {keys, dtype_of(key, "key"), key.size(1),
          check_head_dim(key.size(3)), page_size, unit, slots.size(0), slot};
}

inline Bound bound_of(int64_t bound) {
  STD_TORCH_CHECK(bound == 0 || bound == 1, "unknown bound ", bound);
  return static_cast<Bound>(bound);
}

inline const float* angles_of(const Tensor& table, const char* name, int64_t positions, int64_t dim) {
  return dense<float>(table, name, ScalarType::Float, {positions, dim});
}

// Weights [H, inputs, E], with what follows the projection.
inline GateBranch gate_of(const Tensor& weight, int64_t kv_heads, int64_t inputs, int64_t head_dim,
                   const std::optional<Tensor>& norm, const Tensor& unrope, const std::optional<Tensor>& rope) {
  const int64_t dim = check_head_dim(weight.size(weight.dim() - 1)), positions = unrope.size(0);
  STD_TORCH_CHECK(weight.numel() == kv_heads * inputs * dim, "weight must have ", kv_heads, " x ", inputs, " x ", dim,
                  " elements, not ", weight.numel());
  check_type(weight, "weight", ScalarType::Float);
  STD_TORCH_CHECK(on_device(weight) && weight.is_contiguous(), "weight must be a contiguous ", kDevice, " tensor");
  return {static_cast<const float*>(weight.const_data_ptr()), dim,
          norm ? dense<float>(*norm, "norm", ScalarType::Float, {dim}) : nullptr,
          angles_of(unrope, "unrope", positions, head_dim), rope ? angles_of(*rope, "rope", positions, dim) : nullptr};
}

// Gate keys [M, H, U, E].
inline SummaryPool gate_keys_of(const Tensor& summary, int64_t kv_heads, int64_t dim) {
  check_shape(summary, "summary", {-1, kv_heads, -1, dim});
  check_type(summary, "summary", ScalarType::Float);
  check_stride(summary, "summary", 2, dim);
  check_stride(summary, "summary", 3, 1);
  return {summary.mutable_data_ptr(), summary.stride(0), summary.stride(1), summary.size(2)};
}

// A list of positive numbers of tokens or steps.
template <size_t N>
inline void copy_list(const std::vector<int64_t>& list, const char* name, int64_t (&to)[N]) {
  STD_TORCH_CHECK(list.size() == N, name, " must have ", N, " elements, not ", list.size());
  for (size_t i = 0; i < N; ++i) {
    STD_TORCH_CHECK(list[i] > 0, name, "[", i, "] must be positive, not ", list[i]);
    to[i] = list[i];
  }
}

}  // namespace sparseserve
