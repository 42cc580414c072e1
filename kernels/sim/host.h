// The part of the CUDA runtime that host code uses.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "device/vectors.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();

namespace sparseserve::sim {

// Runs run(call) in every thread of the grid, and throws std::runtime_error when a check fails.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(const void*), const void* call);
cudaError_t set_max_dynamic_shared(const void* kernel, int bytes);

}  // namespace sparseserve::sim

// Returns when the kernel is done.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters{std::forward<Arguments>(arguments)...};
  const auto call = [&] { std::apply(kernel, parameters); };
  const auto run = [](const void* opaque) { (*static_cast<decltype(&call)>(opaque))(); };
  return sparseserve::sim::launch(*config, reinterpret_cast<const void*>(kernel), run, &call);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return sparseserve::sim::set_max_dynamic_shared(reinterpret_cast<const void*>(kernel), value);
}
