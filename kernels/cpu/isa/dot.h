// One 32-token tile: scores = K q for N query heads, and acc = acc * rescale + p V. Two ways: through fp32, and with
// AVX512_BF16's dot products of pairs.
#pragma once

#include "../isa.h"
#include "simd.h"

namespace sparseserve::cpu::SPARSESERVE_ISA {

constexpr int kVectors = kTileTokens / kLanes;
// Query heads whose score accumulators fit the registers.
constexpr int kMaxHeads = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;

// The tokens of a tile that take part, ascending.
struct Tokens {
  int count = 0;
  uint8_t index[kTileTokens + 1];

  explicit Tokens(uint32_t mask) {
    for (; mask; mask &= mask - 1) index[count++] = static_cast<uint8_t>(__builtin_ctz(mask));
    index[count] = index[count - 1];  // partner of an odd last token, with p = 0
  }
};

// Where the next tile lies: touched a little with every step of this one, so that memory never rests. Fetched into L2:
// the K rows of a tile lie a page's width apart and would evict each other from a few sets of L1.
struct Fetch {
  const char* key = nullptr;
  int64_t key_stride = 0;       // bytes
  const char* value = nullptr;  // null unless the whole tile takes part

  template <class T>
  SPARSESERVE_INLINE void dim(int64_t d) const {
    constexpr int64_t kBytes = kTileTokens * sizeof(T);  // of one dim of K, and on average of V
    if (key)
      for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(key + d * key_stride + i, 0, 2);
    if (value)
      for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(value + d * kBytes + i, 0, 2);
  }
};

template <class T>
struct FloatDot {
  using Scalar = T;

  SPARSESERVE_INLINE static void pack(const HeadGroup& group, int64_t dims, float* queries) {
    for (int64_t g = 0; g < group.heads; ++g) {
      const T* q = reinterpret_cast<const T*>(group.query) + g * group.query_stride;
      for (int64_t d = 0; d < dims; d += kLanes) store(queries + g * dims + d, load(q + d));
    }
  }

  template <int N>
  SPARSESERVE_INLINE static void scores(const float* queries, int64_t dims, const T* key, int64_t key_stride,
                                        const Fetch& fetch, Float (&s)[N][kVectors]) {
    for (auto& row : s)
      for (Float& x : row) x = Float{};
    for (int64_t d = 0; d < dims; ++d, key += key_stride) {
      fetch.dim<T>(d);
      for (int j = 0; j < kVectors; ++j) {
        const Float k = load(key + j * kLanes);
        for (int n = 0; n < N; ++n) s[n][j] = fma(splat(queries[n * dims + d]), k, s[n][j]);
      }
    }
  }

  SPARSESERVE_INLINE static void store_weights(float* weights, const Float (&p)[kVectors], const Tokens& tokens,
                                               uint32_t) {
    float all[kTileTokens];
    for (int j = 0; j < kVectors; ++j) store(all + j * kLanes, p[j]);
    for (int i = 0; i < tokens.count; ++i) weights[i] = all[tokens.index[i]];
  }

  template <int N, int V>
  SPARSESERVE_INLINE static void accumulate_dims(const float* weights, const float* rescale, const T* value,
                                                 const Tokens& tokens, int64_t dims, float* acc) {
    Float o[N][V];
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < V; ++v) o[n][v] = load(acc + n * dims + v * kLanes) * rescale[n];
    for (int i = 0; i < tokens.count; ++i) {
      const T* row = value + tokens.index[i] * dims;
      for (int v = 0; v < V; ++v) {
        const Float x = load(row + v * kLanes);
        for (int n = 0; n < N; ++n) o[n][v] = fma(splat(weights[n * kTileTokens + i]), x, o[n][v]);
      }
    }
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < V; ++v) store(acc + n * dims + v * kLanes, o[n][v]);
  }

  template <int N>
  SPARSESERVE_INLINE static void accumulate(const float* weights, const float* rescale, const T* value,
                                            const Tokens& tokens, int64_t dims, float* acc) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= dims; d += 4 * kLanes)
      accumulate_dims<N, 4>(weights, rescale, value + d, tokens, dims, acc + d);
    for (; d < dims; d += kLanes) accumulate_dims<N, 1>(weights, rescale, value + d, tokens, dims, acc + d);
  }
};

#if defined(__AVX512BF16__)
struct PairDot {
  using Scalar = bf16;

  // Rows a and b, 32 wide, as 32 pairs (a[i], b[i]).
  struct Pairs {
    __m512bh low, high;

    SPARSESERVE_INLINE Pairs(__m512i a, __m512i b) {
      low = (__m512bh)_mm512_permutex2var_epi16(a, order(0), b);
      high = (__m512bh)_mm512_permutex2var_epi16(a, order(16), b);
    }

