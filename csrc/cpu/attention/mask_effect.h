// What a mask does to a block of scores. Masks of padding hide or show whole blocks: the kernels skip those, or leave
// them as they are, and only the other blocks pay for the mask.
#pragma once
#include <algorithm>
#include <limits>

#include "../simd.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

enum class MaskEffect { hides, none, mixed };  // on all of the scores, on none of them, or neither

// A vector of a mask's elements, and which of them show a key, or change a score. M: of the mask, T: of the scores.
template <class M, class T>
struct MaskLanes {
  static constexpr int N = W<T>;
  using Flags = IVec<T>;
  static Flags shows(const M* m) { return load(m) != -std::numeric_limits<T>::infinity(); }
  static Flags changes(const M* m) { return load(m) != 0; }
};
template <class T>
struct MaskLanes<uint8_t, T> {
  static constexpr int N = kVectorBytes;
  using Flags = typename VectorOf<int8_t, N>::type;
  static Flags values(const uint8_t* m) {
    Flags v;
    std::memcpy(&v, m, N);
    return v;
  }
  static Flags shows(const uint8_t* m) { return values(m) != 0; }
  static Flags changes(const uint8_t* m) { return values(m) == 0; }
};

template <class Flags>
PYGPT_INLINE bool any(Flags flags) {
  uint64_t words[sizeof flags / 8], all = 0;
  std::memcpy(words, &flags, sizeof flags);
  for (uint64_t word : words) all |= word;
  return all;
}

// The effect of `rows` rows of n elements.
template <class T, class M>
MaskEffect mask_effect(const M* mask, int64_t rows, int64_t row_stride, int64_t n, int64_t stride) {
  using Lanes = MaskLanes<M, T>;
  constexpr int64_t kTogether = 8;  // rows after which the answer may be known
  typename Lanes::Flags shows = {}, changes = {};
  for (int64_t i = 0; i < rows; i++, mask += row_stride) {
    for (int64_t j = 0; j < n; j += Lanes::N) {
      const M* at = mask + j;
      M gathered[Lanes::N];
      if (stride != 1 || j + Lanes::N > n) {  // the last element fills the vector up
        for (int64_t lane = 0; lane < Lanes::N; lane++) gathered[lane] = mask[std::min(j + lane, n - 1) * stride];
        at = gathered;
      }
      shows |= Lanes::shows(at), changes |= Lanes::changes(at);
    }
    if (i % kTogether == 0 && any(shows) && any(changes)) return MaskEffect::mixed;
  }
  return !any(shows) ? MaskEffect::hides : any(changes) ? MaskEffect::mixed : MaskEffect::none;
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
