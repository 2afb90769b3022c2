// Turns a kernel's crash into an error of its launch.
#pragma once
#include <pthread.h>
#include <signal.h>

#include <cstdint>

#include "sanitizers.h"

namespace pygpt::emulator {

// While an object of this class lives, a segmentation fault on this thread calls the handler with the address instead
// of ending the process. In builds with a sanitizer the class does nothing, because the sanitizer handles faults.
class CatchFaults {
 public:
  using Handler = void (*)(uintptr_t address);
  explicit CatchFaults(Handler handler) {
    if (checks_addresses || checks_races) return;
    handler_ = handler, thread_ = pthread_self();
    static char stack[64 << 10];  // the thread's own may have overflowed
    stack_t mine{};
    mine.ss_sp = stack, mine.ss_size = sizeof stack;
    sigaltstack(&mine, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = caught, action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler never returns
    sigaction(SIGSEGV, &action, &old_[0]);
    sigaction(SIGBUS, &action, &old_[1]);
  }
  ~CatchFaults() {
    if (!handler_) return;
    restore();
    sigaltstack(&old_stack_, nullptr);
    handler_ = nullptr;
  }

 private:
  static void restore() {
    sigaction(SIGSEGV, &old_[0], nullptr);
    sigaction(SIGBUS, &old_[1], nullptr);
  }
  static void caught(int, siginfo_t* info, void*) {
    if (handler_ && pthread_equal(thread_, pthread_self())) handler_(reinterpret_cast<uintptr_t>(info->si_addr));
    restore();  // another thread's fault: it recurs under the old handler
  }

  static inline Handler handler_ = nullptr;
  static inline pthread_t thread_;
  static inline struct sigaction old_[2];
  static inline stack_t old_stack_;
};

}  // namespace pygpt::emulator
