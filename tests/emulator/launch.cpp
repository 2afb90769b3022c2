// The life of a block, and launches.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "faults.h"
#include "machine.h"

dim3 blockDim, gridDim;

namespace pygpt::emulator {

// ---------------------------------------------------------------- names and errors

std::string to_string(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
std::string to_string(Site site) {
  const std::string path = site.file ? site.file : "?";
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

void fail(Site site, const std::string& message) {
  stop(to_string(site) + ": " + message + ", in thread " + to_string(current->index) + " of block " +
       to_string(current->block->index));
}

int64_t shared_limit() {
  const char* less = std::getenv("PYGPT_EMULATED_SHARED");
  return less ? std::atoll(less) : kSharedLimit;
}

// ---------------------------------------------------------------- what threads and blocks keep

void States::clear() { states_.clear(); }
void* States::find(const void* key, std::shared_ptr<void> (*make)()) {
  for (auto& [k, value] : states_)
    if (k == key) return value.get();
  AsMachine machine_itself;
  states_.emplace_back(key, make());
  return states_.back().second.get();
}

void* shared_variable(const void* key, const char* name, size_t bytes, size_t alignment) {
  const SharedVariable* v = machine.layout.find(key);
  if (!v) {
    v = machine.layout.add(key, name, bytes, alignment);
    if (!v)
      stop(std::string("no room for the shared variable ") + name + ": a block has " + std::to_string(kSharedLimit) +
           " bytes");
  }
  return block_of(*current).memory.at(machine.layout, *v);
}
std::byte* dynamic_shared() { return current->block->shared + SharedLayout::kDynamicOffset; }
size_t dynamic_shared_bytes() { return machine.launch.dynamic_shared; }
bool is_shared(const void* p, size_t bytes) {
  return machine.layout.holds(static_cast<const std::byte*>(p) - current->block->shared, bytes);
}

// ---------------------------------------------------------------- the life of a block

void end_block(LiveBlock& block) {
  for (size_t i = 0; i < machine.deferred.size();)
    if (machine.deferred[i].block == &block) do_deferred(i);
    else i++;
  for (auto& check : block.checks) check();
  if (std::string damage = block.memory.damage(machine.layout); !damage.empty())
    stop(damage + " in block " + to_string(block.index));
  block.ended = true;
  if (block.cluster_size > 1) block.memory.fill_nan(machine.layout);  // for those that read it nevertheless
}

namespace {

void fault(uintptr_t address) {
  if (!current) return;
  char hex[20];
  std::snprintf(hex, sizeof hex, "0x%llx", static_cast<unsigned long long>(address));
  stop("a crash at address " + std::string(address ? hex : "0, or of an access that is not aligned,") + " in thread " +
       to_string(current->index) + " of block " + to_string(current->block->index) +
       "; the builds with sanitizer='address' and 'undefined' tell the line");
}

uint3 index_in(dim3 size, uint64_t rank) {
  return {unsigned(rank % size.x), unsigned(rank / size.x % size.y), unsigned(rank / size.x / size.y)};
}
int64_t volume(dim3 d) { return int64_t(d.x) * d.y * d.z; }

void prepare_block(LiveBlock& block, int threads) {
  if (int(block.tasks.size()) != threads) {
    block.tasks.clear();
    for (int i = 0; i < threads; i++) block.tasks.push_back(std::make_unique<Task>());
  }
  block.warps.assign((threads + 31) / 32, Warp{});
  for (Warp& w : block.warps) w.meetings.reserve(32);
  for (Barrier& b : block.barriers) b = Barrier{}, b.waiting.reserve(threads);
  block.threads = block.alive = threads;
  for (int i = 0; i < threads; i++) {
    Task& t = *block.tasks[i];
    t.fiber = nullptr, t.races = race_context(), t.ended = false;
    t.index = index_in(machine.launch.block, i);
    t.rank = i, t.warp = i / 32, t.lane = i % 32, t.block = &block;
    block.warps[t.warp].tasks[t.lane] = &t;
    block.warps[t.warp].alive |= 1u << t.lane;
  }
  block.memory.reset(machine.layout);
  block.shared = block.memory.data();
  block.ended = false;
}

// Gives the next cluster's threads race contexts that know nothing of this block, so that the race checker reports
// blocks that depend on each other. The launching thread learns of the block's accesses when the launch ends.
void forget(LiveBlock& block) {
  for (auto& t : block.tasks) {
    switch_race_context(t->races);
    release_races(&machine.end_token);
  }
  AsMachine machine_itself;
  acquire_races(&machine.end_token);
  for (auto& t : block.tasks) end_race_context(t->races), t->clear();
  block.clear(), block.checks.clear();
  machine.deferred.clear();
  if (checks_races) block.memory.release();
}

// Runs all threads of the blocks of one cluster to their end.
void run_cluster(uint3 corner) {
  const dim3 size = machine.launch.cluster;
  const int threads = int(volume(machine.launch.block));
  machine.first = machine.count = 0, machine.alive = 0;
  machine.ready.resize(threads * machine.blocks.size());
  machine.polled.clear(), machine.polled.reserve(machine.ready.size());
  for (size_t i = 0; i < machine.blocks.size(); i++) {
    LiveBlock& block = *machine.blocks[i];
    const uint3 within = index_in(size, i);
    block.index = {corner.x + within.x, corner.y + within.y, corner.z + within.z};
    block.cluster = machine.cluster.data(), block.cluster_size = int(machine.cluster.size());
    block.cluster_rank = int(i);
    prepare_block(block, threads);
    machine.alive += threads;
  }
  for (auto& block : machine.blocks)
    for (auto& t : block->tasks) push(t.get());
  if (machine.order == Order::reversed) std::reverse(machine.ready.begin(), machine.ready.end());

  run_threads();
  for (auto& block : machine.blocks) forget(*block);
}

// The order in which clusters run: [n] is the n-th cluster, a permutation of 0 .. count - 1 that the schedule
// determines.
struct Sequence {
  uint64_t count, factor = 1, offset = 0;
  explicit Sequence(uint64_t count) : count(count) {
    if (machine.order != Order::random || count < 2) return;
    offset = random_below(count);
    do factor = 1 + random_below(count);
    while (std::gcd(factor, count) != 1);
  }
  uint64_t operator[](uint64_t n) const {
    if (machine.order == Order::reversed) return count - 1 - n;
    return uint64_t((unsigned __int128)factor * n % count + offset) % count;
  }
};

std::string invalid(const Launch& l) {
  const int64_t threads = volume(l.block);
  if (threads < 1 || threads > 1024 || l.block.z > 64)
    return "a block must have 1 to 1024 threads, got " + std::to_string(threads);
  if (volume(l.grid) < 1 || l.grid.x > 0x7FFFFFFFu || l.grid.y > 65535 || l.grid.z > 65535)
    return "invalid grid " + to_string({l.grid.x, l.grid.y, l.grid.z});
  const int64_t blocks = volume(l.cluster);
  if (blocks < 1 || blocks > 8 || l.grid.x % l.cluster.x || l.grid.y % l.cluster.y || l.grid.z % l.cluster.z)
    return "invalid cluster " + to_string({l.cluster.x, l.cluster.y, l.cluster.z});
  if (int64_t(l.dynamic_shared) > shared_limit())
    return std::to_string(l.dynamic_shared) + " bytes of shared memory, more than " + std::to_string(shared_limit());
  return "";
}

}  // namespace

// ---------------------------------------------------------------- launching

const char* run(const void* kernel, const Launch& launch, const std::function<void()>& body) {
  std::lock_guard<std::mutex> lock(machine.mutex);
  machine.error = invalid(launch);
  if (!machine.error.empty()) return machine.error.c_str();
  if (record_launch(kernel, launch)) return nullptr;
  machine.launch = launch, machine.body = &body, machine.failed = false;
  machine.layout = SharedLayout(launch.dynamic_shared);
  machine.host_races = this_race_context();
  CatchFaults faults(fault);
  machine.idle.clear();
  for (auto& f : machine.fibers) machine.idle.push_back(f.get());
  blockDim = launch.block, gridDim = launch.grid;

  const dim3 size = launch.cluster, clusters{launch.grid.x / size.x, launch.grid.y / size.y, launch.grid.z / size.z};
  machine.blocks.resize(volume(size));
  machine.cluster.clear();
  for (auto& block : machine.blocks) {
    if (!block) block = std::make_unique<LiveBlock>();
    machine.cluster.push_back(block.get());
  }
  const Sequence sequence(volume(clusters));
  statistics.launches++;
  release_races(&machine.start_token);
  for (uint64_t n = 0; n < sequence.count && !machine.failed; n++) {
    const uint3 c = index_in(clusters, sequence[n]);
    run_cluster({c.x * size.x, c.y * size.y, c.z * size.z});
    statistics.blocks += machine.blocks.size();
    statistics.threads += machine.blocks.size() * volume(launch.block);
  }
  acquire_races(&machine.end_token);
  return machine.failed ? machine.error.c_str() : nullptr;
}

}  // namespace pygpt::emulator
