// The effects of Hopper's asynchronous instructions, and when they take place. See hopper.h.
#include "hopper.h"

#include <cmath>
#include <map>

namespace pygpt::emulator {

namespace {

// ---------------------------------------------------------------- memory

// Written as a loop over volatile bytes, so that no sanitizer intercepts it.
void fill_nan(std::byte* to, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) static_cast<volatile std::byte*>(to)[i] = std::byte(0xFF);
}

// Dynamic shared memory as TMA and wgmma see it. Static variables have only one view.
struct AsyncView {
  std::byte* generic = dynamic_shared();  // the view of ordinary loads and stores (the generic proxy)
  std::vector<std::byte> bytes = std::vector<std::byte>((dynamic_shared_bytes() + 3) / 4 * 4, std::byte(0xFF));
  std::byte* of(std::byte* p) {
    const size_t offset = p - generic;
    return offset < bytes.size() ? &bytes[offset] : p;
  }
};
// The view of the running thread's block, or of another block of its cluster.
AsyncView& async_view(Block& block = *current->block) {
  auto& view = block.state<AsyncView>();
  view.generic = block.shared + (dynamic_shared() - current->block->shared);
  return view;
}

size_t offset_of(const void* shared) { return static_cast<const std::byte*>(shared) - current->block->shared; }

// What corresponds to p, of the running thread's block, in another block of its cluster.
template <class T>
T* at_rank(T* p, int rank, Site site) {
  Block& block = *current->block;
  if (rank < 0 || rank >= block.cluster_size) fail(site, "no block " + std::to_string(rank) + " in the cluster");
  if (block.cluster[rank]->ended) fail(site, "block " + std::to_string(rank) + " of the cluster has ended");
  return reinterpret_cast<T*>(block.cluster[rank]->shared + offset_of(p));
}

void copy_word(void* to, const void* from) {
  *static_cast<volatile uint32_t*>(to) = *static_cast<const volatile uint32_t*>(from);
}

// The swizzled address: bits 4 and up, which number the 16-byte chunks, are XORed with those of the line.
size_t swizzled(size_t address, Swizzle swizzle) {
  const size_t mask = ((size_t(1) << int(swizzle)) - 1) << 4;
  return address ^ (address >> 3 & mask);
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, Site site) {
  const size_t offset = offset_of(p);
  const std::string which = what;
  const bool own = offset < size_t(1) << 19 && is_shared(p, bytes);  // 2^19: less than another block's distance
  if (!own) fail(site, which + " lies outside of the block's shared memory");
  if (offset % alignment) fail(site, which + " is not aligned to " + std::to_string(alignment) + " bytes");
}

}  // namespace

void fence_proxy_async() {
  AsyncView& view = async_view();
  for (size_t i = 0; i < view.bytes.size(); i += 4) copy_word(&view.bytes[i], view.generic + i);
}

// ---------------------------------------------------------------- mbarriers

namespace {

struct Barrier {
  int64_t bytes : 21;  // still expected in this phase
  uint64_t pending : 20, count : 20, parity : 1, initialised : 2;
  static constexpr int kInitialised = 1;  // fresh shared memory is NaN, whose bits here are 3
};
static_assert(sizeof(Barrier) == 8);

Barrier& initialised(uint64_t* bar, const char* what, Site site) {
  auto& b = reinterpret_cast<Barrier&>(*bar);
  if (b.initialised == Barrier::kInitialised) return b;
  fail(site, std::string(what) + " on an mbarrier that was not initialised");
}

Barrier& barrier_at(uint64_t* bar, const char* what, Site site) {
  check_shared(bar, 8, 8, "an mbarrier", site);
  return initialised(bar, what, site);
}

void end_phase_if_complete(Barrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.count, b.parity ^= 1;
}

// An arrival that expects bytes.
void arrive(Barrier& b, int64_t bytes, Site site) {
  if (!b.pending) fail(site, "more arrivals than the mbarrier's " + std::to_string(b.count) + " in one phase");
  if (bytes < 0 || std::llabs(b.bytes + bytes) >= 1 << 20)
    fail(site, "an mbarrier expects at least 0 and at most 1048575 bytes");
  release(&b);
  b.bytes += bytes, b.pending--;
  end_phase_if_complete(b);
}

// Bytes of an asynchronous load have arrived.
void credit(uint64_t* bar, int64_t bytes) {
  Barrier& b = reinterpret_cast<Barrier&>(*bar);
  b.bytes -= bytes;
  end_phase_if_complete(b);
}

}  // namespace

