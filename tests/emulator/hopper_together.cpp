// Hopper's instructions that take effect at once, for the threads that execute them together: the registers of a warp,
// the election of a lane, stmatrix, and the barrier of a cluster. See hopper.h.
#include "hopper.h"

namespace pygpt::emulator {

// ---------------------------------------------------------------- registers

namespace {

// How many registers each thread of a warp has. At first the block's threads divide up the multiprocessor's 65,536, as
// they do where __launch_bounds__ says that one block runs at a time. What a warp gives up, others may take.
struct Registers {
  std::vector<int> of_warp =
      std::vector<int>((current->block->threads + 31) / 32, std::min(65536 / current->block->threads / 8 * 8, 256));
  const int of_block = total();
  int total() const {
    int sum = 0;
    for (int count : of_warp) sum += 32 * count;
    return sum;
  }
};

Registers& meet_with_registers(Site site) {
  static const Collective op{"setmaxnreg", nullptr};
  collective(op, ~0u, current, site);
  return current->block->state<Registers>();
}

}  // namespace

void decrease_registers(int count, Site site) {
  int& mine = meet_with_registers(site).of_warp[current->warp];
  if (count > mine) fail(site, "decrease_registers from " + std::to_string(mine) + " to " + std::to_string(count));
  mine = count;
}

void increase_registers(int count, Site site) {
  Registers& registers = meet_with_registers(site);
  int& mine = registers.of_warp[current->warp];
  if (count < mine) fail(site, "increase_registers from " + std::to_string(mine) + " to " + std::to_string(count));
  const auto suffice = [&] { return registers.total() + 32 * (count - mine) <= registers.of_block; };
  while (!suffice()) wait_until("increase_registers", site, suffice);  // other warps may take them first
  mine = count;
}

// ---------------------------------------------------------------- parts of a warp

bool elect_one(Site site) {
  static const Collective op{"elect_one", nullptr};
  collective(op, ~0u, current, site);
  return current->lane == 19;
}

namespace {

struct StoredRow {
  void* row;
  const uint32_t* fragment;
};

template <bool transposed>
void store_rows(void* const (&lanes)[32], uint32_t) {
  uint16_t element[4][8][8];
  for (int l = 0; l < 32; l++)
    for (int m = 0; m < 4; m++)
      for (int half = 0; half < 2; half++) {
        const int g = l / 4, t = l % 4 * 2 + half;
        const uint32_t pair = static_cast<StoredRow*>(lanes[l])->fragment[m];
        (transposed ? element[m][t][g] : element[m][g][t]) = uint16_t(half ? pair >> 16 : pair);
      }
  for (int l = 0; l < 32; l++) copy_untracked(static_cast<StoredRow*>(lanes[l])->row, element[l / 8][l % 8], 16);
}

}  // namespace

void store_matrices(void* row, const uint32_t (&fragment)[4], bool transposed, Site site) {
  static const Collective ops[2] = {{"stmatrix_x4", store_rows<false>}, {"stmatrix_x4_trans", store_rows<true>}};
  StoredRow operand{row, fragment};
  collective(ops[transposed], ~0u, &operand, site);
}

// ---------------------------------------------------------------- clusters

namespace {

struct ClusterBarrier {
  int arrived = 0;
  unsigned generation = 0;
  char tokens[2];
};
struct ClusterArrival {
  bool pending = false;
  unsigned generation = 0;
};
ClusterBarrier& cluster_barrier() { return current->block->cluster[0]->state<ClusterBarrier>(); }

}  // namespace

void cluster_arrive(Site site) {
  auto& mine = current->state<ClusterArrival>();
  if (mine.pending) fail(site, "cluster_arrive twice without cluster_wait");
  ClusterBarrier& b = cluster_barrier();
  mine = {true, b.generation};
  release(&b.tokens[b.generation % 2]);
  if (++b.arrived == current->block->cluster_size * current->block->threads) b.arrived = 0, b.generation++;
}

void cluster_wait(Site site) {
  auto& mine = current->state<ClusterArrival>();
  if (!mine.pending) fail(site, "cluster_wait without cluster_arrive");
  ClusterBarrier& b = cluster_barrier();
  wait_until("cluster_wait", site, [&] { return b.generation != mine.generation; });
  mine.pending = false;
  acquire(&b.tokens[mine.generation % 2]);
}

}  // namespace pygpt::emulator
