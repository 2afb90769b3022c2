// The scheduler: picks the thread that runs next, and reports a deadlock if there is none.
//
// A thread that waits picks its successor and switches to its fiber; the scheduler has no thread of its own. The host's
// stack is left when the first thread of a cluster starts, and entered again when the last thread has ended or one has
// failed. After a failure the other threads' stacks are abandoned, which is safe because kernels own no resources.
#include <algorithm>
#include <cstdlib>
#include <map>

#include "machine.h"

uint3 threadIdx, blockIdx;

namespace pygpt::emulator {

Thread* current;
Statistics statistics;
Machine machine;

void push(Task* t) { machine.ready[(machine.first + machine.count++) % machine.ready.size()] = t; }

void stop(std::string message) {
  machine.error = std::move(message), machine.failed = true;
  switch_race_context(machine.host_races);
  running().fiber->switch_to(machine.host);
  std::abort();  // not reached
}

void do_deferred(size_t i) {
  AsMachine machine_itself;
  std::function<void()> work = std::move(machine.deferred[i].work);
  machine.deferred.erase(machine.deferred.begin() + i);
  work();
}

namespace {

// The position, among the ready threads, of one of the running thread's warp; of any thread if none is ready.
size_t of_running_warp() {
  const auto& ring = machine.ready;
  for (size_t i = 0; current && i < machine.count; i++) {
    const Task* t = ring[(machine.first + i) % ring.size()];
    if (t->block == current->block && t->warp == current->warp) return i;
  }
  return random_below(machine.count);
}

Task* pop() {
  auto& ring = machine.ready;
  if (machine.order == Order::random || machine.order == Order::ahead) {
    const size_t chosen = machine.order == Order::ahead ? of_running_warp() : random_below(machine.count);
    std::swap(ring[machine.first], ring[(machine.first + chosen) % ring.size()]);
  }
  Task* t = ring[machine.first];
  machine.first = (machine.first + 1) % ring.size(), machine.count--;
  return t;
}

// Makes the threads ready whose condition has become true.
void poll() {
  auto& waiting = machine.polled;
  size_t kept = 0;
  for (size_t i = 0; i < waiting.size(); i++)
    if (waiting[i]->ready(waiting[i]->context)) push(waiting[i]);
    else waiting[kept++] = waiting[i];
  waiting.resize(kept);
}

bool do_one_deferred() {
  const size_t n = machine.deferred.size();
  const bool in_order = machine.order == Order::fifo || machine.order == Order::ahead;
  if (n) do_deferred(in_order ? 0 : machine.order == Order::reversed ? n - 1 : random_below(n));
  return n != 0;
}

std::string deadlock() {
  std::map<std::string, std::vector<Task*>> waiting;
  int ended = 0;
  for (auto& block : machine.blocks)
    for (auto& t : block->tasks)
      if (t->ended) ended++;
      else waiting[to_string(t->site) + ": " + t->what + " in block " + to_string(t->block->index)].push_back(t.get());
  std::string text = "deadlock: no thread can go on";
  for (auto& [where, tasks] : waiting) {
    text += "\n  " + where + ": " + std::to_string(tasks.size()) + " threads (";
    for (size_t i = 0; i < tasks.size(); i++) {  // ranges of ranks
      size_t last = i;
      while (last + 1 < tasks.size() && tasks[last + 1]->rank == tasks[last]->rank + 1) last++;
      text += (i ? ", " : "") + std::to_string(tasks[i]->rank);
      if (last > i) text += ".." + std::to_string(tasks[last]->rank);
      i = last;
    }
    text += ")";
  }
  return text + (ended ? "\n  " + std::to_string(ended) + " threads have ended" : "");
}

Task* next() {
  if (machine.order == Order::random && random_below(8) == 0) {
    if (random_below(2)) do_one_deferred();
    poll();
  }
  if (machine.order == Order::ahead) poll();
  while (!machine.count) {
    poll();
    if (!machine.count && !do_one_deferred()) stop(deadlock());
  }
  return pop();
}

void make_current(Task* t) {
  current = t;
  threadIdx = t->index;
  blockIdx = t->block->index;
  statistics.switches++;
  switch_race_context(t->races);
}

// ---------------------------------------------------------------- threads on fibers

void end_thread() {
  Task& self = running();
  LiveBlock& block = block_of(self);
  self.ended = true;
  machine.alive--, block.alive--;
  leave_barriers_and_meetings();
  if (!block.alive) end_block(block);
}

Fiber* idle_fiber();

// The entry point of a fiber: runs threads that have not started, one after the other, as long as the scheduler picks
// such threads. With the race checker every thread gets a fiber of its own, or the checker would mix up their locals.
void fiber_main() {
  Fiber::entered(machine.host);
  for (;;) {
    acquire_races(&machine.start_token);
    (*machine.body)();
    end_thread();
    Fiber* fiber = running().fiber;
    if (!machine.alive) {
      switch_race_context(machine.host_races);
      machine.idle.push_back(fiber);
      fiber->switch_to(machine.host);
    }
    Task* to = next();
    make_current(to);
    if (!to->fiber && !checks_races) {
      to->fiber = fiber;
      continue;
    }
    if (!to->fiber) to->fiber = idle_fiber();
    machine.idle.push_back(fiber);
    fiber->switch_to(*to->fiber);
  }
}

// A fiber on which the running thread can start.
Fiber* idle_fiber() {
  constexpr size_t kStack = 256 << 10;
  if (machine.idle.empty()) {
    AsMachine machine_itself;
    machine.fibers.push_back(std::make_unique<Fiber>(checks_addresses ? 4 * kStack : kStack, machine.fibers.size()));
    machine.idle.reserve(machine.fibers.size());
    machine.idle.push_back(machine.fibers.back().get());
  }
  Fiber* fiber = machine.idle.back();
  machine.idle.pop_back();
  fiber->prepare(fiber_main);
  return fiber;
}

}  // namespace

void run_threads() {
  Task* to = pop();
  make_current(to);
  to->fiber = idle_fiber();
  machine.host.switch_to(*to->fiber);
  current = nullptr;
}

void wait(const char* what, Site site) {
  Task& self = running();
  self.what = what, self.site = site;
  Task* to = next();
  if (to == &self) return;
  make_current(to);
  if (!to->fiber) to->fiber = idle_fiber();
  self.fiber->switch_to(*to->fiber);
}

void park(const char* what, Site site, bool (*ready)(void*), void* context) {
  Task& self = running();
  if (ready(context)) return;
  self.ready = ready, self.context = context;
  machine.polled.push_back(&self);
  wait(what, site);
}

// ---------------------------------------------------------------- asynchronous work, schedules

void copy_untracked(void* to, const void* from, size_t bytes) {
  auto* t = static_cast<volatile unsigned char*>(to);  // volatile: no call of memcpy, which sanitizers intercept
  auto* f = static_cast<const volatile unsigned char*>(from);
  for (size_t i = 0; i < bytes; i++) t[i] = f[i];
}

void defer(std::function<void()> work) {
  release_races(&machine.machine_token);
  AsMachine machine_itself;
  acquire_races(&machine.machine_token);
  machine.deferred.push_back({current->block, std::move(work)});
}
void at_block_end(std::function<void()> check) {
  release_races(&machine.machine_token);
  AsMachine machine_itself;
  acquire_races(&machine.machine_token);
  block_of(*current).checks.push_back(std::move(check));
}

void set_schedule(Order order, uint64_t seed) { machine.order = order, machine.random = seed; }
Order order() { return machine.order; }
uint64_t random_below(uint64_t n) {  // splitmix64
  uint64_t z = machine.random += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return uint64_t((unsigned __int128)(z ^ z >> 31) * n >> 64);
}

void release(void* token) { release_races(token); }
void acquire(void* token) { acquire_races(token); }

}  // namespace pygpt::emulator
