// Says which test a process was running when it crashed, and what was written to stderr last.
//
// pytest keeps what a test writes to stderr in a file of its own, which dies with the process, and with it the reason
// that glibc gives before it aborts. The handler saves the end of that file and then calls the handler before it.
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

namespace {

constexpr int kSignals[] = {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction before[NSIG];
char test[4096] = "no test";
int report = -1;

void write_text(const char* text) { (void)!write(report, text, std::strlen(text)); }

void crashed(int number) {
  write_text("\ncrashed while running ");
  write_text(test);
  write_text("\n");
  struct stat file;
  if (!fstat(STDERR_FILENO, &file) && S_ISREG(file.st_mode)) {
    char text[2000];
    const off_t start = file.st_size > off_t(sizeof text) ? file.st_size - off_t(sizeof text) : 0;
    const ssize_t bytes = pread(STDERR_FILENO, text, sizeof text, start);
    if (bytes > 0) (void)!write(report, text, size_t(bytes));
  }
  sigaction(number, &before[number], nullptr);
  raise(number);
}

}  // namespace

extern "C" {

// Reports go to the file descriptor.
void report_crashes(int fd) {
  report = fd;
  static char stack[64 << 10];  // a test may have overflowed its own
  stack_t other{};
  other.ss_sp = stack, other.ss_size = sizeof stack;
  sigaltstack(&other, nullptr);
  struct sigaction action{};
  action.sa_handler = crashed, action.sa_flags = SA_ONSTACK | SA_NODEFER;
  for (int number : kSignals) sigaction(number, &action, &before[number]);
}

void set_test(const char* name) { std::strncpy(test, name, sizeof test - 1); }
}
