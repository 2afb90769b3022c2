// csrc/bind/work_stealing.h on threads of the standard library, for tests/kernels/test_work_stealing.py.
#include "../csrc/bind/work_stealing.h"

#include <thread>
#include <vector>

using namespace pygpt::bind;

// Shares [0, n) among threads of which number `late` starts only when the others are done (-1: none). Returns how many
// pieces there were, or -1 if an index was not computed exactly once, a piece but the last was below `grain`,
// or a late thread still found work.
extern "C" int64_t shared(int64_t n, int64_t grain, int64_t count, int64_t late) {
  std::vector<std::atomic<int>> times(n);
  std::atomic<int64_t> pieces{0}, arrived{0}, wrong{0};
  thread_local int64_t own = 0;
  Patience patience;
  const auto fork = [&](const auto& work) {
    std::vector<std::thread> threads;
    const auto run = [&](int64_t i) {
      own = i;
      while (i == late && arrived < count - 1) std::this_thread::yield();
      work(i);
      arrived++;
    };
    for (int64_t i = 1; i < count; i++) threads.emplace_back(run, i);
    run(0);
    for (auto& thread : threads) thread.join();
  };
  share(n, grain, count, patience, fork, [&](int64_t begin, int64_t end) {
    pieces++, wrong += own == late || (end - begin < grain && end < n);
    for (int64_t i = begin; i < end; i++) times[i]++;
  });
  for (const auto& t : times)
    if (t != 1) return -1;
  return wrong ? -1 : pieces.load();
}

// Whether a caller of so many threads that computed and waited for so many microseconds, `times` times in turn, then
// computes alone, and still does after so many microseconds more.
extern "C" int alone(int64_t threads, int64_t computed, int64_t waited, int times, int64_t later) {
  Patience patience;
  for (int i = 0; i < times; i++) patience.judge(threads, computed * 1000, waited * 1000);
  const bool at_once = patience.exhausted();
  std::this_thread::sleep_for(std::chrono::microseconds(later));
  const bool still = patience.exhausted();
  patience.judge(threads, 1, 0);
  return at_once + 2 * still + 4 * patience.exhausted();
}
