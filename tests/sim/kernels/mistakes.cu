// Kernels with one mistake each, and the same kernels without it.
#include <ptx.h>

#include <cstring>
#include <string>

#include "support.h"

namespace {

using namespace sparseserve::cuda;

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffff;

template <bool kRight>
__global__ void no_barrier(float* x) {
  SPARSESERVE_SHARED(float, kept, [kThreads]);
  kept[threadIdx.x] = x[threadIdx.x];
  if (kRight) __syncthreads();
  x[threadIdx.x] = kept[kThreads - 1 - threadIdx.x];
}

template <bool kRight>
__global__ void no_second_barrier(float* x) {
  SPARSESERVE_SHARED(float, kept, [kThreads]);
  float value = x[threadIdx.x];
  for (int round = 0; round < 2; ++round) {
    kept[threadIdx.x] = value;
    __syncthreads();
    value = kept[(threadIdx.x + 1) % kThreads];
    if (kRight) __syncthreads();
  }
  x[threadIdx.x] = value;
}

template <bool kRight>
__global__ void no_warp_barrier(float* x) {
  SPARSESERVE_SHARED(float, kept, [kThreads]);
  kept[threadIdx.x] = x[threadIdx.x];
  if (kRight) __syncwarp();
  x[threadIdx.x] = kept[threadIdx.x ^ 31];
}

template <bool kRight>
__global__ void no_wait(float* x) {
  SPARSESERVE_DYNAMIC_SHARED(bytes);
  auto* kept = reinterpret_cast<float*>(bytes);
  if (threadIdx.x < kThreads / 4) copy_async16(kept + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
  commit_copies();
  if (kRight) wait_copies<0>();
  __syncthreads();
  x[threadIdx.x] = kept[kThreads - 1 - threadIdx.x];
}

// Two stages under way; the one that is read must have arrived.
template <bool kRight>
__global__ void short_wait(float* x) {
  SPARSESERVE_SHARED(float4, kept, [2]);
  float value = 0;
  for (int i = 0; i < 2; ++i) {
    copy_async16(&kept[i], x + 4 * i, true);
    commit_copies();
  }
  wait_copies<kRight ? 1 : 2>();
  value += kept[0].y;
  wait_copies<0>();
  value += kept[1].y;
  __syncthreads();
  x[threadIdx.x] = value;
}

template <bool kRight>
__global__ void uninitialised(float* x) {
  SPARSESERVE_SHARED(float, sum);
  if (kRight && threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, 1);
  __syncthreads();
  x[threadIdx.x] = sum;
}

template <bool kRight>
__global__ void uninitialised_dynamic(float* x) {
  SPARSESERVE_DYNAMIC_SHARED(bytes);
  auto* kept = reinterpret_cast<float*>(bytes);
  if (kRight || threadIdx.x != 5) kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = kept[threadIdx.x ^ 1];
}

template <bool kRight>
__global__ void divergent_barrier(float* x) {
  if (kRight || threadIdx.x < 40) {
    __syncthreads();
    x[threadIdx.x] += 1;
  } else {
    x[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], 1);
  }
}

template <bool kRight>
__global__ void two_barriers(float* x) {
  x[threadIdx.x] += 1;
  if (kRight || threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

template <bool kRight>
__global__ void different_operations(float* x) {
  const float value = x[threadIdx.x];
  if (kRight || threadIdx.x % 32 < 16) {
    x[threadIdx.x] = __shfl_xor_sync(kAll, value, 1);
  } else {
    x[threadIdx.x] = __ballot_sync(kAll, value > 0);
  }
}

template <bool kRight>
__global__ void different_masks(float* x) {
  const unsigned mask = kRight || threadIdx.x % 32 < 16 ? kAll : 0xffffff00;
  x[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);
}

template <bool kRight>
__global__ void outside_mask(float* x) {
  x[threadIdx.x] = __shfl_xor_sync(kRight ? kAll : 0xffff, x[threadIdx.x], 1);
}

template <bool kRight>
__global__ void absent_lane(float* x) {
  if (!kRight && threadIdx.x == 9) return;
  x[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], 1);
}

template <bool kRight>
__global__ void exited_lanes(float* x) {
  if (!kRight && threadIdx.x >= 60) return;
  float c[4] = {x[threadIdx.x]};
  mma<__half>(c, {0, 0, 0, 0}, {0, 0});
  x[threadIdx.x] = c[0];
}

template <bool kRight>
__global__ void misaligned(float* x) {
  x[threadIdx.x] = __uint_as_float(load_stream16(x + (kRight ? 0 : 1)).x);
}

// An array of floats need not begin at a multiple of 16.
template <bool kRight>
__global__ void misaligned_copy(float* x) {
  SPARSESERVE_SHARED(float, floats, [4]);
  SPARSESERVE_SHARED(float4, four);
  copy_async16(kRight ? static_cast<void*>(&four) : floats, x, true);
}

template <bool kRight>
__global__ void copy_elsewhere(float* x) {
  SPARSESERVE_SHARED(float4, kept, [kThreads]);
  copy_async16(kRight ? &kept[threadIdx.x] : static_cast<void*>(x), x, true);
}

template <bool kRight>
__global__ void out_of_bounds(float* x) {
  x[threadIdx.x + (kRight ? 0 : 1)] = 0;
}

template <bool kRight>
__global__ void out_of_shared(float* x) {
  SPARSESERVE_SHARED(float, first, [kThreads]);
  SPARSESERVE_SHARED(float, second, [kThreads]);
  second[threadIdx.x] = 0;
  *(first + threadIdx.x + (kRight ? 0 : 1)) = 0;
  x[threadIdx.x] = second[threadIdx.x];
}

template <bool kRight>
__global__ void out_of_dynamic_shared(float* x) {
  SPARSESERVE_DYNAMIC_SHARED(bytes);
  bytes[4 * kThreads - 1 + (kRight ? 0 : 1)] = 0;
  x[threadIdx.x] = 0;
}

#define BOTH(kernel) {#kernel, kernel<false>, kernel<true>}

const struct {
  const char* name;
  void (*wrong)(float*);
  void (*right)(float*);
} kKernels[] = {
    BOTH(no_barrier), BOTH(no_second_barrier), BOTH(no_warp_barrier), BOTH(no_wait), BOTH(short_wait),
    BOTH(uninitialised), BOTH(uninitialised_dynamic), BOTH(divergent_barrier), BOTH(two_barriers),
    BOTH(different_operations), BOTH(different_masks), BOTH(outside_mask), BOTH(absent_lane), BOTH(exited_lanes),
    BOTH(misaligned), BOTH(misaligned_copy), BOTH(copy_elsewhere), BOTH(out_of_bounds), BOTH(out_of_shared),
    BOTH(out_of_dynamic_shared),
};

void run(const char* name, const char* version) {
  for (const auto& kernel : kKernels) {
    if (std::strcmp(kernel.name, name) != 0) continue;
    std::vector<float> x(kThreads);
    for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i);
    try {
      launch(std::strcmp(version, "wrong") == 0 ? kernel.wrong : kernel.right, 1, kThreads, 4 * kThreads, x.data());
      print(name, x);
    } catch (const std::runtime_error& error) {
      std::printf("%s error %s\n", name, error.what());
    }
  }
}

}  // namespace

// Pairs of a kernel's name and "wrong" or "right".
int main(int count, char** arguments) {
  for (int i = 1; i + 1 < count; i += 2) run(arguments[i], arguments[i + 1]);
}
