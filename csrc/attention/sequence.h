// Where the sequences of a call lie. Dense: every batch entry has q_len queries and k_len keys. Packed: sequence b is
// the rows cu_seq_q[b] .. cu_seq_q[b + 1] - 1 of one long tensor of queries, and likewise of keys, of which the first
// seqused_k[b] are used.
//
// Query heads are grouped: the heads h group .. h group + group - 1 share key and value head h.
#pragma once
#include "visible.h"

namespace pygpt {

struct Sequence {
  int64_t q_row, k_row;  // the first row in the tensors
  int64_t q_len, k_len;
};

struct Sequences {
  int64_t q_len, k_len;  // packed: the longest that may occur
  const int32_t *cu_seq_q, *cu_seq_k;  // (batch + 1), or null: dense
  const int32_t* seqused_k;            // (batch), or null
  int64_t total_q, total_k;            // packed: the rows of the tensors, which may end with rows of no sequence

  PYGPT_HOST_DEVICE Sequence operator()(int64_t b) const {
    if (!cu_seq_q) return {0, 0, q_len, k_len};
    const int64_t q = cu_seq_q[b], k = cu_seq_k[b];
    return {q, k, cu_seq_q[b + 1] - q, seqused_k ? seqused_k[b] : cu_seq_k[b + 1] - k};
  }
};

// How far queries see in every sequence. From it and a sequence follows which keys they see.
struct Reach {
  int64_t left = -1, right = -1;  // -1: unlimited
  bool lower_right = false;       // whether the diagonal ends at the last key, not starts at the first

  template <class Int>
  PYGPT_HOST_DEVICE Visible<Int> visible(int64_t q_len, int64_t k_len) const {
    const int64_t unlimited = q_len + k_len;
    const auto limit = [&](int64_t x) { return Int(x < 0 || x > unlimited ? unlimited : x); };
    return {Int(q_len), Int(k_len), Int(lower_right ? k_len - q_len : 0), limit(left), limit(right)};
  }
};

}  // namespace pygpt
