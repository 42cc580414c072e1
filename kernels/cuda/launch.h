// From run-time shapes to a kernel on the current stream.
#pragma once

#include <ptx.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace sparseserve::cuda {

// Provided by the bindings: torch's current stream of the current device.
cudaStream_t current_stream();

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, int64_t shared_bytes, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int64_t kDefaultShared = 48 << 10;
  if (shared_bytes > kDefaultShared)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "shared memory");
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = current_stream();
  check(cudaLaunchKernelEx(&config, kernel, args...), "launch");
}

// Calls f.template operator()<T, D>() for the dtype and head size of a query.
template <class F>
void for_type(DType dtype, int64_t head_dim, F f) {
  const auto with_dim = [&]<class T>() {
    switch (head_dim) {
      case 64:
        return f.template operator()<T, 64>();
      case 96:
        return f.template operator()<T, 96>();
      case 128:
        return f.template operator()<T, 128>();
      case 256:
        return f.template operator()<T, 256>();
      default:
        throw std::invalid_argument("head_dim must be 64, 96, 128 or 256 on CUDA, not " + std::to_string(head_dim));
    }
  };
  switch (dtype) {
    case DType::kBFloat16:
      return with_dim.template operator()<__nv_bfloat16>();
    case DType::kHalf:
      return with_dim.template operator()<__half>();
    default:
      throw std::invalid_argument("query must be bfloat16 or float16 on CUDA");
  }
}

}  // namespace sparseserve::cuda
