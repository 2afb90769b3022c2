// Scratch memory: every thread that computes owns one arena, which hands out named regions.
//
// A region is one array, aligned to a cache line, with a vector to spare behind the elements asked for. It grows to the
// largest request of its thread and is kept, so that a call allocates nothing after the first; its content does not
// survive the call. The arena is freed when its thread ends. docs/measured.md C1 has the sizes that regions reach.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "../poison.h"
#include "parallel.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

// A name stands for one array, so two arrays that a thread needs at the same time have different names.
// clang-format off
enum class Region {
  // gemm
  packed_a, packed_b, partial_tiles, b_panel, sums, bias_gradient,
  // attention; packed_*_t holds an operand of a product that sums over its rows
  packed_q, packed_q_t, packed_k, packed_k_t, packed_v, packed_dout, packed_dout_t,
  scores, output_tiles, row_statistics, p_block, ds_block, ds_rows, dq_tiles, dq_begun, dk_tiles, dv_tiles,
  dq_partials, dq_partials_begun, dropout_factors, mask_gradient, slope_gradients, decode_rows, decode_scores,
  decode_partials,
  // norm
  weight, bias, summed_row, dropped_row, parameter_gradients, parameter_gradient_partials,
  // loss
  row_losses, class_sums,
  count,
};
// clang-format on

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() {
    for (int i = 0; i < int(Region::count); i++) {
      if (poison) check(i);
      std::free(buffers_[i].data);
    }
  }
  void* get(Region region, size_t bytes) {
    Buffer& buffer = buffers_[int(region)];
    if (poison) return get_guarded(int(region), bytes);
    if (bytes > buffer.bytes) {
      std::free(buffer.data);
      buffer = {};
      buffer.data = std::aligned_alloc(64, bytes);
      if (!buffer.data) throw std::bad_alloc();
      buffer.bytes = bytes;
    }
    return buffer.data;
  }

 private:
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
  };
  // A region in new memory between guard bands. Those of the request before are checked.
  void* get_guarded(int region, size_t bytes) {
    check(region);
    Buffer& buffer = buffers_[region];
    std::free(buffer.data);
    buffer = {std::aligned_alloc(64, bytes + 2 * kGuard), bytes};
    if (!buffer.data) throw std::bad_alloc();
    return guard(buffer.data, bytes);
  }
  void check(int region) const {
    const Buffer& buffer = buffers_[region];
    if (!buffer.data || is_intact(static_cast<char*>(buffer.data) + kGuard, buffer.bytes)) return;
    std::fprintf(stderr, "pygpt: PYGPT_POISON: a CPU kernel wrote outside of its scratch region %d\n", region);
    std::abort();
  }
  Buffer buffers_[int(Region::count)];
};

inline __attribute__((noinline)) void* scratch_bytes(Region region, size_t bytes) {
  static thread_local Arena arena;
  return arena.get(region, bytes);
}

// This thread's array of n elements. The next call for the same region may move it.
template <class T>
T* scratch(Region region, int64_t n) {
  return static_cast<T*>(scratch_bytes(region, (size_t(n) * sizeof(T) + 127) / 64 * 64));
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
