// Folds over the tokens of a unit: sixteen lanes, then their tree, as in the CPU kernels, so the bits are the same.
#pragma once

#include <cuda_runtime.h>

namespace sparseserve::cuda {

constexpr int kSums = 16;

struct Less {
  __device__ __forceinline__ float operator()(float a, float b) const { return b < a ? b : a; }
};
struct More {
  __device__ __forceinline__ float operator()(float a, float b) const { return a < b ? b : a; }
};
struct Plus {
  __device__ __forceinline__ float operator()(float a, float b) const { return __fadd_rn(a, b); }
};

template <class Fold>
__device__ __forceinline__ float fold_sums(float (&x)[kSums], Fold fold) {
#pragma unroll
  for (int half = kSums / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i)
      if (i < half) x[i] = fold(x[i], x[i + half]);
  return x[0];
}

}  // namespace sparseserve::cuda
