// Which thread this is. Objects, not macros: cudaLaunchConfig_t has members of these names.
#pragma once

#include "vectors.h"

[[gnu::tls_model("initial-exec")]] extern constinit thread_local uint3 threadIdx;
[[gnu::tls_model("initial-exec")]] extern constinit thread_local uint3 blockIdx;
[[gnu::tls_model("initial-exec")]] extern constinit thread_local dim3 blockDim;
[[gnu::tls_model("initial-exec")]] extern constinit thread_local dim3 gridDim;

constexpr int warpSize = 32;
