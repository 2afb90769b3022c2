// Barriers of a block, and collectives of a warp's lanes.
#include <algorithm>

#include "machine.h"

namespace pygpt::emulator {
namespace {

void open_if_complete(Barrier& b, LiveBlock& block) {
  if (!b.arrived || b.arrived < (b.threads ? b.threads : block.alive)) return;
  for (Task* t : b.waiting) push(t);
  b.waiting.clear();
  b.arrived = 0, b.generation++;
  statistics.barriers++;
}

void complete_if_all_came(Warp& warp, size_t meeting) {
  Meeting& m = warp.meetings[meeting];
  if (m.arrived != (m.what->skips_ended ? m.mask & warp.alive : m.mask)) return;
  if (m.what->apply) m.what->apply(m.operands, m.mask);
  statistics.collectives++;
  for (int i = 0; i < 32; i++) {
    const int lane = machine.order == Order::reversed ? 31 - i : i;
    if (m.arrived >> lane & 1) push(warp.tasks[lane]);
  }
  warp.meetings.erase(warp.meetings.begin() + meeting);
}

char* arrive(int id, int threads, Site site, bool waits) {
  LiveBlock& block = block_of(*current);
  if (id < 0 || id > 15) fail(site, "barrier " + std::to_string(id) + ": there are 0 to 15");
  Barrier& b = block.barriers[id];
  if (threads % 32 || threads > block.threads) fail(site, "a barrier of " + std::to_string(threads) + " threads");
  if (b.arrived && b.threads != threads)
    fail(site, "barrier " + std::to_string(id) + " expects another number of threads than at " + to_string(b.site));
  if (b.arrived && !threads && (b.site.line != site.line || b.site.file != site.file))
    fail(site, "__syncthreads() while other threads of the block wait at the one in " + to_string(b.site));
  b.threads = threads, b.site = site, b.arrived++;
  char* token = &b.tokens[b.generation % 2];
  release_races(token);
  if (waits) b.waiting.push_back(&running());
  open_if_complete(b, block);
  return token;
}

}  // namespace

// A warp arrives as a whole, its lanes together.
void meet(int threads, const char* name, Site site) {
  static const Collective op{"named barrier", nullptr, false, true};
  if (threads < 32) fail(site, std::string(name) + " for " + std::to_string(threads) + " threads");
  collective(op, ~0u, current, site);
}

void barrier(int id, int threads, Site site) {
  if (id) meet(threads, "a named barrier", site);
  char* token = arrive(id, threads, site, true);
  wait(id ? "named barrier" : "__syncthreads", site);
  acquire_races(token);
}

void barrier_arrive(int id, int threads, Site site) {
  meet(threads, "an arrival at a named barrier", site);
  arrive(id, threads, site, false);
}

void collective(const Collective& what, uint32_t mask, void* operand, Site site) {
  Warp& warp = warp_of(*current);
  const uint32_t self = 1u << current->lane;
  if (!(mask & self))
    fail(site, std::string(what.name) + ": the caller, lane " + std::to_string(current->lane) + ", is not in its mask");
  if (!what.skips_ended && (mask & ~warp.alive))
    fail(site, std::string(what.name) + ": its mask names lanes that have ended or never were");
  auto m = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](const Meeting& m) { return m.mask & self; });
  if (m == warp.meetings.end()) {
    warp.meetings.push_back({&what, site, mask, 0, {}, &warp.tokens[warp.generation++ % 8]});
    m = warp.meetings.end() - 1;
  } else if (m->mask != mask || m->what->name != what.name || m->site.line != site.line || m->site.file != site.file) {
    fail(site, std::string(what.name) + " while other lanes wait for this one in " + m->what->name + " at " +
                   to_string(m->site) + (m->mask != mask ? " with another mask" : ""));
  }
  m->arrived |= self, m->operands[current->lane] = operand;
  char* token = m->token;
  if (what.orders_memory) release_races(token);
  complete_if_all_came(warp, size_t(m - warp.meetings.begin()));
  wait(what.name, site);
  if (what.orders_memory) acquire_races(token);
}

void leave_barriers_and_meetings() {
  Task& self = running();
  Warp& warp = warp_of(self);
  warp.alive &= ~(1u << self.lane);
  for (size_t i = warp.meetings.size(); i-- > 0;) {
    Meeting& m = warp.meetings[i];
    if (!(m.mask >> self.lane & 1)) continue;
    if (!m.what->skips_ended)
      fail(m.site, std::string(m.what->name) + " waits for lane " + std::to_string(self.lane) + ", which ended");
    complete_if_all_came(warp, i);
  }
  open_if_complete(block_of(self).barriers[0], block_of(self));
}

}  // namespace pygpt::emulator
