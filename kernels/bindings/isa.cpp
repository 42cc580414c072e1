#include "kernels.h"

// Without tensors there is nothing to dispatch on: these two are called through ctypes.
extern "C" {
[[gnu::visibility("default")]] const char* sparseserve_isa() { return sparseserve::cpu::isa_name(); }
[[gnu::visibility("default")]] int sparseserve_use_isa(const char* name) { return sparseserve::cpu::use_isa(name); }
}
