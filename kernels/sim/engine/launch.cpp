// Launches: the blocks of a grid over OS threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>

#include "../host.h"
#include "block.h"

namespace {

using namespace sparseserve::sim;

constexpr uint64_t kMaxThreads = 1024;
constexpr unsigned kMaxBlocks = 65535;     // in y and z
constexpr int kDefaultShared = 48 << 10;   // of dynamic shared memory, unless the kernel asks for more
constexpr uint64_t kStride = 2654435761u;  // a prime: its multiples visit all blocks

std::optional<Order> order_named(const std::string& name) {
  if (name == "forward") return Order::kForward;
  if (name == "backward") return Order::kBackward;
  if (name == "random") return Order::kRandom;
  return std::nullopt;
}

std::atomic<Order>& order() {
  static std::atomic<Order> value = [] {
    const char* name = std::getenv("SPARSESERVE_SIM_ORDER");
    const auto order = order_named(name ? name : "forward");
    if (!order) throw std::runtime_error("SPARSESERVE_SIM_ORDER must be forward, backward or random");
    return *order;
  }();
  return value;
}

uint64_t max_workers() {
  static const uint64_t value = [] {
    const char* text = std::getenv("SPARSESERVE_SIM_THREADS");
    return text ? std::strtoull(text, nullptr, 10) : std::thread::hardware_concurrency();
  }();
  return std::max<uint64_t>(value, 1);
}

// Blocks keep their stacks from launch to launch.
class Idle {
 public:
  std::unique_ptr<Block> take() {
    const std::lock_guard lock(mutex_);
    if (blocks_.empty()) return std::make_unique<Block>();
    auto block = std::move(blocks_.back());
    blocks_.pop_back();
    return block;
  }

  void give_back(std::unique_ptr<Block> block) {
    const std::lock_guard lock(mutex_);
    blocks_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> blocks_;
} idle;

class Launch {
 public:
  explicit Launch(const Grid& grid)
      : grid_(grid), count_(uint64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z) {}

  void run() {
    std::vector<std::jthread> helpers;
    for (uint64_t i = 1; i < std::min(count_, max_workers()); ++i) helpers.emplace_back([this] { work(); });
    work();
    helpers.clear();
    if (!report_.empty()) throw std::runtime_error(report_);
  }

 private:
  void work() {
    auto block = idle.take();
    block->load(grid_);
    for (uint64_t i; (i = drawn_.fetch_add(1)) < count_;) {
      std::string report = block->run(number(i));
      if (report.empty()) continue;
      drawn_ = count_;
      const std::lock_guard lock(mutex_);
      if (report_.empty()) report_ = std::move(report);
    }
    idle.give_back(std::move(block));
  }

  // The i-th block to run.
  uint64_t number(uint64_t i) const {
    switch (grid_.order) {
      case Order::kForward:
        return i;
      case Order::kBackward:
        return count_ - 1 - i;
      case Order::kRandom:
        return (i + grid_.seed) * kStride % count_;
    }
    std::abort();
  }

  const Grid grid_;
  const uint64_t count_;
  std::atomic<uint64_t> drawn_{0};
  std::mutex mutex_;
  std::string report_;
};

std::mutex limits_mutex;
std::map<const void*, int> limits;  // of dynamic shared memory, by kernel

size_t limit_of(const void* kernel) {
  const std::lock_guard lock(limits_mutex);
  const auto found = limits.find(kernel);
  return static_cast<size_t>(found == limits.end() ? kDefaultShared : found->second);
}

std::atomic<uint64_t> launches{0};

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// What the driver would refuse.
cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 &blocks = config.gridDim, &threads = config.blockDim;
  const uint64_t size = uint64_t{threads.x} * threads.y * threads.z;
  const bool some = blocks.x && blocks.y && blocks.z && size;
  const bool few = size <= kMaxThreads && blocks.y <= kMaxBlocks && blocks.z <= kMaxBlocks;
  if (!some || !few) return cudaErrorInvalidConfiguration;
  return config.dynamicSmemBytes > limit_of(kernel) ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

namespace sparseserve::sim {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(const void*), const void* call) {
  if (const cudaError_t error = check(config, kernel); error != cudaSuccess) return returned(error);
  Launch({config.gridDim, config.blockDim, config.dynamicSmemBytes, run, call, order(), launches++}).run();
  return cudaSuccess;
}

cudaError_t set_max_dynamic_shared(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMaxShared) return returned(cudaErrorInvalidValue);
  const std::lock_guard lock(limits_mutex);
  limits[kernel] = bytes;
  return cudaSuccess;
}

}  // namespace sparseserve::sim

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

// How many kernels were launched so far.
extern "C" [[gnu::visibility("default")]] uint64_t sparseserve_sim_launches() { return launches; }

// Chooses forward, backward or random for the launches that follow; false when the name is none of them.
extern "C" [[gnu::visibility("default")]] bool sparseserve_sim_use_order(const char* name) {
  const auto chosen = order_named(name);
  if (chosen) order() = *chosen;
  return chosen.has_value();
}
