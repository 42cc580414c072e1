// Running summaries of units. No fused multiply-add here: a unit filled by a prefill and one filled token by token must
// agree bit for bit on every machine.
#pragma once

#include "../isa.h"
#include "simd.h"

namespace sparseserve::cpu::SPARSESERVE_ISA {

constexpr int kBlockVectors = 16 / kLanes;

// Both rows of a unit's summary, 16 dims wide.
struct Running {
  Float first[kBlockVectors], second[kBlockVectors];

  SPARSESERVE_INLINE void load_from(const float* unit, int64_t dims) {
    for (int v = 0; v < kBlockVectors; ++v) {
      first[v] = load(unit + v * kLanes);
      second[v] = load(unit + dims + v * kLanes);
    }
  }

  SPARSESERVE_INLINE void store_to(float* unit, int64_t dims) const {
    for (int v = 0; v < kBlockVectors; ++v) {
      store(unit + v * kLanes, first[v]);
      store(unit + dims + v * kLanes, second[v]);
    }
  }
};

struct MinMax {
  SPARSESERVE_INLINE static void start(Float x, Float& low, Float& high) { low = high = x; }
  SPARSESERVE_INLINE static void fold(Float x, Float& low, Float& high) {
    low = minimum(low, x);
    high = maximum(high, x);
  }
};

struct Moments {
  SPARSESERVE_INLINE static void start(Float x, Float& sum, Float& squares) {
    sum = x;
    squares = x * x;
  }
  SPARSESERVE_INLINE static void fold(Float x, Float& sum, Float& squares) {
    sum += x;
    squares += x * x;
  }
};

inline float* unit_at(const SummarizeParams& params, int64_t head, int64_t unit) {
  const SummaryPool& pool = params.summary;
  return pool.data + unit / pool.units * pool.page_stride + head * pool.head_stride +
         unit % pool.units * 2 * params.head_dim;
}

template <class T, class Rule>
void fold_dims(const SummarizeParams& params, int64_t head, int64_t dim) {
  const T* key = static_cast<const T*>(params.key) + head * params.key_head_stride + dim;
  Running running;
  float* unit = nullptr;      // whose summary `running` is
  int64_t expected = -1;      // slot that goes on in that unit
  int64_t left = 0;           // tokens still missing in it
  const auto flush = [&] {
    if (unit) running.store_to(unit, params.head_dim);
    unit = nullptr;
  };
  for (int64_t t = 0; t < params.tokens; ++t, key += params.key_token_stride) {
    const int64_t slot = params.slots[t];
    if (slot < 0) continue;
    bool fresh = false;
    if (!unit || slot != expected || left == 0) {
      flush();
      const int64_t offset = slot % params.unit_tokens;
      unit = unit_at(params, head, slot / params.unit_tokens) + dim;
      left = params.unit_tokens - offset;
      fresh = offset == 0;
      if (!fresh) running.load_from(unit, params.head_dim);
    }
    for (int v = 0; v < kBlockVectors; ++v) {
      const Float x = load(key + v * kLanes);
      if (fresh)
        Rule::start(x, running.first[v], running.second[v]);
      else
        Rule::fold(x, running.first[v], running.second[v]);
    }
    expected = slot + 1;
    --left;
  }
  flush();
}

template <class T>
void fold_as(const SummarizeParams& params, int64_t head, int64_t dim) {
  if (params.bound == Bound::kMinMax)
    fold_dims<T, MinMax>(params, head, dim);
  else
    fold_dims<T, Moments>(params, head, dim);
}

inline void summarize_dims(const SummarizeParams& params, int64_t head, int64_t dim) {
  switch (params.dtype) {
    case DType::kBFloat16:
      return fold_as<bf16>(params, head, dim);
    case DType::kHalf:
      return fold_as<fp16>(params, head, dim);
    case DType::kFloat:
      return fold_as<float>(params, head, dim);
  }
}

}  // namespace sparseserve::cpu::SPARSESERVE_ISA
