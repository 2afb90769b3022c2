#include "ptx.h"

#include <algorithm>

namespace pygpt::emulator {

// ---------------------------------------------------------------- ldmatrix

namespace {
struct Load {
  uint32_t* fragment;
  const MatrixRow* row;
};

// The cycles that the banks need to deliver eight rows: the largest number of different words in one bank.
int bank_cycles(void* const* lanes) {
  uintptr_t rows[8];
  int turns[8] = {};  // for each group of four banks; a row of 16 bytes occupies one group
  for (int i = 0; i < 8; i++) {
    rows[i] = reinterpret_cast<uintptr_t>(static_cast<Load*>(lanes[i])->row->address) / 16;
    if (std::find(rows, rows + i, rows[i]) == rows + i) turns[rows[i] % 8]++;
  }
  return *std::max_element(turns, turns + 8);
}

template <int count, bool transposed>
void distribute(void* const (&lanes)[32], uint32_t) {
  uint16_t element[count][8][8];
  for (int l = 0; l < 8 * count; l++) std::memcpy(element[l / 8][l % 8], static_cast<Load*>(lanes[l])->row->bytes, 16);
  for (int l = 0; l < 32; l++)
    for (int m = 0; m < count; m++) {
      const int g = l / 4, t = l % 4 * 2;
      const uint16_t low = transposed ? element[m][t][g] : element[m][g][t];
      const uint16_t high = transposed ? element[m][t + 1][g] : element[m][g][t + 1];
      static_cast<Load*>(lanes[l])->fragment[m] = low | uint32_t(high) << 16;
    }
  statistics.ldmatrix_phases += count;
  for (int m = 0; m < count; m++) statistics.ldmatrix_cycles += bank_cycles(&lanes[8 * m]);
}
}  // namespace

void load_matrices(uint32_t* fragment, int count, bool transposed, MatrixRow& row, Site site) {
  static const Collective ops[2][2] = {
      {{"ldmatrix_x2", distribute<2, false>}, {"ldmatrix_x2_trans", distribute<2, true>}},
      {{"ldmatrix_x4", distribute<4, false>}, {"ldmatrix_x4_trans", distribute<4, true>}}};
  Load operand{fragment, &row};
  collective(ops[count == 4][transposed], 0xFFFFFFFFu, &operand, site);
}

// ---------------------------------------------------------------- mma

namespace {
struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// Row g, columns 2t and 2t + 1 of A, B^T and D belong to lane 4g + t.
template <class T>
void multiply(void* const (&lanes)[32], uint32_t) {
  using cuda::to_float;
  uint16_t a16[16 * 16], b16[16 * 8];
  float a[16 * 16], b[16 * 8], d[16 * 8];
  for (int l = 0; l < 32; l++) {
    const auto& x = *static_cast<Product*>(lanes[l]);
    const int g = l / 4, t = l % 4 * 2;
    for (int i = 0; i < 4; i++) std::memcpy(&a16[16 * (g + i % 2 * 8) + t + i / 2 * 8], &x.a[i], 4);
    for (int i = 0; i < 2; i++) {
      uint16_t* pair = &b16[8 * (t + 8 * i) + g];
      pair[0] = uint16_t(x.b[i]), pair[8] = uint16_t(x.b[i] >> 16);
    }
    for (int i = 0; i < 2; i++) std::memcpy(&d[8 * (g + 8 * i) + t], &x.d[2 * i], 8);
  }
  for (int i = 0; i < 256; i++) a[i] = to_float(T{a16[i]});
  for (int i = 0; i < 128; i++) b[i] = to_float(T{b16[i]});
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) d[8 * m + n] += a[16 * m + k] * b[8 * k + n];
  for (int l = 0; l < 32; l++) {
    const int g = l / 4, t = l % 4 * 2;
    for (int i = 0; i < 2; i++) std::memcpy(static_cast<Product*>(lanes[l])->d + 2 * i, &d[8 * (g + 8 * i) + t], 8);
  }
  statistics.mma++;
}
}  // namespace

void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  static const Collective op{"mma_m16n8k16<bf16>", multiply<cuda::bf16>};
  Product operand{d, a, {b0, b1}};
  collective(op, 0xFFFFFFFFu, &operand, site);
}

void multiply_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  static const Collective op{"mma_m16n8k16<f16>", multiply<cuda::f16>};
  Product operand{d, a, {b0, b1}};
  collective(op, 0xFFFFFFFFu, &operand, site);
}

// ---------------------------------------------------------------- cp.async

namespace {
struct AsyncCopy {
  void* to;
  const void* from;
  void apply() const {
    alignas(16) static const std::byte zeros[16] = {};
    copy_untracked(to, from ? from : zeros, 16);
    statistics.async_copies++;
  }
};
Groups<AsyncCopy>& copies() { return current->state<Groups<AsyncCopy>>(); }
}  // namespace

void start_copy(void* to, const void* from) { copies().start({to, from}); }
void commit_copies() { copies().commit(); }
void wait_for_copies(int pending) { copies().wait(size_t(pending)); }

}  // namespace pygpt::emulator
