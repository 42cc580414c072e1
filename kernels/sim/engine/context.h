// A stack to run on, and the switch from one to another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sparseserve::sim {

class Context {
 public:
  // The stack of whoever switches away from it.
  Context() = default;
  // A new stack. `number` tells the stacks of one block apart.
  explicit Context(unsigned number);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Forgets what runs on the stack: the next switch to it calls entry(), which must not return.
  void restart(void (*entry)());
  // Leaves this context for `next`; returns when something switches back.
  void switch_to(Context& next);

 private:
  std::byte* memory_ = nullptr;
  std::byte* top_ = nullptr;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t state_;
#endif
};

}  // namespace sparseserve::sim
