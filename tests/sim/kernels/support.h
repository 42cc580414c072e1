// What the test programs share.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <stdexcept>
#include <utility>
#include <vector>

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// One line: the name, then the values.
template <class Values>
void print(const char* name, const Values& values) {
  std::printf("%s", name);
  for (const auto value : values) std::printf(" %.17g", static_cast<double>(value));
  std::printf("\n");
}
