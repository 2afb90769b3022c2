// Which keys a query sees. Causal masks, masks aligned at the lower right and sliding windows are all of one kind.
//
// Query i stands at key i + diagonal. It sees `left` keys before that one and `right` keys after it:
//
//   keys(i) = [begin(i), end(i)) = [max(0, i + diagonal - left), min(k_len, i + diagonal + right + 1))
//
//   causal          left = unlimited, right = 0, diagonal = 0 (top-left) or k_len - q_len (lower right)
//   window (l, r)   left = l, right = r
//
// Neither end moves left as i grows. So a tile of the queries i0 .. i1 - 1 walks over the keys of walk(i0, i1), of
// which unmasked(i0, i1) need no mask, and skips all others. The queries that see a key are of the same kind:
// transposed().
#pragma once
#include <cstdint>

#if defined(__CUDACC__) || defined(__CUDA__)
#define PYGPT_HOST_DEVICE __host__ __device__
#else
#define PYGPT_HOST_DEVICE
#endif

namespace pygpt {

template <class Int>
struct Range {
  Int begin, end;  // empty if end <= begin
  PYGPT_HOST_DEVICE Int size() const { return end > begin ? end - begin : 0; }
};

template <class Int>
struct Visible {
  Int q_len, k_len;
  Int diagonal;
  Int left, right;  // at most q_len + k_len, which is unlimited

  // The first key that query i sees, and the key after the last one. begin(i) >= end(i) if it sees none.
  PYGPT_HOST_DEVICE Int begin(Int i) const {
    const Int first = i + diagonal - left;
    return first > 0 ? first : 0;
  }
  PYGPT_HOST_DEVICE Int end(Int i) const {
    const Int last = i + diagonal + right + 1;
    return last < k_len ? last : k_len;
  }
  // The keys that some of the queries i0 .. i1 - 1 see.
  PYGPT_HOST_DEVICE Range<Int> walk(Int i0, Int i1) const { return {begin(i0), end(i1 - 1)}; }
  // The keys that all of these queries see.
  PYGPT_HOST_DEVICE Range<Int> unmasked(Int i0, Int i1) const { return {begin(i1 - 1), end(i0)}; }

  PYGPT_HOST_DEVICE bool sees(Int i, Int j) const { return begin(i) <= j && j < end(i); }
  PYGPT_HOST_DEVICE bool sees_one_key(Int i) const { return end(i) - begin(i) == 1; }
  // The distance of key j from query i's own, for ALiBi.
  PYGPT_HOST_DEVICE Int distance(Int i, Int j) const {
    const Int d = j - i - diagonal;
    return d < 0 ? -d : d;
  }

  // Which queries a key sees, where seeing is mutual.
  PYGPT_HOST_DEVICE Visible transposed() const { return {k_len, q_len, -diagonal, right, left}; }
};

}  // namespace pygpt
