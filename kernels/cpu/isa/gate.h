// Learned gates (SeerAttention-R, arXiv 2506.08889). Summaries are the same bits on every machine: sums run in sixteen
// fixed lanes, and nothing is a fused multiply-add.
#pragma once

#include "score.h"
#include "summarize.h"

namespace sparseserve::cpu::SPARSESERVE_ISA {

constexpr float kNormEpsilon = 1e-6f;

template <int V>
SPARSESERVE_INLINE void project_dims(const float* x, int64_t count, const float* weight, int64_t dims, float* out) {
  Float sum[V];
  for (int v = 0; v < V; ++v) sum[v] = load(out + v * kLanes);
  for (int64_t i = 0; i < count; ++i)
    for (int v = 0; v < V; ++v) sum[v] += splat(x[i]) * load(weight + i * dims + v * kLanes);
  for (int v = 0; v < V; ++v) store(out + v * kLanes, sum[v]);
}

// out [dims] += x [count] @ weight [count, dims].
inline void project(const float* x, int64_t count, const float* weight, int64_t dims, float* out) {
  int64_t e = 0;
  for (; e + 64 <= dims; e += 64) project_dims<4 * kBlockVectors>(x, count, weight + e, dims, out + e);
  for (; e < dims; e += 16) project_dims<kBlockVectors>(x, count, weight + e, dims, out + e);
}

// RMS norm and rotation of what a branch projected to.
inline void finish(const GateBranch& gate, int64_t position, float* x) {
  const int64_t dims = gate.dim, half = dims / 2;
  if (gate.norm) {
    Float squares[kBlockVectors] = {};
    for (int64_t e = 0; e < dims; e += 16)
      for (int v = 0; v < kBlockVectors; ++v) {
        const Float y = load(x + e + v * kLanes);
        squares[v] += y * y;
      }
    const float mean = fold_lanes(squares, kPlus) / static_cast<float>(dims);
    const float scale = 1.f / __builtin_sqrtf(mean + kNormEpsilon);
    for (int64_t e = 0; e < dims; ++e) x[e] = x[e] * scale * gate.norm[e];
  }
  if (gate.rope) {
    const float *cos = gate.rope + position * dims, *sin = cos + half;
    for (int64_t e = 0; e < half; ++e) {
      const float a = x[e], b = x[half + e];
      x[e] = a * cos[e] - b * sin[e];
      x[half + e] = b * cos[e] + a * sin[e];
    }
  }
}

// Maximum, minimum and sum of one dim of a block's keys.
struct Pooled {
  Float most[kBlockVectors], least[kBlockVectors], sum[kBlockVectors];

  SPARSESERVE_INLINE void take(int v, Float x, bool first) {
    most[v] = first ? x : maximum(most[v], x);
    least[v] = first ? x : minimum(least[v], x);
    sum[v] = first ? x : sum[v] + x;
  }

  SPARSESERVE_INLINE void store_to(float* pooled, int64_t dims, int64_t tokens) const {
    pooled[0] = fold_lanes(most, kMore);
    pooled[dims] = fold_lanes(least, kLess);
    pooled[2 * dims] = fold_lanes(sum, kPlus) / static_cast<float>(tokens);
  }
};

// Pools the un-rotated keys of a block to [maximum, minimum, mean], each [dims]. angles: cos and sin [dims, tokens].
template <class T>
void pool_block(const T* key, int64_t page_size, int64_t tokens, int64_t dims, const float* angles, float* pooled) {
  const int64_t half = dims / 2;
  for (int64_t d = 0; d < half; ++d) {
    const T *first = key + d * page_size, *second = first + half * page_size;
    const float *cos = angles + d * tokens, *sin = cos + half * tokens;
    Pooled low, high;
    for (int64_t i = 0; i < tokens; i += 16)
      for (int v = 0; v < kBlockVectors; ++v) {
        const int64_t at = i + v * kLanes;
        const Float a = load(first + at), b = load(second + at), c = load(cos + at), s = load(sin + at);
        low.take(v, a * c + b * s, i == 0);
        high.take(v, b * c - a * s, i == 0);
      }
    low.store_to(pooled + d, dims, tokens);
    high.store_to(pooled + half + d, dims, tokens);
  }
}

template <class T>
void summarize_block(const SummarizeGatesParams& params, int64_t token, float* angles) {
  const GateBranch& gate = params.gate;
  const Written& from = params.written;
  const int64_t dims = from.head_dim, tokens = from.unit_tokens, begin = from.slots[token] + 1 - tokens;
  const int64_t page = begin / from.page_size, column = begin % from.page_size;
  const int64_t position = params.positions[token] + 1 - tokens;
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t d = 0; d < dims; ++d) angles[d * tokens + i] = gate.unrope[(position + i) * dims + d];
  float pooled[3 * kMaxHeadDim];
  for (int64_t head = 0; head < from.kv_heads; ++head) {
    const T* key =
        static_cast<const T*>(from.key.data) + page * from.key.page_stride + head * from.key.head_stride + column;
    pool_block(key, from.page_size, tokens, dims, angles, pooled);
    float* out = static_cast<float*>(params.summary.data) + page * params.summary.page_stride +
                 head * params.summary.head_stride + column / tokens * gate.dim;
    for (int64_t e = 0; e < gate.dim; ++e) out[e] = 0.f;
    project(pooled, 3 * dims, gate.weight + head * 3 * dims * gate.dim, gate.dim, out);
    finish(gate, position, out);
  }
}

