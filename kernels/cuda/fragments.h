// What a warp holds of queries and keys: S^T = K Q^T with m16n8k16, the query heads of a group on the 8-wide side.
//
// Lane l = 4 g + t holds rows g and g + 8 of a tile of 16 keys and query head g. The order of the summation is free, so
// each lane takes 16 contiguous bytes: dims 32 c + 8 t and on of chunk c, in keys and queries alike.
#pragma once

#include <ptx.h>

#include "sparseserve/params.h"

namespace sparseserve::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileTokens = 16;
constexpr float kLog2E = 1.4426950408889634f;
constexpr unsigned kAllLanes = ~0u;

template <class T>
struct Numbers;

template <>
struct Numbers<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 round(float x) { return __float2bfloat16(x); }
  static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct Numbers<__half> {
  static __device__ __forceinline__ __half round(float x) { return __float2half(x); }
  static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// D dims, from `dim` on, of 8 * NT query heads, zeros where there are fewer.
template <class T, int D, int NT>
struct Queries {
  uint4 part[NT][D / 32];

  __device__ __forceinline__ void load(const Query& query, int row, int first, int count, int lane, int dim = 0) {
    const int g = lane / 4, t = lane % 4;
    const T* heads = static_cast<const T*>(query.data) + row * query.row_stride + first * query.head_stride + dim;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < D / 32; ++c) {
        const int head = 8 * n + g;
        part[n][c] = make_uint4(0, 0, 0, 0);
        if (head < count)
          part[n][c] = *reinterpret_cast<const uint4*>(heads + head * query.head_stride + 32 * c + 8 * t);
      }
  }
};

// Rows g and g + 8 of a tile of keys.
template <class T, int D>
struct Keys {
  uint4 low[D / 32], high[D / 32];

  __device__ __forceinline__ void load(const T* row, const T* row8, int t) {
#pragma unroll
    for (int c = 0; c < D / 32; ++c) {
      low[c] = load_stream16(row + 32 * c + 8 * t);
      high[c] = load_stream16(row8 + 32 * c + 8 * t);
    }
  }
};

// s[n][j] += key . query of token g + 8 (j / 2) and query head 8 n + 2 t + j % 2.
template <class T, int D, int NT>
__device__ __forceinline__ void dot(const Keys<T, D>& keys, const Queries<T, D, NT>& queries, float (&s)[NT][4]) {
#pragma unroll
  for (int c = 0; c < D / 32; ++c) {
    const uint4 a = keys.low[c], b = keys.high[c];
    const uint32_t front[4] = {a.x, b.x, a.y, b.y}, back[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint4 q = queries.part[n][c];
      mma<T>(s[n], front, {q.x, q.y});
      mma<T>(s[n], back, {q.z, q.w});
    }
  }
}

// The largest, or the sum, over the four lanes of a token.
__device__ __forceinline__ float max_of_heads(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float sum_of_heads(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Over the eight rows g of a tile.
__device__ __forceinline__ float max_of_rows(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ __forceinline__ float sum_of_rows(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

}  // namespace sparseserve::cuda
