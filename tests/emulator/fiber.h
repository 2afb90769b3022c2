// A call stack that can be left in the middle of a function and entered again later. A CUDA thread runs on one.
//
// fiber.cpp switches registers in a few instructions, because ucontext makes a system call for the signal mask
// (docs/measured.md G1). The sanitizers are told of every switch.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <new>

#include "sanitizers.h"

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

// Stores the running stack's position in *save and continues on the stack whose position is `load` (fiber.cpp).
extern "C" void pygpt_switch_stack(void** save, void* load);

namespace pygpt::emulator {

class Fiber {
 public:
  Fiber() = default;  // represents the host's stack
  explicit Fiber(size_t bytes, size_t number) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    void* p = mmap(nullptr, page + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, page, PROT_NONE);  // a guard page: a stack overflow faults
    bottom_ = static_cast<char*>(p) + page, size_ = bytes;
    skew_ = number % 61 * 64 + number % 7 * 1024;  // spreads the tops of the stacks over the sets of the cache
  }
  Fiber(const Fiber&) = delete;

  // The next switch to this fiber calls entry(), which never returns, on an empty stack.
  void prepare(void (*entry)()) {
    unpoison(bottom_, size_);
    if (checks_races)  // mapping the memory anew makes the race checker forget the last thread's accesses
      mmap(bottom_, size_, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(bottom_ + size_ - skew_);
    *--top = nullptr;  // the return address of entry(), which never returns
    *--top = reinterpret_cast<void*>(entry);
    position_ = top - 6;
#elif defined(__aarch64__)
    void** top = reinterpret_cast<void**>(bottom_ + size_ - skew_ - 160);
    for (int i = 0; i < 20; i++) top[i] = nullptr;
    top[11] = reinterpret_cast<void*>(entry);  // x30
    position_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_, context_.uc_stack.ss_size = size_ - skew_, context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Switches from this fiber, which is running, to another. Returns when some fiber switches back.
  void switch_to(Fiber& other) {
    leave_stack(&fake_, other.bottom_, other.size_);
#if defined(__x86_64__) || defined(__aarch64__)
    pygpt_switch_stack(&position_, other.position_);
#else
    swapcontext(&context_, &other.context_);
#endif
    enter_stack(fake_, nullptr, nullptr);
  }

  // Must be the first call of entry(). Learns the bounds of the host's stack for the address sanitizer.
  static void entered(Fiber& host) {
    const void* bottom = nullptr;
    size_t size = 0;
    enter_stack(nullptr, &bottom, &size);
    if (!host.bottom_) host.bottom_ = static_cast<char*>(const_cast<void*>(bottom)), host.size_ = size;
  }

 private:
  char* bottom_ = nullptr;
  size_t size_ = 0, skew_ = 0;
  void* fake_ = nullptr;
#if defined(__x86_64__) || defined(__aarch64__)
  void* position_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace pygpt::emulator
