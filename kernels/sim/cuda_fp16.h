// CUDA's fp16: IEEE binary16.
#pragma once

#include "cuda_runtime.h"

struct __half;
inline float __half2float(__half x);
inline __half __float2half(float x);

struct __half {
  unsigned short bits;

  __half() = default;
  __half(float x) { *this = __float2half(x); }
  operator float() const { return __half2float(*this); }
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}

inline float __half2float(__half x) {
  const unsigned magnitude = (x.bits & 0x7fffu) << 13;
  const unsigned value = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);  // the difference of the exponents
  const unsigned special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;              // infinity and NaN
  return __uint_as_float(value | special | (x.bits & 0x8000u) << 16);
}

// To the nearest, of two equally near to the even one.
inline __half __float2half(float x) {
  constexpr unsigned kNormal = 0x38800000;    // 2^-14
  constexpr unsigned kInfinity = 0x47800000;  // 2^16
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  unsigned rounded;
  if (x != x) {
    return __ushort_as_half(0x7fff);
  } else if (magnitude >= kInfinity) {
    rounded = 0x7c00;
  } else if (magnitude < kNormal) {
    rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);  // the add rounds to 2^-24
  } else {
    rounded = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return __ushort_as_half(static_cast<unsigned short>(sign | rounded));
}

inline __half __float2half_rn(float x) { return __float2half(x); }

inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline float2 __half22float2(__half2 v) { return {__low2float(v), __high2float(v)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
