// What a mask does to a block of scores. A mask of padding hides or shows whole blocks. Kernels skip a hidden block and
// leave a shown one as it is. So only the other blocks pay for the mask.
#pragma once
#include <algorithm>
#include <limits>

#include "../simd.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

// hides_all: of boolean masks alone. Behind a floating mask of -inf, a NaN in a key or value stays NaN, as in
// PyTorch.
enum class MaskEffect { hides_all, changes_none, mixed };  // mixed: anything else

// A vector of a mask's elements: which of them change a score, and which show a key. M is the mask's type, T the
// scores'.
template <class M, class T>
struct MaskLanes {
  static constexpr int N = W<T>;
  using Flags = IVec<T>;
  static Flags shows(const M*) { return ~Flags{}; }
  static Flags changes(const M* m) { return load(m) != 0; }
};
template <class T>
struct MaskLanes<uint8_t, T> {
  static constexpr int N = kVectorBytes;
  using Flags = typename VectorOf<int8_t, N>::type;
  static Flags shows(const uint8_t* m) { return values(m) != 0; }
  static Flags changes(const uint8_t* m) { return values(m) == 0; }

 private:
  static Flags values(const uint8_t* m) {
    Flags v;
    std::memcpy(&v, m, N);
    return v;
  }
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
  constexpr int64_t N = Lanes::N, kRowsPerCheck = 8;
  typename Lanes::Flags shows = {}, changes = {};
  for (int64_t i = 0; i < rows; i++, mask += row_stride) {
    for (int64_t j = 0; j < n; j += N) {
      M gathered[N];
      const M* at = gathered;
      if (stride == 1 && n >= N) at = mask + std::min(j, n - N);  // the last vector may overlap the one before it
      else
        for (int64_t lane = 0; lane < N; lane++)  // the last element fills the vector up
          gathered[lane] = mask[std::min(j + lane, n - 1) * stride];
      shows |= Lanes::shows(at), changes |= Lanes::changes(at);
    }
    if (i % kRowsPerCheck == 0 && any(shows) && any(changes)) return MaskEffect::mixed;
  }
  return !any(shows) ? MaskEffect::hides_all : any(changes) ? MaskEffect::mixed : MaskEffect::changes_none;
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
