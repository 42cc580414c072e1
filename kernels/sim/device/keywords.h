// CUDA's keywords. __shared__ is not among them: a static variable would keep its value from block to block, so kernels
// declare shared memory with the macros of ptx.h. Nor is __noinline__, which the standard library uses itself.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __forceinline__ inline __attribute__((always_inline))
