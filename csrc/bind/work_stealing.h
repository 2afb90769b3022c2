// How a parallel loop of the CPU kernels is shared among threads.
//
// Each thread owns an equal part of the range, so that it finds in its own caches what it wrote in the op before. It
// takes its part in pieces. A thread that has finished takes pieces from the ends of the others' parts (work stealing,
// Blumofe and Leiserson 1999), so that one which loses its core to another process computes less.
//
// Nevertheless the loop ends only when every thread has arrived, and a thread without a core may need milliseconds for
// that. A caller that has lost more time than the others saved it computes alone for some time, then tries again.
//
// With PYGPT_LOG=threads, a call that waits 100 times longer than it computes says so, once in a process.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace pygpt::bind {

constexpr int64_t kMostThreads = 256;

// A range of 32-bit indices from whose two ends threads take pieces.
class alignas(64) Part {
 public:
  void set(int64_t begin, int64_t end) { bounds_.store(pack(begin, end), std::memory_order_relaxed); }

  // Takes a quarter of what is left, but at least `least`, from the front or the back. False if nothing is left.
  bool take(bool front, int64_t least, int64_t& begin, int64_t& end) {
    uint64_t bounds = bounds_.load(std::memory_order_relaxed);
    while (true) {
      begin = uint32_t(bounds), end = bounds >> 32;
      const int64_t left = end - begin, piece = std::min(left, std::max(least, left / 4));
      if (left <= 0) return false;
      const uint64_t rest = front ? pack(begin + piece, end) : pack(begin, end - piece);
      if (!bounds_.compare_exchange_weak(bounds, rest, std::memory_order_relaxed)) continue;
      front ? end = begin + piece : begin = end - piece;
      return true;
    }
  }

 private:
  static uint64_t pack(int64_t begin, int64_t end) { return uint64_t(end) << 32 | uint64_t(begin); }
  std::atomic<uint64_t> bounds_;
};

// Decides whether the next loop of this calling thread is worth waking others. Times are in nanoseconds.
class Patience {
 public:
  static int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  // The time for which this thread had a core. Asking takes half a microsecond.
  static int64_t cpu_time() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
    timespec t;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) == 0) return t.tv_sec * int64_t(1'000'000'000) + t.tv_nsec;
#endif
    return now();
  }
  bool exhausted() const { return alone_until_ && now() < alone_until_; }
  bool last_was_slow() const { return slow_; }

  // After a loop of `threads` threads, for part of which the caller computed. It lost the rest, waiting for the others
  // or without a core.
  void judge(int64_t threads, int64_t computed, int64_t lost) {
    slow_ = computed + lost > kTolerated;
    if (lost > std::max(kTolerated, computed * (threads - 1))) {
      alone_until_ = now() + pause_;
      pause_ = std::min(2 * pause_, kLongestPause);
      if (log && lost > 100 * computed) report(computed, lost);
    } else {
      alone_until_ = 0, pause_ = kShortestPause;
    }
  }

 private:
  static constexpr int64_t kTolerated = 200'000, kShortestPause = 2'000'000, kLongestPause = 64'000'000;

  static void report(int64_t computed, int64_t lost) {
    static std::atomic_flag reported = ATOMIC_FLAG_INIT;
    if (reported.test_and_set()) return;
    std::fprintf(stderr,
                 "pygpt: a CPU kernel computed for %.3f ms and waited %.1f ms for a core or for torch's other threads. "
                 "Other processes use the cores: see \"A machine that is not idle\" in docs/performance.md\n",
                 computed * 1e-6, lost * 1e-6);
  }
  static inline const bool log = [] {
    const char* value = std::getenv("PYGPT_LOG");
    return value && std::strstr(value, "threads");
  }();

  bool slow_ = false;
  int64_t alone_until_ = 0, pause_ = kShortestPause;
};

// Computes the range [0, n) in pieces of at least `grain` by `count` threads. fork(work) calls work(i) once for each i
// below `count`, i = 0 on the calling thread, and returns when all calls have. body(begin, end) computes a piece.
template <class Fork, class Body>
void share(int64_t n, int64_t grain, int64_t count, Patience& patience, const Fork& fork, const Body& body) {
  std::array<Part, kMostThreads> parts;
  for (int64_t i = 0; i < count; i++) parts[i].set(n * i / count, n * (i + 1) / count);
  const bool slow = patience.last_was_slow();  // only then the time without a core counts, and its price is small
  const int64_t started = Patience::now(), cpu_started = slow ? Patience::cpu_time() : 0;
  int64_t computed = 0;
  fork([&](int64_t own) {
    int64_t begin, end;
    for (int64_t i = 0; i < count; i++)
      while (parts[(own + i) % count].take(i == 0, grain, begin, end)) body(begin, end);
    if (own == 0) computed = slow ? Patience::cpu_time() - cpu_started : Patience::now() - started;
  });
  patience.judge(count, computed, Patience::now() - started - computed);
}

}  // namespace pygpt::bind
