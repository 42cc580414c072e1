// What the host sees: errors of launches, reports of one block among many, the order that it chose.
#include <ptx.h>

#include "support.h"

extern "C" bool sparseserve_sim_use_order(const char* name);

namespace {

__global__ void first_to_come(int* first) {
  SPARSESERVE_DYNAMIC_SHARED(unused);
  unused[0] = 0;
  atomicCAS(first, 0, static_cast<int>(threadIdx.x + 1));
}

__global__ void one_bad_block(int* done) {
  if (blockIdx.x == 17 && threadIdx.x > 3) return;
  if (blockIdx.x == 17 && threadIdx.x == 3) {
    __syncwarp(0xff);
  } else {
    __syncthreads();
  }
  atomicAdd(done, 1);
}

void report(const char* name, dim3 blocks, dim3 threads, int shared) {
  int first = 0;
  try {
    launch(first_to_come, blocks, threads, static_cast<size_t>(shared), &first);
    std::printf("%s: %d\n", name, first);
  } catch (const std::runtime_error& error) {
    const cudaError_t last = cudaGetLastError();
    std::printf("%s: %s, then %s\n", name, cudaGetErrorString(last), cudaGetErrorString(cudaGetLastError()));
  }
}

}  // namespace

int main() {
  constexpr int kAllowed = 48 << 10;
  report("allowed", 1, 1024, kAllowed);
  report("too much shared memory", 1, 32, kAllowed + 1);
  cudaFuncSetAttribute(first_to_come, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10);
  report("as much as asked for", 1, 32, 227 << 10);
  report("too many threads", 1, dim3(32, 33), 0);
  report("no blocks", 0, 32, 0);
  report("too many blocks", dim3(1, 65536), 32, 0);

  for (const char* order : {"backward", "forward", "sideways"}) {
    std::printf("%s known: %d\n", order, sparseserve_sim_use_order(order));
    report(order, 1, 100, 1);
  }

  for (int i = 0; i < 3; ++i) {
    int done = 0;
    try {
      launch(one_bad_block, 1000, 32, 0, &done);
    } catch (const std::runtime_error& error) {
      std::printf("bad block: %s\n", error.what());
    }
    launch(one_bad_block, 17, 32, 0, &(done = 0));
    std::printf("good blocks: %d\n", done);
  }
}
