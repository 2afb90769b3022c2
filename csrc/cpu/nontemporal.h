// Non-temporal stores, which write large results past the caches.
//
// A store to a line that is in no cache first reads that line. A call that moves more bytes than the caches hold finds
// none of its results there afterwards, so it writes past the caches and saves these reads (docs/measured.md C13).
#pragma once
#include <fstream>

#include "simd.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {

// Whether a call that reads and writes so many bytes exceeds the third-level cache. (sysconf would count a socket's
// caches.)
inline bool exceeds_caches(int64_t bytes) {
  static const int64_t size = [] {
    int64_t kib = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
    return (kib > 0 ? kib : 32 << 10) << 10;
  }();
  return bytes > size;
}

#if defined(__x86_64__)
template <class V>
PYGPT_INLINE void store_vector_nontemporal(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 32) _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
  if constexpr (sizeof v == 16) _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
  if constexpr (sizeof v == 8) _mm_stream_si64(static_cast<long long*>(p), bit_cast<long long>(v));
}
#endif

// Writes past the caches if p is aligned to the store's size, else into them.
template <class S>
PYGPT_INLINE void store_nontemporal(S* p, Vec<Acc<S>> x, int64_t n) {
#if defined(__x86_64__)
  if (n >= W<Acc<S>> && reinterpret_cast<uintptr_t>(p) % (W<Acc<S>> * sizeof(S)) == 0) {
    if constexpr (sizeof(S) == 2) store_vector_nontemporal(p, narrow(x, S{}));
    else store_vector_nontemporal(p, x);
    return;
  }
#endif
  store(p, x, n);
}
template <class S>
PYGPT_INLINE void store_even_odd_nontemporal(S* p, Vec<Acc<S>> a, Vec<Acc<S>> b) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<S, bf16>) {
    if (reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0) return store_vector_nontemporal(p, zip_bf16(a, b));
    return store_even_odd(p, a, b);
  }
#endif
  store_nontemporal(p, a, W<Acc<S>>), store_nontemporal(p + W<Acc<S>>, b, W<Acc<S>>);
}

// Stores one task's part of the results, past the caches or into them.
template <bool nontemporal>
struct Writer {
  template <class S>
  PYGPT_INLINE void operator()(S* p, Vec<Acc<S>> x, int64_t n) const {
    nontemporal ? store_nontemporal(p, x, n) : store(p, x, n);
  }
  template <class S>
  PYGPT_INLINE void operator()(S* p, Vec<Acc<S>> a, Vec<Acc<S>> b) const {  // the halves of load_even_odd
    nontemporal ? store_even_odd_nontemporal(p, a, b) : store_even_odd(p, a, b);
  }

  // Orders the stores so far before those that follow, which may be to the same line.
  PYGPT_INLINE void fence() const {
#if defined(__x86_64__)
    if (nontemporal) _mm_sfence();
#endif
  }

  // Prefetches the next input; p may be any address. The hardware prefetcher does not help while a core writes past the
  // caches.
  template <class S>
  PYGPT_INLINE void prefetch(const S* p) const {
    if (nontemporal) __builtin_prefetch(p);
  }
};

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
