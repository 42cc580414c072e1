// Indices, barriers, atomics and shared memory over a grid.
#include <ptx.h>

#include "support.h"

namespace {

__global__ void indices(int* out) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1000 * block + thread;
}

__global__ void barriers(int* out) {
  const int thread = threadIdx.x;
  if (thread >= 90) return;  // nobody waits for those who are gone
  out[thread] = __syncthreads_count(thread % 3 == 0);
  out[100 + thread] = __syncthreads_or(thread == 89);
  out[200 + thread] = __syncthreads_or(thread == 90);
  out[300 + thread] = __syncthreads_and(thread < 90);
  out[400 + thread] = __syncthreads_and(thread < 89);
}

__global__ void atomics(int* counts, unsigned* bits, float* sum, unsigned long long* wide) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&counts[0], 2);
  atomicMax(&counts[1], i);
  atomicMin(&counts[2], -i);
  if (atomicCAS(&counts[3], 0, i + 1) == 0) atomicAdd(&counts[4], 1);
  if (i == 7) atomicExch(&counts[5], 70);
  atomicOr(bits, 1u << i % 32);
  atomicAdd(sum, 0.5f);
  atomicAdd(wide, 1ull << 33);
}

// Whichever block is the last adds up what all of them left.
__global__ void last_block(int* parts, unsigned* done, int* total) {
  SPARSESERVE_SHARED(bool, last);
  SPARSESERVE_SHARED(int, sums, [2][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sums[warp][lane] = __reduce_add_sync(0xffffffff, static_cast<int>(threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sums[0][5] + sums[1][9];
    __threadfence();
    last = atomicAdd(done, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  for (unsigned b = 0; b < gridDim.x; ++b) *total += parts[b];
}

}  // namespace

int main() {
  std::vector<int> out(3 * 2 * 2 * 60);
  launch(indices, dim3(3, 2, 2), dim3(5, 4, 3), 0, out.data());
  print("indices", out);

  std::vector<int> votes(500);
  launch(barriers, 1, 100, 0, votes.data());
  print("barriers", votes);

  std::vector<int> counts(6);
  unsigned bits = 0;
  float sum = 0;
  unsigned long long wide = 0;
  launch(atomics, 40, 48, 0, counts.data(), &bits, &sum, &wide);
  print("counts", counts);
  print("others", std::vector<double>{double(bits), sum, double(wide)});

  std::vector<int> parts(300);
  unsigned done = 0;
  std::vector<int> total(1);
  launch(last_block, 300, 64, 0, parts.data(), &done, total.data());
  print("total", total);
}
