// Floats from stdin as bf16 and fp16, and every bf16 and fp16 as a float; binary.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "support.h"

int main() {
  std::vector<unsigned short> narrow;
  std::vector<float> wide;
  float x;
  std::vector<float> floats;
  while (std::fread(&x, sizeof x, 1, stdin) == 1) floats.push_back(x);
  for (const float f : floats) narrow.push_back(__bfloat16_as_ushort(__float2bfloat16(f)));
  for (const float f : floats) narrow.push_back(__half_as_ushort(__float2half(f)));
  for (int i = 0; i < 1 << 16; ++i)
    wide.push_back(__bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(i))));
  for (int i = 0; i < 1 << 16; ++i) wide.push_back(__half2float(__ushort_as_half(static_cast<unsigned short>(i))));
  std::fwrite(narrow.data(), sizeof narrow[0], narrow.size(), stdout);
  std::fwrite(wide.data(), sizeof wide[0], wide.size(), stdout);
}
