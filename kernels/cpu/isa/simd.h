// Vectors of fp32 as wide as the target, in GCC vector extensions: one source for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sparseserve::cpu::SPARSESERVE_ISA {

#define SPARSESERVE_INLINE [[gnu::always_inline]] inline

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Float __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Short __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class To, class From>
SPARSESERVE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

SPARSESERVE_INLINE Float splat(float x) { return x - Float{}; }

SPARSESERVE_INLINE Float load(const float* p) {
  Float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

SPARSESERVE_INLINE Float load(const bf16* p) {
  Short bits;
  std::memcpy(&bits, p, sizeof bits);
  return bit_cast<Float>(__builtin_convertvector(bits, Int) << 16);
}

SPARSESERVE_INLINE Float load(const fp16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Short bits;
  std::memcpy(&bits, p, sizeof bits);
  const Int x = __builtin_convertvector(bits, Int);
  const Int exponent = x & 0x7c00;
  // 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal.
  const Int finite = bit_cast<Int>(bit_cast<Float>((x & 0x7fff) << 13) * 0x1p112f);
  const Int special = ((x & 0x7fff) << 13) | 0x7f800000;
  return bit_cast<Float>((exponent == 0x7c00 ? special : finite) | (x & 0x8000) << 16);
#endif
}

SPARSESERVE_INLINE void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }

SPARSESERVE_INLINE void store_scalar(float* p, float x) { *p = x; }

SPARSESERVE_INLINE void store_scalar(bf16* p, float x) {
  const auto bits = bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  p->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Round to nearest even, as F16C does.
SPARSESERVE_INLINE void store_scalar(fp16* p, float x) {
  const auto bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x47800000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 lets the FPU round at 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

// a * b + c, rounded once where the hardware can. Nothing else is contracted: -ffp-contract=off.
SPARSESERVE_INLINE Float fma(Float a, Float b, Float c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

SPARSESERVE_INLINE Float maximum(Float a, Float b) { return a < b ? b : a; }
SPARSESERVE_INLINE Float minimum(Float a, Float b) { return b < a ? b : a; }
SPARSESERVE_INLINE Float absolute(Float x) { return bit_cast<Float>(bit_cast<Int>(x) & 0x7fffffff); }

// Folds the lanes in halves, the same tree in every call.
template <class Fold>
SPARSESERVE_INLINE float reduce(Float x, Fold fold) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = fold(lanes[i], lanes[i + half]);
  return lanes[0];
}

SPARSESERVE_INLINE float reduce_max(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  return reduce(x, [](float a, float b) { return a < b ? b : a; });
#endif
}

SPARSESERVE_INLINE float reduce_add(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  return reduce(x, [](float a, float b) { return a + b; });
#endif
}

// Lanes whose bit is set keep x, the others become `other`.
SPARSESERVE_INLINE Float keep(Float x, uint32_t bits, Float other) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(other, static_cast<__mmask16>(bits), x);
#else
  Int lane_bit;
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1 << i;
  return (lane_bit & static_cast<int32_t>(bits)) != 0 ? x : other;
#endif
}

// 2^x with a relative error below 3e-7 for |x| < 126 and saturation outside; NaN stays NaN. Polynomial: Cephes exp2f.
SPARSESERVE_INLINE Float exp2(Float x) {
  x = x < splat(-126.f) ? splat(-126.f) : x;
  x = x > splat(126.f) ? splat(126.f) : x;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Float n = (x + kRound) - kRound, f = x - n;
  Float y = splat(1.535336188319500e-4f);
  for (const float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f,
                        6.931472028550421e-1f, 1.f})
    y = fma(y, f, splat(c));
  return y * bit_cast<Float>((__builtin_convertvector(n, Int) + 127) << 23);
}

}  // namespace sparseserve::cpu::SPARSESERVE_ISA
