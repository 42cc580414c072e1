// What differs between the libraries that ops.cpp is compiled into: the CPU's, CUDA's, and the simulator's, which runs
// the CUDA kernels on CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#if defined(SPARSESERVE_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif

#include "kernels.h"

#if defined(SPARSESERVE_CUDA)
#define SPARSESERVE_LIBRARY sparseserve
#define SPARSESERVE_DISPATCH_KEY CUDA
namespace kernels = sparseserve::cuda;
#elif defined(SPARSESERVE_SIMULATOR)
#define SPARSESERVE_LIBRARY sparseserve_simulator
#define SPARSESERVE_DISPATCH_KEY CPU
namespace kernels = sparseserve::cuda;
#else
#define SPARSESERVE_LIBRARY sparseserve
#define SPARSESERVE_DISPATCH_KEY CPU
namespace kernels = sparseserve::cpu;
#endif

namespace sparseserve {

#if defined(SPARSESERVE_CUDA)
constexpr const char* kDevice = "CUDA";
inline bool on_device(const torch::stable::Tensor& x) { return x.is_cuda(); }
// The kernels run on the device and the current stream of this tensor.
struct DeviceOf : torch::stable::accelerator::DeviceGuard {
  explicit DeviceOf(const torch::stable::Tensor& x) : DeviceGuard(x.get_device_index()) {}
};
#else
constexpr const char* kDevice = "CPU";
inline bool on_device(const torch::stable::Tensor& x) { return x.is_cpu(); }
struct [[maybe_unused]] DeviceOf {
  explicit DeviceOf(const torch::stable::Tensor&) {}
};
#endif

#if defined(SPARSESERVE_CUDA) || defined(SPARSESERVE_SIMULATOR)
// Lengths and slots are in device memory.
constexpr bool kValuesReadable = false;
// Rows of D numbers anywhere, 16-byte loads.
constexpr bool kTransposedKeys = false;
constexpr int64_t kPageMultiple = 16;
#else
constexpr bool kValuesReadable = true;
// Within a page and head K is [D, P] and V [P, D], both dense.
constexpr bool kTransposedKeys = true;
constexpr int64_t kPageMultiple = 32;
#endif

}  // namespace sparseserve
