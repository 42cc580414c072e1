// CUDA C++ for a machine without a GPU: kernels run as host code, every thread on a stack of its own.
#pragma once

#include <math.h>

#include "device/atomics.h"
#include "device/index.h"
#include "device/keywords.h"
#include "device/math.h"
#include "device/sync.h"
#include "device/vectors.h"
#include "device/warp.h"
#include "host.h"
