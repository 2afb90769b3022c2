// The machine the emulated kernels run on: threads, warps, blocks, shared memory, and the order of events.
//
// A CUDA thread is a fiber. All fibers run on the one operating-system thread that launched the kernel, and switch only
// where a CUDA thread waits.
//
// Where hardware may choose an order, the schedule chooses an inconvenient one: threads and blocks run in order, in
// reverse or at random. Asynchronous work is done only when it has been waited for; until then its destination reads
// as NaN. Fresh shared memory is NaN. What CUDA leaves undefined (a barrier on both sides of a branch, a shuffle with
// an absent lane) is an error that names the lines.
//
// Headers and .cu files are the program under test and are compiled with the sanitizer of the build. The .cpp files
// are the machine and are compiled without it. An instruction therefore checks its addresses in its header (touch),
// where the sanitizer sees the accesses, and does its work in a .cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "types.h"

namespace pygpt::emulator {

// A line of a kernel's source. A last parameter `Site site = Site::here()` receives the caller's line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Values of any type that instructions keep for a thread or a block until the block ends. The first call of state<T>()
// constructs the value.
class States {
 public:
  template <class T>
  T& state() {
    static const char key = 0;
    return *static_cast<T*>(find(&key, [] { return std::shared_ptr<void>(std::make_shared<T>()); }));
  }
  void clear();

 private:
  void* find(const void* key, std::shared_ptr<void> (*make)());
  std::vector<std::pair<const void*, std::shared_ptr<void>>> states_;
};

// The most shared memory that a block may have, in bytes: the architecture's limit, or PYGPT_EMULATED_SHARED if set.
int64_t shared_limit();

struct Block;

struct Thread : States {
  uint3 index;  // threadIdx
  int rank;  // linear index in the block, x fastest
  int warp, lane;
  Block* block;
};

struct Block : States {
  uint3 index;  // blockIdx
  int threads;  // blockDim.x * blockDim.y * blockDim.z
  int cluster_rank;  // linear index in the cluster, x fastest
  Block* const* cluster;  // the cluster's blocks by rank; all stay alive until the last one ends
  int cluster_size;
  std::byte* shared;  // a shared variable has the same offset in every block of a launch
  bool ended;
};

extern Thread* current;  // the thread that is running

// ---- Errors

// Ends the launch, which returns the message with the thread, block and line that failed.
[[noreturn]] void fail(Site site, const std::string& message);

// ---- Waiting

// Lets other threads run until ready() is true. `what` names the instruction in reports of deadlocks. Other threads
// call ready() many times, so it must have no effects and read nothing that belongs to the running thread.
void park(const char* what, Site site, bool (*ready)(void*), void* context);
template <class Ready>
void wait_until(const char* what, Site site, Ready ready) {
  park(what, site, [](void* context) { return bool((*static_cast<Ready*>(context))()); }, &ready);
}

// Barrier `id` of the block (0..15) completes when `threads` threads have arrived. threads = 0 is __syncthreads: it
// waits for all threads that have not ended, and all must arrive on the same line.
void barrier(int id, int threads, Site site);
// Arrives without waiting (bar.arrive).
void barrier_arrive(int id, int threads, Site site);

// ---- Instructions of a warp

// An instruction that the lanes of a warp execute together. apply() runs once, when the last lane of the mask has
// arrived. It reads and writes the operands of all lanes; operands outside the mask are null.
struct Collective {
  const char* name;
  void (*apply)(void* const (&operands)[32], uint32_t mask);
  bool orders_memory = false;  // the other lanes' earlier writes are visible afterwards
  bool skips_ended = false;  // lanes that have ended need not arrive
};
void collective(const Collective& what, uint32_t mask, void* operand, Site site);

// ---- Asynchronous work

// Fills memory with bits that are NaN in every format. Sanitizers see a write by the running thread.
inline void poison(void* p, size_t bytes) {
  auto* b = static_cast<volatile unsigned char*>(p);
  for (size_t i = 0; i < bytes; i++) b[i] = 0xFF;
}
// Reads memory without using it, so that sanitizers see the access of the running thread.
inline void touch(const void* p, size_t bytes) {
  auto* b = static_cast<const volatile unsigned char*>(p);
  for (size_t i = 0; i < bytes; i++) (void)b[i];
}
// Copies memory unseen by sanitizers.
void copy_untracked(void* to, const void* from, size_t bytes);

// Work that one thread starts and later waits for in groups (cp.async, wgmma, bulk stores). A wait does it in order;
// the random schedule may do some of it earlier. Work has a member void apply().
template <class Work>
class Groups {
 public:
  void start(const Work& work) { works_.push_back(work), early(); }
  void commit() { groups_.push_back(works_.size()), early(); }
  // Returns when at most `pending` of the committed groups are not done.
  void wait(size_t pending) {
    if (groups_.size() <= pending) return early();
    const size_t ended = groups_.size() - pending, done = groups_[ended - 1];
    for (; next_ < done; next_++) works_[next_].apply();
    groups_.erase(groups_.begin(), groups_.begin() + ended);
    if (groups_.empty() && next_ == works_.size()) works_.clear(), next_ = 0;
  }

