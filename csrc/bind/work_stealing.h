// The parallel loop of the CPU kernels, on torch's threads.
//
// Each thread owns an equal part of the range, so that it finds in its own caches what it wrote in the op before. It
// takes its part in pieces. A thread that has finished takes pieces from the ends of the others' parts (work stealing,
// Blumofe and Leiserson 1999), so that one which loses its core to another process computes less.
//
// Nevertheless the loop ends only when every thread has arrived, and a thread without a core may need milliseconds for
// that. A caller that has waited for longer than the others saved it computes alone for some time, then tries again.
//
// With PYGPT_LOG=threads, a call that waits 100 times longer than it computes says so, once in a process.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace pygpt::bind {

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
  bool exhausted() const { return alone_until_ && now() < alone_until_; }

  // After a loop of `threads` threads: the caller computed for a time, then waited for the others.
  void judge(int64_t threads, int64_t computed, int64_t waited) {
    if (waited > std::max(kTolerated, computed * (threads - 1))) {
      alone_until_ = now() + pause_;
      pause_ = std::min(2 * pause_, kLongestPause);
      if (log && waited > 100 * computed) report(computed, waited);
    } else {
      alone_until_ = 0, pause_ = kShortestPause;
    }
  }

 private:
  static constexpr int64_t kTolerated = 100'000, kShortestPause = 2'000'000, kLongestPause = 64'000'000;

  static void report(int64_t computed, int64_t waited) {
    static std::atomic_flag reported = ATOMIC_FLAG_INIT;
    if (reported.test_and_set()) return;
    std::fprintf(stderr,
                 "pygpt: a CPU kernel computed for %.3f ms, then waited %.1f ms for torch's other threads. Other "
                 "processes use the cores: see \"A machine that is not idle\" in docs/performance.md\n",
                 computed * 1e-6, waited * 1e-6);
  }
  static inline const bool log = [] {
    const char* value = std::getenv("PYGPT_LOG");
    return value && std::strstr(value, "threads");
  }();

  int64_t alone_until_ = 0, pause_ = kShortestPause;
};

// See Threads in cpu/parallel.h.
inline void parallel_for(int64_t n, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* context) {
  constexpr int64_t kMostParts = 256;
  static thread_local Patience patience;
  const int64_t count =
      n > grain ? std::min({torch::stable::get_num_threads() + int64_t(0), (n + grain - 1) / grain, kMostParts}) : 1;
  if (count <= 1 || n > INT32_MAX || patience.exhausted()) return body(context, 0, n);

  std::array<Part, kMostParts> parts;
  for (int64_t i = 0; i < count; i++) parts[i].set(n * i / count, n * (i + 1) / count);
  const auto work = [&](int64_t own) {
    int64_t begin, end;
    for (int64_t i = 0; i < count; i++)
      while (parts[(own + i) % count].take(i == 0, grain, begin, end)) body(context, begin, end);
  };
  const int64_t started = Patience::now();
  int64_t finished = started;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; own++) work(own);
    if (begin == 0) finished = Patience::now();  // the calling thread has the first part
  });
  patience.judge(count, finished - started, Patience::now() - finished);
}

}  // namespace pygpt::bind
