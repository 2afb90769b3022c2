// How a parallel loop of the CPU kernels is shared among threads.
//
// The range is cut into pieces, four for each thread. A thread owns neighbouring ones, so that it finds in its caches
// what it wrote in the op before. When it has finished them, it takes pieces from the ends of the others' parts (work
// stealing, Blumofe and Leiserson 1999). A thread that loses its core to another process therefore computes less.
//
// Nevertheless the loop ends only when every thread has arrived, and a thread without a core may need milliseconds for
// that. A caller that has lost more time than the others saved it computes alone for some time, then tries again.
//
// With PYGPT_LOG=threads, a line is printed the first time that a loop loses 100 times as long as it computes.
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

constexpr int64_t kMostThreads = 512, kPiecesPerThread = 4;

// The pieces that a thread owns, as a range of their numbers. Threads take pieces from both ends of it.
class alignas(64) Part {
 public:
  void set(int64_t begin, int64_t end) { bounds_.store(pack(begin, end), std::memory_order_relaxed); }

  // Takes the first or the last piece. False if none is left.
  bool take(bool first, int64_t& piece) {
    uint64_t bounds = bounds_.load(std::memory_order_relaxed);
    while (true) {
      const int64_t begin = uint32_t(bounds), end = bounds >> 32;
      if (begin >= end) return false;
      piece = first ? begin : end - 1;
      const uint64_t rest = first ? pack(begin + 1, end) : pack(begin, end - 1);
      if (bounds_.compare_exchange_weak(bounds, rest, std::memory_order_relaxed)) return true;
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
    if (lost > std::max(kTolerated, computed * threads)) {
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

// Computes the range [0, n) by `count` threads, in pieces of `grain` or more; the last may be smaller. fork(work) calls
// work(i) once for each i below `count`, i = 0 on the calling thread, and returns when all calls have. body(begin, end)
// computes a piece.
template <class Fork, class Body>
void share(int64_t n, int64_t grain, int64_t count, Patience& patience, const Fork& fork, const Body& body) {
  const int64_t length = std::max(grain, n / (kPiecesPerThread * count));
  int64_t done = 0;
  for (; done < n && patience.exhausted(); done += length) body(done, std::min(n, done + length));
  if (done >= n) return;

  const int64_t pieces = (n - done + length - 1) / length;
  std::array<Part, kMostThreads> parts;
  for (int64_t i = 0; i < count; i++) parts[i].set(pieces * i / count, pieces * (i + 1) / count);
  const bool slow = patience.last_was_slow();  // only then the time without a core counts, and its price is small
  const int64_t started = Patience::now(), cpu_started = slow ? Patience::cpu_time() : 0;
  int64_t computed = 0;
  fork([&](int64_t own) {
    int64_t piece;
    for (int64_t i = 0; i < count; i++)
      while (parts[(own + i) % count].take(i == 0, piece)) {
        const int64_t begin = done + piece * length;
        body(begin, std::min(n, begin + length));
      }
    if (own == 0) computed = slow ? Patience::cpu_time() - cpu_started : Patience::now() - started;
  });
  patience.judge(count, computed, Patience::now() - started - computed);
}

}  // namespace pygpt::bind
