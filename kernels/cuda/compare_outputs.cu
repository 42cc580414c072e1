// What sparse attention loses against dense attention: a block for each row, a warp for each query head.
#include <algorithm>

#include "fragments.h"
#include "launch.h"

namespace sparseserve::cuda {

namespace {

constexpr int kMostWarps = 16;

// The same in every lane.
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// |sparse - dense| / |dense| of one head.
template <class T>
__device__ __forceinline__ float relative_error(const CompareParams& p, int64_t row, int head, int lane) {
  const T* sparse = static_cast<const T*>(p.sparse.data) + p.sparse.offset(row, head);
  const T* dense = static_cast<const T*>(p.dense.data) + p.dense.offset(row, head);
  float apart = 0.f, size = 0.f;
  for (int d = lane; d < static_cast<int>(p.head_dim); d += 32) {
    const float exact = Numbers<T>::widen(dense[d]), error = Numbers<T>::widen(sparse[d]) - exact;
    apart += error * error;
    size += exact * exact;
  }
  apart = sum_of_lanes(apart);
  size = sum_of_lanes(size);
  return apart == 0.f ? 0.f : sqrtf(apart / size);
}

template <class T>
__global__ void __launch_bounds__(32 * kMostWarps, 2) compare_kernel(const __grid_constant__ CompareParams p) {
  SPARSESERVE_DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // recall and error of every warp
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int heads = static_cast<int>(p.heads);
  float recall = 0.f, error = 0.f;
  for (int head = warp; head < heads; head += warps) {
    const float dense = p.dense.lse[row * heads + head];
    const bool nothing = dense == -INFINITY;
    recall += nothing ? NAN : expf(p.sparse.lse[row * heads + head] - dense);
    error += nothing ? NAN : relative_error<T>(p, row, head, lane);
  }
  if (lane == 0) sums[2 * warp] = recall, sums[2 * warp + 1] = error;
  __syncthreads();
  if (threadIdx.x < 2) {
    float sum = 0.f;
    for (int i = 0; i < warps; ++i) sum += sums[2 * i + threadIdx.x];
    (threadIdx.x == 0 ? p.recall : p.error)[row] = sum / static_cast<float>(heads);
  }
  if (p.floor == 0.f) return;
  __syncthreads();
  if (!p.loses(row)) return;
  for (int head = warp; head < heads; head += warps) {
    T* to = static_cast<T*>(p.to) + p.sparse.offset(row, head);
    const T* from = static_cast<const T*>(p.dense.data) + p.dense.offset(row, head);
    for (int d = lane; d < static_cast<int>(p.head_dim); d += 32) to[d] = from[d];
  }
}

}  // namespace

void compare_outputs(const CompareParams& params) {
  if (params.dtype == DType::kFloat) throw std::invalid_argument("out must be bfloat16 or float16 on CUDA");
  const int warps = static_cast<int>(std::min<int64_t>(params.heads, kMostWarps));
  const auto kernel = params.dtype == DType::kHalf ? compare_kernel<__half> : compare_kernel<__nv_bfloat16>;
  launch(kernel, dim3(params.rows), 32 * warps, 2 * warps * static_cast<int64_t>(sizeof(float)), params);
}

}  // namespace sparseserve::cuda
