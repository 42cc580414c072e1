// torch's stream for the CUDA kernels; the simulator has none.
#include <cuda_runtime.h>

#include "target.h"

namespace sparseserve::cuda {

cudaStream_t current_stream() {
#if defined(SPARSESERVE_CUDA)
  int device = 0;
  STD_TORCH_CHECK(cudaGetDevice(&device) == cudaSuccess, "no current CUDA device");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
#else
  return nullptr;
#endif
}

}  // namespace sparseserve::cuda
