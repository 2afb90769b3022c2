// The machine the emulated kernels run on: threads, warps, blocks, shared memory, and the order of events.
//
// A CUDA thread is a fiber; all fibers run on the one operating-system thread that launched the kernel, and
// switch only where a thread waits. What hardware leaves open, a schedule decides, as inconveniently as it
// may: threads and blocks run in order, in reverse, or at random; asynchronous work is done when it has been
// waited for, not before, and what it will overwrite reads as NaN meanwhile; fresh shared memory is NaN.
// What hardware leaves undefined (a barrier on two sides of a branch, a shuffle with an absent lane) is an
// error that names the lines.
//
// Headers and .cu files play the program and are compiled with the sanitizer of a build. The .cpp files play
// the machine and never are: what they read and write is no access of the program's. So an instruction checks
// the addresses it is given in its header (touch), and does its work in a .cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "types.h"

namespace pygpt::emulator {

// A line of a kernel. As a last parameter, `Site site = Site::here()` is the caller's.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Values of any type that instructions keep for a thread or a block, until the block ends. state<T>() is made
// by T's default constructor when it is first asked for.
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

// Bytes of shared memory that a block may have: this architecture's, or PYGPT_EMULATED_SHARED for a smaller device.
int64_t shared_limit();

struct Block;

struct Thread : States {
  uint3 index;   // threadIdx
  int rank;      // in the block, x fastest
  int warp, lane;
  Block* block;
};

struct Block : States {
  uint3 index;           // blockIdx
  int threads;           // that it was launched with
  int cluster_rank;      // in its cluster, x fastest
  Block* const* cluster;  // its cluster's blocks by rank, all alive as long as one is
  int cluster_size;
  std::byte* shared;     // its shared memory; a variable has the same offset in every block of a launch
};

extern Thread* current;  // the thread that is running

// ---- Errors

// Ends the launch, which returns the message with the thread, block and line that failed.
[[noreturn]] void fail(Site site, const std::string& message);

// ---- Waiting

// Lets other threads run until ready(). `what` names the instruction in reports of deadlocks. ready() is asked
// often and by other threads: it has no effects and reads nothing that belongs to the running thread.
void park(const char* what, Site site, bool (*ready)(void*), void* context);
template <class Ready>
void wait_until(const char* what, Site site, Ready ready) {
  park(what, site, [](void* context) { return bool((*static_cast<Ready*>(context))()); }, &ready);
}

// Barrier `id` of the block (0..15), complete when `threads` of them have arrived. Zero threads stands for all
// that have not ended, and then all must arrive on one line: __syncthreads.
void barrier(int id, int threads, Site site);
// Arrives without waiting (bar.arrive).
void barrier_arrive(int id, int threads, Site site);

// ---- Instructions of a warp

// What the lanes of a warp do together. apply() runs once, when the last lane of the mask has come, with each
// lane's operand (null outside the mask); it reads and writes them all.
struct Collective {
  const char* name;
  void (*apply)(void* const (&operands)[32], uint32_t mask);
  bool orders_memory = false;   // a lane sees after it what the others wrote before it
  bool skips_ended = false;     // lanes that have ended need not come
};
void collective(const Collective& what, uint32_t mask, void* operand, Site site);

// ---- Asynchronous work

// Reads as NaN from now on, in every format. Seen by sanitizers as a write of the running thread.
inline void poison(void* p, size_t bytes) {
  auto* b = static_cast<volatile unsigned char*>(p);
  for (size_t i = 0; i < bytes; i++) b[i] = 0xFF;
}
// An access of the running thread's that does nothing: for sanitizers.
inline void touch(const void* p, size_t bytes) {
  auto* b = static_cast<const volatile unsigned char*>(p);
  for (size_t i = 0; i < bytes; i++) (void)b[i];
}
// Copies without being an access of the program's.
void copy_untracked(void* to, const void* from, size_t bytes);

// Work that one thread starts and later waits for by groups (cp.async, wgmma, bulk stores). It is done, in
// order, when a wait asks for it; under the random schedule some of it earlier. Work has void apply().
template <class Work>
class Groups {
 public:
  void start(const Work& work) { works_.push_back(work), early(); }
  void commit() { groups_.push_back(works_.size()), early(); }
  // Until at most `pending` of the committed groups are not done.
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
  std::vector<size_t> groups_;  // how many works there were at each commit
  size_t next_ = 0;             // the first that is not done
};

// Work that the machine does on its own (a bulk copy that completes on an mbarrier): once, in any order, when no
// thread can go on without it; under the random schedule at any moment from now. What is left when the block
// of the running thread ends is done then.
void defer(std::function<void()> work);

// Called when the last thread of the running thread's block has ended, after the block's deferred work.
void at_block_end(std::function<void()> check);

// ---- Shared memory

// The block's variable for a declaration in the source; `key` tells declarations apart.
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

enum class Order { fifo, reversed, random };
void set_schedule(Order order, uint64_t seed);
Order order();
uint64_t random_below(uint64_t n);  // from the schedule's own sequence

template <class Work>
void Groups<Work>::early() {
  if (order() == Order::random)
    for (; next_ < works_.size() && random_below(4) == 0; next_++) works_[next_].apply();
}

// ---- What a race checker is told: all that happened before release(token) is seen after acquire(token).
void release(void* token);
void acquire(void* token);

// ---- Launching

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared = 0;
  dim3 cluster = {1, 1, 1};
};
// Runs body(), a call of the kernel, once per thread. Null, or an error that stands until the next launch.
const char* run(const void* kernel, const Launch& launch, const std::function<void()>& body);

// While recording, launches are checked and noted, and do not run.
struct Noted {
  size_t offset;  // of the kernel in the library it is part of
  Launch launch;
};
void record(bool on);  // forgets what was noted before
const std::vector<Noted>& noted();
bool note(const void* kernel, const Launch& launch);  // whether it was noted, and is not to run

struct Statistics {
  uint64_t launches, blocks, threads, switches, barriers, collectives;
  uint64_t async_copies, mma;
  uint64_t ldmatrix_phases, ldmatrix_cycles;  // equal where no two rows of an 8x8 matrix share a bank
  uint64_t tma, wgmma;
};
extern Statistics statistics;

}  // namespace pygpt::emulator

// The built-in variables of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
