// One block at a time, on one OS thread: every CUDA thread runs on a stack of its own until it has to wait.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../device/vectors.h"
#include "context.h"
#include "engine.h"

namespace sparseserve::sim {

constexpr size_t kMaxShared = 227 << 10;

// Which one of the threads that can go on does.
enum class Order { kForward, kBackward, kRandom };

// A launch. Every thread runs call.
struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t dynamic_shared;
  void (*run)(const void* call);
  const void* call;
  Order order;
  uint64_t seed;
};

// A copy into shared memory that its thread has not waited for.
struct Copy {
  void* target;
  uint4 data;
  int group;
};

struct Thread {
  uint3 index;
  Context* context = nullptr;  // none before it starts and after it exits
  // What it waits in.
  const char* operation;
  Location where;
  uint32_t mask;  // 0 in a barrier
  void* operand;
  Complete complete;

  std::vector<Copy> copies;
  int groups = 0;  // of copies that are committed
};

// A bit per lane.
struct Warp {
  uint32_t live;
  uint32_t runnable;
  uint32_t waiting;  // in a warp operation
};

class Block {
 public:
  Block();

  // Runs any block of the grid after this.
  void load(const Grid& grid);
  // Returns what went wrong, if anything did.
  std::string run(uint64_t number);

  // For the thread that runs.
  unsigned lane() const { return current_ % kWarpSize; }
  Votes wait_for_block(const char* operation, bool vote, const Location& where);
  void wait_for_lanes(const char* operation, uint32_t mask, void* operand, Complete complete, const Location& where);
  void* shared(const void* variable, size_t bytes, size_t align, const Location& where);
  void* dynamic_shared(const Location& where) { return shared(nullptr, grid_->dynamic_shared, 16, where); }
  void start_copy(void* target, const void* source, const Location& where);
  void commit_copies() { ++threads_[current_].groups; }
  void finish_copies(int groups_left);
  void fail(const Location& where, const char* what);

 private:
  static constexpr size_t kSharedAlign = 64;        // of no variable more
  static constexpr size_t kSharedSlack = 64 << 10;  // what lies between variables
  struct alignas(kSharedAlign) SharedMemory {
    std::byte bytes[kMaxShared + kSharedSlack];
  };
  struct Variable {
    const void* key;
    void* data;
  };

  // Not instrumented, for the same reason that fail() does not say that it never returns.
  [[gnu::no_sanitize_address]] static void enter();
  void work();
  void exit_thread();
  bool pick();
  void go_on(Context& self);
  void stop() { threads_[current_].context->switch_to(main_); }
  Context* idle_context();
  Thread& begin_wait(const char* operation, uint32_t mask, const Location& where);
  void release_block();
  void complete_if_all(unsigned warp, uint32_t mask);
  std::string recover();
  uint64_t random();

  const Grid* grid_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  unsigned current_ = 0;
  unsigned live_ = 0;
  // A context that sleeps here may wake on another OS thread, so it must not hold the address of a thread_local.
  uint3* thread_index_ = nullptr;
  uint64_t random_ = 0;
  std::string failure_;

  Context main_;
  std::vector<std::unique_ptr<Context>> contexts_;
  std::vector<Context*> idle_;

  // The block's barrier.
  unsigned arrived_ = 0;
  unsigned yes_ = 0;
  const Thread* first_ = nullptr;  // to arrive
  Votes votes_{};

  std::unique_ptr<SharedMemory> shared_;
  size_t shared_used_ = 0;
  std::vector<Variable> variables_;
};

// Who waits where.
std::string describe_waits(const std::vector<Thread>& threads, const std::vector<Warp>& warps);

}  // namespace sparseserve::sim
