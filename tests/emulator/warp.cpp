#include "warp.h"

namespace pygpt::emulator {

void syncwarp(uint32_t mask, Site site) {
  static const Collective op{"__syncwarp", nullptr, true, true};
  collective(op, mask, nullptr, site);
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  static const Collective op{"a warp vote", [](void* const(&lanes)[32], uint32_t mask) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) votes |= *static_cast<uint32_t*>(lanes[i]) << i;
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) *static_cast<uint32_t*>(lanes[i]) = votes;
  }};
  uint32_t operand = predicate;
  collective(op, mask, &operand, site);
  return operand;
}

namespace {
struct Exchange {
  uint64_t value, result;
  int source, lane;
  Site site;
};
void exchange(void* const (&lanes)[32], uint32_t mask) {
  for (int i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    auto& e = *static_cast<Exchange*>(lanes[i]);
    e.result = mask >> e.source & 1 ? static_cast<Exchange*>(lanes[e.source])->value : 0x7FFFDEAD7FFFDEADu;
  }
}
}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int operand, int width, Site site) {
  static const Collective ops[] = {{"__shfl_sync", exchange},
                                   {"__shfl_up_sync", exchange},
                                   {"__shfl_down_sync", exchange},
                                   {"__shfl_xor_sync", exchange}};
  if (width < 1 || width > 32 || (width & (width - 1))) fail(site, "a shuffle's width must be a power of two");
  const int lane = current->lane, first = lane & ~(width - 1);
  int source = 0;
  switch (kind) {
    case Shuffle::from: source = first + (operand & (width - 1)); break;
    case Shuffle::up: source = lane - operand < first ? lane : lane - operand; break;
    case Shuffle::down: source = lane + operand >= first + width ? lane : lane + operand; break;
    case Shuffle::exclusive_or: source = (lane ^ operand) >= first + width ? lane : lane ^ operand; break;
  }
  Exchange e{value, 0, source & 31, lane, site};
  collective(ops[int(kind)], mask, &e, site);
  return e.result;
}

}  // namespace pygpt::emulator
