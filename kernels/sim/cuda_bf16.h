// CUDA's bf16: a float without its lower 16 bits.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16;
inline float __bfloat162float(__nv_bfloat16 x);
inline __nv_bfloat16 __float2bfloat16(float x);

struct __nv_bfloat16 {
  unsigned short bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float x) { *this = __float2bfloat16(x); }
  operator float() const { return __bfloat162float(*this); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 x;
  x.bits = bits;
  return x;
}

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

// To the nearest, of two equally near to the even one.
inline __nv_bfloat16 __float2bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  const unsigned rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fff0000;
  return __ushort_as_bfloat16(static_cast<unsigned short>(rounded >> 16));
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }

inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__low2float(v), __high2float(v)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