    SPARSESERVE_INLINE static __m512i order(int first) {
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i i = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
      return _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(32)), 16));
    }
  };

  SPARSESERVE_INLINE static __m512bh broadcast(const float* pair) {
    return (__m512bh)_mm512_set1_epi32(bit_cast<int32_t>(*pair));
  }

  SPARSESERVE_INLINE static void pack(const HeadGroup& group, int64_t dims, float* queries) {
    for (int64_t g = 0; g < group.heads; ++g)
      std::memcpy(queries + g * dims, reinterpret_cast<const bf16*>(group.query) + g * group.query_stride,
                  dims * sizeof(bf16));
  }

  template <int N>
  SPARSESERVE_INLINE static void scores(const float* queries, int64_t dims, const bf16* key, int64_t key_stride,
                                        const Fetch& fetch, Float (&s)[N][kVectors]) {
    for (auto& row : s) row[0] = row[1] = Float{};
    for (int64_t d = 0; d < dims; d += 2, key += 2 * key_stride) {
      fetch.dim<bf16>(d);
      fetch.dim<bf16>(d + 1);
      const Pairs k(_mm512_loadu_si512(key), _mm512_loadu_si512(key + key_stride));
      for (int n = 0; n < N; ++n) {
        const __m512bh q = broadcast(queries + n * dims + d / 2);
        s[n][0] = _mm512_dpbf16_ps(s[n][0], k.low, q);
        s[n][1] = _mm512_dpbf16_ps(s[n][1], k.high, q);
      }
    }
  }

  SPARSESERVE_INLINE static void store_weights(float* weights, const Float (&p)[kVectors], const Tokens&,
                                               uint32_t mask) {
    alignas(64) float packed[kTileTokens] = {};
    const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    store(packed, _mm512_maskz_compress_ps(low, p[0]));
    store(packed + __builtin_popcount(low), _mm512_maskz_compress_ps(high, p[1]));
    const __m512bh pairs = _mm512_cvtne2ps_pbh(load(packed + 16), load(packed));
    std::memcpy(weights, &pairs, sizeof pairs);
  }

  template <int N, int V>
  SPARSESERVE_INLINE static void accumulate_dims(const float* weights, const float* rescale, const bf16* value,
                                                 const Tokens& tokens, int64_t dims, float* acc) {
    Float o[N][V];
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < V; ++v) o[n][v] = load(acc + n * dims + v * kLanes) * rescale[n];
    for (int i = 0; i < tokens.count; i += 2) {
      const bf16* a = value + tokens.index[i] * dims;
      const bf16* b = value + tokens.index[i + 1] * dims;
      for (int v = 0; v < V; v += 2) {
        const Pairs x(row<V>(a + v * kLanes), row<V>(b + v * kLanes));
        for (int n = 0; n < N; ++n) {
          const __m512bh p = broadcast(weights + n * kTileTokens + i / 2);
          o[n][v] = _mm512_dpbf16_ps(o[n][v], x.low, p);
          if constexpr (V > 1) o[n][v + 1] = _mm512_dpbf16_ps(o[n][v + 1], x.high, p);
        }
      }
    }
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < V; ++v) store(acc + n * dims + v * kLanes, o[n][v]);
  }

  // 32 dims, or the last 16.
  template <int V>
  SPARSESERVE_INLINE static __m512i row(const bf16* p) {
    if constexpr (V > 1) return _mm512_loadu_si512(p);
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  template <int N>
  SPARSESERVE_INLINE static void accumulate(const float* weights, const float* rescale, const bf16* value,
                                            const Tokens& tokens, int64_t dims, float* acc) {
    int64_t d = 0;
    for (; d + 64 <= dims; d += 64) accumulate_dims<N, 4>(weights, rescale, value + d, tokens, dims, acc + d);
    for (; d + 32 <= dims; d += 32) accumulate_dims<N, 2>(weights, rescale, value + d, tokens, dims, acc + d);
    if (d < dims) accumulate_dims<N, 1>(weights, rescale, value + d, tokens, dims, acc + d);
  }
};
#endif

// Calls function.template operator()<N>(first head) for blocks of 4, 2 and 1 heads.
template <class Function>
SPARSESERVE_INLINE void for_each_block(int64_t heads, const Function& function) {
  int64_t g = 0;
  if constexpr (kMaxHeads >= 4)
    for (; g + 4 <= heads; g += 4) function.template operator()<4>(g);
  if constexpr (kMaxHeads >= 2)
    for (; g + 2 <= heads; g += 2) function.template operator()<2>(g);
  for (; g < heads; ++g) function.template operator()<1>(g);
}

// Calls function with the way to multiply `dtype` on this instruction set.
template <class Function>
SPARSESERVE_INLINE void with_dot(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kBFloat16:
#if defined(__AVX512BF16__)
      return function(PairDot{});
#else
      return function(FloatDot<bf16>{});
#endif
    case DType::kHalf:
      return function(FloatDot<fp16>{});
    case DType::kFloat:
      return function(FloatDot<float>{});
  }
}

}  // namespace sparseserve::cpu::SPARSESERVE_ISA
