// What happens to a score between the product q k^T and the softmax, and to its weight after the softmax.
//
//   s = scale q_i . k_j
//   s = softcap tanh(s / softcap)                 if softcap > 0
//   s = s - slope |j - i - diagonal|              ALiBi (Press et al. 2021)
//   s = s + mask[b, h, i, j]                      a floating mask
//   s = -inf                                      where a boolean mask is false, or Visible does not see the key
//   p = exp(s - lse),  lse = log(sum_j exp(s_ij) + exp(sink_h))
//   p = dropped ? 0 : p / (1 - dropout_p)         lse is before dropout
//
// Dropout's bits are those of Philox4x32-10 (Salmon et al. 2011) with the call's seed as the key. The counter is
// (j / 4, i, b heads + h, 0), and key j takes word j % 4. A weight is dropped if its word is below `threshold`.
#pragma once
#include "visible.h"

namespace pygpt {

enum class MaskType { none, boolean, storage, statistics };  // storage: q's dtype; statistics: float, or double for f64

struct Scores {
  double scale;
  double softcap;  // 0: none
  const void* slopes;  // (batch or 1, heads) of the statistics' type, or null
  int64_t slope_stride;  // between batch entries; 0 if they share the slopes
  MaskType mask_type;
  const void* mask;  // (batch, heads, q_len, k_len) with these strides, 0 where it is broadcast
  int64_t mask_stride[4];
  const void* sink;  // (heads) of the statistics' type, or null
  const int64_t* seed;  // one number on the op's device, or null: no dropout
  uint64_t threshold;  // floor(dropout_p 2^32), at most 2^32
  double keep;  // the factor 1 / (1 - dropout_p) of the weights that are kept; 0 if dropout_p = 1

  // Whether scores are scaled and nothing else happens to them. A sink does not count.
  PYGPT_HOST_DEVICE bool scale_only() const { return softcap == 0 && !slopes && mask_type == MaskType::none && !seed; }
};

// ---------------------------------------------------------------- dropout's bits
// Turns the counter c into four random words. `multiply(a, x, high, low)` forms the 64-bit products of a constant with
// the words of x. Word is uint32_t or a vector of them.
template <class Word, class Multiply>
PYGPT_HOST_DEVICE inline void philox(Word (&c)[4], uint32_t key0, uint32_t key1, Multiply multiply) {
  for (int round = 0; round < 10; round++) {
    Word high0, low0, high1, low1;
    multiply(0xD2511F53u, c[0], high0, low0);
    multiply(0xCD9E8D57u, c[2], high1, low1);
    c[0] = high1 ^ c[1] ^ key0, c[1] = low1, c[2] = high0 ^ c[3] ^ key1, c[3] = low0;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}

// The random words of the keys 4 group .. 4 group + 3 in query row i of head `head` = b heads + h.
struct RandomWords {
  uint32_t word[4];
};
PYGPT_HOST_DEVICE inline RandomWords random_words(int64_t seed, uint32_t group, uint32_t i, uint32_t head) {
  uint32_t c[4] = {group, i, head, 0};
  philox(c, uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32),
         [](uint32_t a, uint32_t x, uint32_t& high, uint32_t& low) {
    const uint64_t product = uint64_t(a) * x;
    high = uint32_t(product >> 32), low = uint32_t(product);
  });
  return {{c[0], c[1], c[2], c[3]}};
}

}  // namespace pygpt
