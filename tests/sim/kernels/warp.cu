// Every warp primitive, the same values in each.
#include <cstdint>

#include "support.h"

namespace {

constexpr int kMaxRows = 64;
constexpr unsigned kAll = 0xffffffff;

struct Row {
  const char* name;
  double values[32];
};

struct Put {
  Row* rows;
  int next = 0;

  __device__ void operator()(const char* name, double value) {
    rows[next].name = name;
    rows[next++].values[threadIdx.x] = value;
  }
};

__global__ void shuffles(const int* values, Row* rows) {
  Put put{rows};
  const int lane = threadIdx.x, value = values[lane];
  put("shfl 5", __shfl_sync(kAll, value, 5));
  put("shfl own", __shfl_sync(kAll, value, (lane * 7 + 3) & 31));
  put("shfl 37", __shfl_sync(kAll, value, 37));
  put("shfl 3 of 8", __shfl_sync(kAll, value, 3, 8));
  put("shfl 13 of 8", __shfl_sync(kAll, value, 13, 8));
  put("up 3", __shfl_up_sync(kAll, value, 3));
  put("up 3 of 16", __shfl_up_sync(kAll, value, 3, 16));
  put("down 5", __shfl_down_sync(kAll, value, 5));
  put("down 5 of 8", __shfl_down_sync(kAll, value, 5, 8));
  put("xor 9", __shfl_xor_sync(kAll, value, 9));
  put("xor 9 of 8", __shfl_xor_sync(kAll, value, 9, 8));
  put("double", __shfl_xor_sync(kAll, value + 0.1, 16));
  put("float", __shfl_xor_sync(kAll, value + 0.5f, 4));
  put("int64", static_cast<double>(__shfl_xor_sync(kAll, int64_t{value} << 40, 1)));
  put("float2", __shfl_xor_sync(kAll, make_float2(0, value), 2).y);
}

__global__ void votes(const int* values, Row* rows) {
  Put put{rows};
  const int lane = threadIdx.x, value = values[lane];
  put("ballot", __ballot_sync(kAll, value > 20));
  put("any", __any_sync(kAll, value == values[7]));
  put("any not", __any_sync(kAll, value < 0));
  put("all", __all_sync(kAll, value >= 0));
  put("all not", __all_sync(kAll, value > 0));
  put("add", __reduce_add_sync(kAll, value - 40));
  put("min", __reduce_min_sync(kAll, value - 40));
  put("max", __reduce_max_sync(kAll, value - 40));
  put("max unsigned", __reduce_max_sync(kAll, static_cast<unsigned>(value - 40)));
}

// Both halves on their own, one of them more often; then the lanes that are left.
__global__ void parts(const int* values, Row* rows) {
  Put put{rows};
  const int lane = threadIdx.x, value = values[lane];
  int sum = value;
  if (lane < 16) {
    for (int bits = 1; bits < 16; bits *= 2) sum += __shfl_xor_sync(0xffff, sum, bits);
  } else {
    sum = __shfl_sync(0xffff0000, sum, 16);
  }
  put("halves", sum);
  __syncwarp();
  put("single", __reduce_add_sync(1u << lane, value));
  if (lane >= 20) return;
  put("rest ballot", __ballot_sync(kAll, value > 20));
  put("rest add", __reduce_add_sync(kAll, value));
  put("rest xor", __shfl_xor_sync(0xfffff, value, 2));
}

void show(void (*kernel)(const int*, Row*)) {
  std::vector<int> values(32);
  for (int i = 0; i < 32; ++i) values[i] = (i * 37 + 11) % 64;
  std::vector<Row> rows(kMaxRows);
  launch(kernel, 1, 32, 0, values.data(), rows.data());
  for (const Row& row : rows)
    if (row.name) {
      std::printf("%s", row.name);
      print(":", row.values);
    }
}

}  // namespace

int main() {
  show(shuffles);
  show(votes);
  show(parts);
}