void mbarrier_init(uint64_t* bar, int count, Site site) {
  check_shared(bar, 8, 8, "an mbarrier", site);
  if (count < 1 || count >= 1 << 20) fail(site, "an mbarrier for " + std::to_string(count) + " arrivals");
  if (reinterpret_cast<Barrier&>(*bar).initialised == Barrier::kInitialised)
    fail(site, "an mbarrier is initialised a second time");
  const Barrier b{0, uint64_t(count), uint64_t(count), 0, Barrier::kInitialised};
  *bar = cuda::bits_as<uint64_t>(b);
  release(bar);
  at_block_end([bar, site] {
    const int64_t left = reinterpret_cast<Barrier&>(*bar).bytes;
    if (left) fail(site, "an mbarrier still expects " + std::to_string(left) + " bytes at the block's end");
  });
}

void mbarrier_arrive(uint64_t* bar, int64_t bytes, Site site) { arrive(barrier_at(bar, "arrival", site), bytes, site); }

void mbarrier_arrive_at(uint64_t* bar, int rank, Site site) {
  check_shared(bar, 8, 8, "an mbarrier", site);
  arrive(initialised(at_rank(bar, rank, site), "arrival", site), 0, site);
}

void mbarrier_wait(uint64_t* bar, int parity, Site site) {
  Barrier& b = barrier_at(bar, "wait", site);
  if (parity >> 1) fail(site, "parity " + std::to_string(parity));
  wait_until("mbarrier_wait", site, [&] { return int(b.parity) != parity; });
  acquire(bar);
}

// ---------------------------------------------------------------- the tensor memory accelerator

namespace {

struct Box {
  TensorMap map;
  std::byte *shared, *block;
  AsyncView* view;
  At at;
  // `shared` is the box's place in the running thread's block, or in the same place of another block of its cluster.
  Box(const TensorMap& map, const std::byte* shared, At at, Block& in = *current->block)
      : map(map), shared(in.shared + offset_of(shared)), block(in.shared), view(&async_view(in)), at(at) {}

  // Calls move(shared, matrix) for every element; matrix is null outside of the matrix.
  template <class Move>
  void each(Move move) const {
    const int64_t(&size)[4] = map.size, (&stride)[4] = map.stride;
    const bool exists = at.z >= 0 && at.z < size[2] && at.w >= 0 && at.w < size[3];
    std::byte* const first = const_cast<std::byte*>(map.data) + at.z * stride[2] + at.w * stride[3];
    for (int64_t r = 0; r < map.box_rows; r++)
      for (int64_t c = 0; c < map.box_cols; c++) {
        const int64_t y = r + at.y, x = c + at.x;
        const bool inside = exists && y >= 0 && y < size[1] && x >= 0 && x < size[0];
        std::byte* matrix = first + y * stride[1] + x * stride[0];
        const size_t offset = shared - block + (r * map.box_cols + c) * map.element;
        move(block + swizzled(offset, map.swizzle), inside ? matrix : nullptr);
      }
  }
};

// Writes zeros if `from` is null.
void copy_element(std::byte* to, const std::byte* from, int bytes) {
  for (int i = 0; i < bytes; i++) to[i] = from ? from[i] : std::byte(0);
}

struct Store : Box {
  using Box::Box;
  void apply() const {
    each([&](std::byte* from, std::byte* to) {
      if (to) copy_element(to, view->of(from), map.element);
    });
    statistics.tma++;
  }
};
struct Stores {
  Groups<Store> groups;
};
struct UnfinishedStores {
  int issued = 0, waited = 0;
};

}  // namespace

void check_box(const TensorMap& map, int rank, const void* shared, Site site) {
  if (map.rank != rank) fail(site, "a tensor map of " + std::to_string(map.rank) + " dimensions");
  const int line = 16 << int(map.swizzle);
  check_shared(shared, map.box_bytes(), map.swizzle == Swizzle::none ? 128 : 8 * line, "a box", site);
}

