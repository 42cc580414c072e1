#include "context.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <new>

namespace sparseserve::sim {

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4 << 10;
// Stacks that all begin at the same offset in a page would compete for a few sets of the cache.
constexpr size_t kStaggerBytes = 17 * 64;
constexpr unsigned kStaggers = 64;

}  // namespace

Context::Context(unsigned number) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK;
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  memory_ = static_cast<std::byte*>(memory);
  top_ = memory_ + kStackBytes - number % kStaggers * kStaggerBytes;
}

Context::~Context() {
  if (memory_) munmap(memory_, kStackBytes);
}

#if defined(__x86_64__)

// swapcontext() would save the signal mask: two system calls, ten times the cost of everything else.
extern "C" [[gnu::visibility("hidden")]] void sparseserve_sim_switch(void** from, void* to);
asm(R"(
.pushsection .text
.globl sparseserve_sim_switch
.hidden sparseserve_sim_switch
.type sparseserve_sim_switch, @function
sparseserve_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sparseserve_sim_switch, . - sparseserve_sim_switch
.popsection
)");

void Context::restart(void (*entry)()) {
  ASAN_UNPOISON_MEMORY_REGION(memory_, kStackBytes);
  constexpr int kSavedRegisters = 6;
  auto** top = reinterpret_cast<void**>(top_);
  *--top = nullptr;  // where entry() would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Context::switch_to(Context& next) { sparseserve_sim_switch(&stack_pointer_, next.stack_pointer_); }

#else

void Context::restart(void (*entry)()) {
  ASAN_UNPOISON_MEMORY_REGION(memory_, kStackBytes);
  getcontext(&state_);
  state_.uc_stack.ss_sp = memory_;
  state_.uc_stack.ss_size = static_cast<size_t>(top_ - memory_);
  state_.uc_link = nullptr;
  makecontext(&state_, entry, 0);
}

void Context::switch_to(Context& next) { swapcontext(&state_, &next.state_); }

#endif

}  // namespace sparseserve::sim
