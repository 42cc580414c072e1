// Blocks that share the work on a row, through counters in the scratch: the last one to finish sees what all have left.
#pragma once

#include <cuda_runtime.h>

#include "sparseserve/params.h"

namespace sparseserve::cuda {

// Where the blocks of a row and query head meet.
__device__ __forceinline__ Counters* counters_of(void* scratch, const Query& query, int64_t row, int head) {
  return reinterpret_cast<Counters*>(static_cast<float*>(scratch) +
                                     scratch_words(1, 1, query.head_dim) * (row * query.heads + head));
}

// Whether all other `blocks` have been here; then it leaves the counter at zero, and what they wrote can be read.
// `flag` is shared memory, free on both sides of the call.
__device__ __forceinline__ bool is_last(int32_t* counter, int blocks, int* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1) == blocks - 1;
  __syncthreads();
  const bool is = *flag;
  __syncthreads();
  if (!is) return false;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;  // for the next launch
  return true;
}

}  // namespace sparseserve::cuda