namespace {

// Delivers the box to one block, and reports it to that block's barrier.
void load_box(const Box& box, uint64_t* bar, Site site) {
  initialised(bar, "a load", site);
  release(bar);
  box.each(
      [&](std::byte* to, std::byte*) { fill_nan(to, box.map.element), fill_nan(box.view->of(to), box.map.element); });
  defer([box, bar] {
    box.each([&](std::byte* to, const std::byte* from) {
      copy_element(to, from, box.map.element);
      copy_element(box.view->of(to), from, box.map.element);
    });
    credit(bar, box.map.box_bytes());
    statistics.tma++;
  });
}

}  // namespace

void tma_load(std::byte* shared, const TensorMap& map, uint64_t* bar, At at, int ranks, Site site) {
  check_shared(bar, 8, 8, "an mbarrier", site);
  Block& block = *current->block;
  if (!ranks) return load_box(Box(map, shared, at), bar, site);
  for (int rank = 0; rank < block.cluster_size; rank++)
    if (ranks >> rank & 1) load_box(Box(map, shared, at, *block.cluster[rank]), at_rank(bar, rank, site), site);
}

void bulk_load(std::byte* shared, const std::byte* global, int bytes, uint64_t* bar, Site site) {
  if (bytes < 1 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail(site, "bulk_load of bytes or from an address that are no multiples of 16");
  for (int rank = 0; rank < current->block->cluster_size; rank++)
    if (size_t(global - current->block->cluster[rank]->shared) < size_t(1) << 19)
      fail(site, "bulk_load from shared memory");
  check_shared(shared, bytes, 16, "a bulk load", site);
  barrier_at(bar, "a load", site);
  release(bar);
  AsyncView& view = async_view();
  for (int i = 0; i < bytes; i++) fill_nan(view.of(shared + i), 1);
  defer([=, &view] {
    for (int i = 0; i < bytes; i++) shared[i] = global[i], *view.of(shared + i) = global[i];
    credit(bar, bytes);
    statistics.tma++;
  });
}

void tma_store(const TensorMap& map, const std::byte* shared, At at, Site site) {
  auto& count = current->state<UnfinishedStores>();
  if (!count.issued++)
    at_block_end([&count, site] {
      if (count.issued != count.waited) fail(site, "the block ends while this store reads its shared memory");
    });
  current->state<Stores>().groups.start(Store(map, shared, at));
}
void tma_store_commit() { current->state<Stores>().groups.commit(); }
void tma_store_wait(int pending) {
  current->state<Stores>().groups.wait(pending);
  auto& count = current->state<UnfinishedStores>();
  if (!pending) count.waited = count.issued;
}

const char* check_map(const TensorMap& m) {
  const int64_t limit = int64_t(1) << 32, line = int64_t(m.box_cols) * m.element;
  if (reinterpret_cast<uintptr_t>(m.data) % 16) return "TMA: rows are not aligned to 16 bytes";
  for (int i = 0; i < m.rank; i++) {
    if (m.size[i] < 1 || m.size[i] > limit) return "TMA: sizes must be 1 .. 2^32";
    if (i > 0 && m.stride[i] % 16) return "TMA: rows are not aligned to 16 bytes";
    if (m.stride[i] < 0 || m.stride[i] >= int64_t(1) << 40) return "TMA: a stride must be below 2^40 bytes";
  }
  if (std::min(m.box_rows, m.box_cols) < 1 || std::max(m.box_rows, m.box_cols) > 256)
    return "TMA: box sizes must be 1 .. 256";
  if (line % 16) return "TMA: a box's rows must be a multiple of 16 bytes";
  if (m.swizzle != Swizzle::none && line != 16 << int(m.swizzle)) return "TMA: a box must be as wide as its swizzle";
  return nullptr;
}

// ---------------------------------------------------------------- wgmma

namespace {

constexpr uint64_t kField = 0x3FFF;

// The accumulators of a warp while products are in flight, [lane][register].
struct Accumulators {
  std::vector<float> values;
  float* lanes[32];
  Thread* threads[32];
  int under_way = 0;
};

struct Product {
  std::shared_ptr<Accumulators> d;
  AsyncView* view;
  std::byte* block;
  int warp;  // index in the warp group
  uint32_t a_registers[32][4];
  bool a_in_registers;
  Wgmma w;

  float to_value(uint16_t bits) const {
    return w.is_bf16 ? cuda::to_float(cuda::bf16{bits}) : cuda::to_float(cuda::f16{bits});
  }
  float at(uint64_t descriptor, bool trans, int i, int k) const {
    const std::byte* p = view->of(block + operand_offset(descriptor, trans, i, k));
    return to_value(uint16_t(uint16_t(p[0]) | uint16_t(p[1]) << 8));
  }
  float a(int row, int k) const {
    if (!a_in_registers) return at(w.a, w.trans_a, 16 * warp + row, k);
    const uint32_t pair = a_registers[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
    return to_value(uint16_t(k % 2 ? pair >> 16 : pair));
  }
  void apply();
};

// The registers of a thread as wgmma_fence or a finished product left them.
struct KnownRegisters {
  std::map<const void*, std::vector<uint32_t>> values;
  void keep(const void* registers, int count) {
    auto* r = static_cast<const uint32_t*>(registers);
    values[registers].assign(r, r + count);
  }
  bool holds(const void* registers, int count) const {
    auto* r = static_cast<const uint32_t*>(registers);
    const auto found = values.find(registers);
    return found != values.end() && std::equal(r, r + count, found->second.begin(), found->second.end());
  }
};

// The products that a warp has issued. The state belongs to the warp's first lane.
struct WarpProducts {
  Groups<Product> groups;
  std::map<float*, std::shared_ptr<Accumulators>> under_way;
  size_t issued = 0;
};

// The instructions of a warp group, as the first warp to arrive issued them. The other warps must issue the same.
struct GroupProducts {
  std::vector<std::pair<uint64_t, uint64_t>> descriptors[8];
  std::vector<WarpProducts*> warps[8];
};

void Product::apply() {
  // The sum over k is rounded once, to float. Hardware aligns and truncates the terms in an undocumented order.
  std::vector<float> column(16 * w.n);
  for (int n = 0; n < w.n; n++)
    for (int k = 0; k < 16; k++) column[n * 16 + k] = at(w.b, w.trans_b, n, k);
  for (int row = 0; row < 16; row++) {
    float line[16];
    for (int k = 0; k < 16; k++) line[k] = a(row, k);
    for (int n = 0; n < w.n; n++) {
      float& out = d->values[(row % 8 * 4 + n % 8 / 2) * (w.n / 2) + n / 8 * 4 + row / 8 * 2 + n % 2];
      double sum = w.accumulate ? out : 0;
      for (int k = 0; k < 16; k++) sum += double(line[k]) * column[n * 16 + k];
      out = float(sum);
    }
  }
  statistics.wgmma++;
  if (--d->under_way) return;
  for (int lane = 0; lane < 32; lane++) {
    copy_untracked(d->lanes[lane], &d->values[lane * w.n / 2], w.n / 2 * sizeof(float));
    d->threads[lane]->state<KnownRegisters>().keep(d->lanes[lane], w.n / 2);
  }
}

void check_group(Thread& first, WarpProducts& warp, const Wgmma& w, Site site) {
  auto& group = first.block->state<GroupProducts>();
  auto& descriptors = group.descriptors[first.warp / 4];
  auto& warps = group.warps[first.warp / 4];
  if (!warp.issued) {
    warps.push_back(&warp);
    if (warps.size() == 1)
      at_block_end([&warps, &descriptors, site] {
        for (auto* w : warps)
          if (warps.size() != 4 || w->issued != descriptors.size())
            fail(site, "not every warp of the warp group issued this wgmma");
      });
  }
  const std::pair<uint64_t, uint64_t> mine(w.a, w.b);
  if (warp.issued == descriptors.size()) descriptors.push_back(mine);
  if (descriptors[warp.issued++] != mine) fail(site, "the warps of a warp group issue different wgmmas");
}

Site wgmma_site;  // the line of the collective that is being applied

void issue(void* const (&operands)[32], uint32_t) {
  const Wgmma& w = *static_cast<Wgmma*>(operands[0]);
  auto& warp = w.thread->state<WarpProducts>();
  check_group(*w.thread, warp, w, wgmma_site);
  auto& d = warp.under_way[w.d];
  const bool fresh = !d || !d->under_way;
  if (fresh) d = std::make_shared<Accumulators>(), d->values.resize(32 * w.n / 2);
  Product product{d, &async_view(), w.thread->block->shared, w.thread->warp % 4, {}, w.a_registers != nullptr, w};
  for (int i = 0; i < 32; i++) {
    const Wgmma& lane = *static_cast<Wgmma*>(operands[i]);
    const auto& known = lane.thread->state<KnownRegisters>();
    if (lane.a != w.a || lane.b != w.b || lane.accumulate != w.accumulate)
      fail(wgmma_site, "the lanes of a warp give wgmma different operands");
    if ((fresh && !known.holds(lane.d, w.n / 2)) || (lane.a_registers && !known.holds(lane.a_registers, 4)))
      fail(wgmma_site, "registers of this wgmma were written after the last wgmma_fence that named them");
    if (lane.a_registers) std::copy_n(lane.a_registers, 4, product.a_registers[i]);
    if (fresh) copy_untracked(&d->values[i * w.n / 2], lane.d, w.n / 2 * sizeof(float));
    d->lanes[i] = lane.d, d->threads[i] = lane.thread;
    fill_nan(reinterpret_cast<std::byte*>(lane.d), w.n / 2 * sizeof(float));
  }
  d->under_way++;
  warp.groups.start(product);
}

const Collective kIssue{"wgmma", issue}, kCommit{"wgmma_commit", [](void* const (&operands)[32], uint32_t) {
  static_cast<Thread*>(operands[0])->state<WarpProducts>().groups.commit();
}};

struct Wait {
  Thread* thread;
  int pending;
};
const Collective kWait{"wgmma_wait", [](void* const (&operands)[32], uint32_t) {
  const Wait& w = *static_cast<Wait*>(operands[0]);
  w.thread->state<WarpProducts>().groups.wait(w.pending);
}};

}  // namespace

uint64_t wgmma_descriptor(const void* shared, int leading, int stride, Swizzle swizzle, Site site) {
  const size_t start = offset_of(shared);
  const auto field = [&](size_t bytes) {
    if (bytes % 16 || bytes >> 18)
      fail(site, "wgmma_descriptor: " + std::to_string(bytes) + " is no multiple of 16 below 2^18");
    return uint64_t(bytes >> 4);
  };
  return field(start) | field(leading) << 16 | field(stride) << 32 | uint64_t((4 - int(swizzle)) % 4) << 62;
}

size_t operand_offset(uint64_t descriptor, bool trans, int i, int k) {
  const auto field = [&](int bit) { return size_t(descriptor >> bit & kField) << 4; };
  const size_t start = field(0), leading = field(16), stride = field(32);
  const auto swizzle = Swizzle((4 - int(descriptor >> 62)) % 4);
  const size_t line = size_t(16) << int(swizzle), neighbours = line / 2;
  size_t offset;
  if (!trans) offset = i / 8 * stride + i % 8 * line + (swizzle == Swizzle::none ? k / 8 * leading + k % 8 * 2 : k * 2);
  else if (swizzle == Swizzle::none) offset = i / 8 * stride + k / 8 * leading + k % 8 * 16 + i % 8 * 2;
  else offset = i / neighbours * leading + k / 8 * stride + k % 8 * line + i % neighbours * 2;
  return swizzled(start + offset, swizzle);
}

void wgmma_fence(const void* registers, int count) { current->state<KnownRegisters>().keep(registers, count); }

namespace {

// A swizzle's pattern repeats after 8 lines. Elsewhere than in its first line a descriptor would need a base offset,
// which wgmma_descriptor does not give it.
void check_start(uint64_t descriptor, Site site) {
  const int swizzle = (4 - int(descriptor >> 62)) % 4;
  const size_t start = size_t(descriptor & kField) << 4, line = size_t(16) << swizzle;
  if (swizzle && start % (8 * line) >= line)
    fail(site, "a wgmma operand starts in the middle of its swizzle's pattern");
}

}  // namespace

void wgmma(Wgmma& lane, Site site) {
  if (!lane.a_registers) check_start(lane.a, site);
  check_start(lane.b, site);
  wgmma_site = site;
  collective(kIssue, ~0u, &lane, site);
}
void wgmma_commit(Site site) { collective(kCommit, ~0u, current, site); }
void wgmma_wait(int pending, Site site) {
  Wait w{current, pending};
  collective(kWait, ~0u, &w, site);
}

// ---------------------------------------------------------------- other blocks

void* map_rank(const void* shared, int rank, Site site) {
  check_shared(shared, 1, 1, "a mapped variable", site);
  return const_cast<void*>(static_cast<const void*>(at_rank(static_cast<const std::byte*>(shared), rank, site)));
}

}  // namespace pygpt::emulator