inline void summarize_gate(const SummarizeGatesParams& params, int64_t token, float* angles) {
  switch (params.written.dtype) {
    case DType::kBFloat16:
      return summarize_block<bf16>(params, token, angles);
    case DType::kHalf:
      return summarize_block<fp16>(params, token, angles);
    case DType::kFloat:
      return summarize_block<float>(params, token, angles);
  }
}

// The gate's query of one row and KV head, over sqrt(dim).
inline void gate_query(const ScoreGatesParams& params, int64_t row, int64_t head, float* out) {
  const GateBranch& gate = params.gate;
  const int64_t dims = params.query.head_dim, half = dims / 2, group = params.query.heads / params.kv_heads;
  const int64_t position = params.table.seq_lens[row] - 1;
  const float *cos = gate.unrope + position * dims, *sin = cos + half;
  float query[kMaxHeadDim];
  for (int64_t e = 0; e < gate.dim; ++e) out[e] = 0.f;
  for (int64_t h = head * group; h < (head + 1) * group; ++h) {
    load_queries(params.query, row, h, 1, query);
    for (int64_t d = 0; d < half; ++d) {
      const float a = query[d], b = query[half + d];
      query[d] = a * cos[d] + b * sin[d];
      query[half + d] = b * cos[d] - a * sin[d];
    }
    project(query, dims, gate.weight + h * dims * gate.dim, gate.dim, out);
  }
  finish(gate, position, out);
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(gate.dim));
  for (int64_t e = 0; e < gate.dim; ++e) out[e] *= scale;
}

// Logarithms of the softmax over x [count] and, with `zero`, one more logit of 0.
inline void log_softmax(float* x, int64_t count, bool zero) {
  float top = zero ? 0.f : -INFINITY;
  for (int64_t i = 0; i < count; ++i) top = top < x[i] ? x[i] : top;
  Float sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    float lanes[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = i + j < count ? x[i + j] : -INFINITY;
    sum += exp2((load(lanes) - top) * kLog2E);
  }
  const float total = reduce_add(sum) + (zero ? exp2(splat(-top * kLog2E))[0] : 0.f);
  const float lse = top + __builtin_logf(total);
  for (int64_t i = 0; i < count; ++i) x[i] -= lse;
}

inline void score_gates(const ScoreGatesParams& params, int64_t row, int64_t head) {
  const int64_t length = params.table.seq_lens[row], unit = params.unit_tokens, dims = params.gate.dim;
  const int64_t units = length / unit;
  float query[kMaxHeadDim];
  gate_query(params, row, head, query);
  const SummaryPool& pool = params.summary;
  const int32_t* pages = params.table.pages + row * params.table.stride;
  float* scores = params.scores.of(row, head);
  for (int64_t u = 0; u < units; ++u) {
    const float* key = static_cast<const float*>(pool.data) + pages[u / pool.units] * pool.page_stride +
                       head * pool.head_stride + u % pool.units * dims;
    Float sum{};
    for (int64_t e = 0; e < dims; e += kLanes) sum = fma(load(query + e), load(key + e), sum);
    scores[u] = reduce_add(sum);
  }
  log_softmax(scores, units, length % unit != 0);
  scores[(length - 1) / unit] = INFINITY;
}

}  // namespace sparseserve::cpu::SPARSESERVE_ISA