 private:
  void early();
  std::vector<Work> works_;
  std::vector<size_t> groups_;  // works_.size() at each commit
  size_t next_ = 0;  // index of the first work that is not done
};

// Schedules work that the machine does on its own, once (a bulk copy that completes on an mbarrier): when no thread can
// run otherwise, or at any moment under the random schedule, and at the latest when the running thread's block ends.
void defer(std::function<void()> work);

// Calls check() when the last thread of the running thread's block has ended, after the block's deferred work.
void at_block_end(std::function<void()> check);

// ---- Shared memory

// The block's shared variable for one declaration in the source, which `key` identifies.
void* shared_variable(const void* key, const char* name, size_t bytes, size_t alignment);
template <class T>
T& shared_variable(const char* name) {
  static const char key = 0;
  return *static_cast<T*>(shared_variable(&key, name, sizeof(T), alignof(T)));
}
std::byte* dynamic_shared();
size_t dynamic_shared_bytes();
// Whether the bytes lie within one variable of the running thread's block.
bool is_shared(const void* p, size_t bytes);

// ---- The order of events

enum class Order { fifo, reversed, random, ahead };
void set_schedule(Order order, uint64_t seed);
Order order();
uint64_t random_below(uint64_t n);  // the next number of the schedule's own sequence

template <class Work>
void Groups<Work>::early() {
  if (order() == Order::random)
    for (; next_ < works_.size() && random_below(4) == 0; next_++) works_[next_].apply();
}

// ---- For the race checker: what precedes release(token) happens before what follows acquire(token).
void release(void* token);
void acquire(void* token);

// ---- Launching

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared = 0;
  dim3 cluster = {1, 1, 1};
};
// Calls body(), which calls the kernel, once per thread. Returns null or an error message, valid until the next launch.
const char* run(const void* kernel, const Launch& launch, const std::function<void()>& body);

// While recording, launches are checked and listed, and do not run.
struct RecordedLaunch {
  size_t offset;  // of the kernel in its shared library
  Launch launch;
};
void record(bool on);  // record(true) also clears the list
const std::vector<RecordedLaunch>& recorded_launches();
bool record_launch(const void* kernel, const Launch& launch);  // false if recording is off

struct Statistics {
  uint64_t launches, blocks, threads, switches, barriers, collectives;
  uint64_t async_copies, mma;
  uint64_t ldmatrix_phases, ldmatrix_cycles;  // equal if no two rows of an 8x8 matrix share a bank
  uint64_t tma, wgmma;
};
extern Statistics statistics;

}  // namespace pygpt::emulator

// The built-in variables of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
