// The data structures of the machine, shared by scheduler.cpp (which thread runs next), synchronise.cpp (barriers and
// collectives) and launch.cpp (blocks and launches).
#pragma once
#include <memory>
#include <mutex>

#include "fiber.h"
#include "runtime.h"
#include "shared_memory.h"

namespace pygpt::emulator {

struct Task : Thread {
  Fiber* fiber = nullptr;  // null until the thread has started
  void* races = nullptr;   // the race checker's context
  bool ended = false;
  const char* what = nullptr;  // the instruction at which the thread waits
  Site site{};
  bool (*ready)(void*) = nullptr;
  void* context = nullptr;
};

struct Barrier {
  int arrived = 0, threads = 0;
  Site site{};
  std::vector<Task*> waiting;
  char tokens[2];
  unsigned generation = 0;
};

// A collective at which some lanes have arrived.
struct Meeting {
  const Collective* what;
  Site site;
  uint32_t mask, arrived;
  void* operands[32];
  char* token;
};

struct Warp {
  Task* tasks[32] = {};
  uint32_t alive = 0;
  std::vector<Meeting> meetings;  // those that are not complete; their masks are disjoint
  char tokens[8];
  unsigned generation = 0;
};

struct LiveBlock : Block {
  std::vector<std::unique_ptr<Task>> tasks;
  std::vector<Warp> warps;
  Barrier barriers[16];
  SharedMemory memory;
  int alive = 0;
  std::vector<std::function<void()>> checks;
};

struct Deferred {
  Block* block;
  std::function<void()> work;
};

struct Machine {
  std::mutex mutex;
  Order order = Order::fifo;
  uint64_t random = 0;
  std::string error;
  bool failed = false;

  Launch launch;
  const std::function<void()>* body = nullptr;
  SharedLayout layout;
  std::vector<std::unique_ptr<LiveBlock>> blocks;  // the cluster that is running
  std::vector<Block*> cluster;                     // the same blocks
  int alive = 0;                                   // threads of these blocks that have not ended

  std::vector<Task*> ready;     // a ring buffer of `count` tasks from index `first` on
  size_t first = 0, count = 0;
  std::vector<Task*> polled;    // tasks that wait in park()
  std::vector<Deferred> deferred;

  Fiber host;
  void *host_races = nullptr, *races = race_context();  // the launching thread's, and the machine's own
  char start_token, end_token, machine_token;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
};
extern Machine machine;

inline Task& running() { return *static_cast<Task*>(current); }
inline LiveBlock& block_of(Thread& t) { return *static_cast<LiveBlock*>(t.block); }
inline Warp& warp_of(Thread& t) { return block_of(t).warps[t.warp]; }

std::string to_string(uint3 index);
std::string to_string(Site site);

// While an object of this type lives, the race checker attributes accesses to the machine, not to the running thread.
struct AsMachine {
  AsMachine() { switch_race_context(machine.races); }
  ~AsMachine() { switch_race_context(current ? running().races : machine.host_races); }
};

// ---- scheduler.cpp

// Ends the launch with this error.
[[noreturn]] void stop(std::string message);
// Appends a thread to those that are ready to run.
void push(Task* t);
// Runs other threads until the running thread has been made ready and is scheduled again.
void wait(const char* what, Site site);
// Does the i-th deferred work.
void do_deferred(size_t i);
// Called on the host's stack: runs the ready threads until all have ended or the launch has failed.
void run_threads();

// ---- synchronise.cpp

// Removes the running thread, which has ended, from barriers and collectives: completes them, or fails.
void leave_barriers_and_meetings();

// ---- launch.cpp

// Called when the last thread of a block has ended.
void end_block(LiveBlock& block);

}  // namespace pygpt::emulator
