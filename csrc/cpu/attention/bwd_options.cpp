// The gradients of a float mask and of the sinks, with the names of attention/bwd.cpp:
//
//   dmask = dS, summed over the dimensions along which the mask was broadcast    dsink = -sum exp(sink - lse) delta
//
// dmask has a pass of its own unless main_pass_fills_dmask (bwd.cpp). The pass computes dS again.
#include <numeric>

#include "score_gradients.h"

namespace pygpt::cpu {
namespace PYGPT_ISA {
namespace {

// sum (BR, BC) += dS of one head's block. Packs the block's operands, whose products cost a hundred times as much.
template <class S, class T = Acc<S>>
void add_block(const QueryHead<S>& x, int64_t i0, int64_t j0, T* sum) {
  using U = Packed<S>;
  constexpr int d = PackElement<U>::kPackK, MR = Tiling<U>::MR, NR = Tiling<U>::NR, BR = cpu::PYGPT_ISA::BR<U>;
  const int64_t rows = std::min<int64_t>(BR, x.sequence.q_len - i0), keys = std::min(BC, x.sequence.k_len - j0);
  if (rows <= 0 || keys <= 0) return;
  const MaskEffect effect = x.mask_effect(i0, rows, j0, keys);
  if (effect == MaskEffect::hides_all) return;
  const Block block = {i0, rows, j0, keys, x.visible};
  const int64_t E = x.a.head_dim, Ev = x.a.v_dim, e_packs = packs_of<U>(E), v_packs = packs_of<U>(Ev);
  U *q = scratch<U>(Region::packed_q, BR * e_packs), *dout = scratch<U>(Region::packed_dout, BR * v_packs);
  U *k = scratch<U>(Region::packed_k, BC * e_packs), *v = scratch<U>(Region::packed_v, BC * v_packs);
  pack_a(q, x.queries(x.a.q).at(i0, 0), rows, E, scaling_reader<U>(x.a.scores.scale));
  pack_a(dout, x.queries(x.a.dout).at(i0, 0), rows, Ev);
  pack_b(k, x.keys(x.a.k).at(j0, 0).transposed(), keys, E);
  pack_b(v, x.keys(x.a.v).at(j0, 0).transposed(), keys, Ev);
  T lse[BR], delta[BR];
  fill_statistics(x, i0, BR, lse, delta);
  for (int64_t column = 0; column < keys; column += NR)
    for (int64_t i = 0; i < rows; i += MR) {
      const Range<int64_t> seen = block.keys_seen_by(i, MR);
      if (column >= seen.end || column + NR <= seen.begin) continue;
      const TileOperands<U, T> of = {q + i * e_packs,
                                     k + column * e_packs,
                                     dout + i * v_packs,
                                     v + column * v_packs,
                                     e_packs,
                                     v_packs,
                                     lse + i,
                                     delta + i,
                                     effect};
      gradient_tile<true>(x, of, i0 + i, j0 + column, [&](int r, int w, const auto&, const auto&, const auto& g) {
        for (int n = 0; n < d && i + r + n < rows; n++) {
          T* at = sum + (i + r + n) * BC + column + w * W<T>;
          store(at, load(at) + no_fma(g[n]));
        }
      });
    }
}

// dmask. A task owns a block of the mask and adds up, batch entry by batch entry and head by head, what the heads that
// share it make of dS; a dimension of the mask that is broadcast is one block, whose rows or columns are added up last.
template <class S>
void mask_gradient(const AttentionArgs& a) {
  using T = Acc<S>;
  constexpr int64_t BR = cpu::PYGPT_ISA::BR<Packed<S>>;
  const int64_t L = a.sequences.q_len, K = a.sequences.k_len;
  const int64_t(&stride)[4] = a.dmask.stride;
  const int64_t batch = stride[0] ? a.batch : 1, heads = stride[1] ? a.heads : 1;
  const int64_t row_blocks = stride[2] ? ceil_div(L, BR) : 1, key_blocks = stride[3] ? ceil_div(K, BC) : 1;
  // Calls f with the indices of a dimension of `size` that a task sums over: all, or one that it owns.
  const auto each = [](bool owned, int64_t own, int64_t size, int64_t step, const auto& f) {
    for (int64_t i = owned ? own : 0; i < (owned ? own + 1 : size); i += step) f(i);
  };
  parallel_for(batch * heads * row_blocks * key_blocks, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename PackElement<Packed<S>>::TileScope held;
    for (int64_t task = begin; task < end; task++) {
      const int64_t key_block = task % key_blocks, row_block = task / key_blocks % row_blocks,
                    h0 = task / key_blocks / row_blocks % heads, b0 = task / key_blocks / row_blocks / heads;
      T* sum = scratch<T>(Region::mask_gradient, BR * BC);
      std::fill(sum, sum + BR * BC, T(0));
      each(stride[0], b0, a.batch, 1, [&](int64_t b) {
        each(stride[1], h0, a.heads, 1, [&](int64_t h) {
          const QueryHead<S> x(a, b, h);
          each(stride[2], row_block * BR, L, BR, [&](int64_t i0) {
            each(stride[3], key_block * BC, K, BC, [&](int64_t j0) { add_block(x, i0, j0, sum); });
          });
        });
      });
      int64_t rows = std::min(BR, L - row_block * BR), columns = std::min(BC, K - key_block * BC);
      if (!stride[2]) {
        for (int64_t r = 1; r < BR; r++)
          for (int64_t c = 0; c < BC; c++) sum[c] += sum[r * BC + c];
        rows = 1;
      }
      if (!stride[3]) {
        for (int64_t r = 0; r < rows; r++) sum[r * BC] = std::accumulate(sum + r * BC, sum + r * BC + BC, T(0));
        columns = 1;
      }
      const auto store_as = [&](auto* to) {
        using M = std::remove_pointer_t<decltype(to)>;
        to += b0 * stride[0] + h0 * stride[1] + row_block * BR * stride[2] + key_block * BC * stride[3];
        for (int64_t r = 0; r < rows; r++)
          for (int64_t c = 0; c < columns; c += W<T>)
            store<M>(to + r * stride[2] + c, load(sum + r * BC + c), columns - c);
      };
      if (a.scores.mask_type == MaskType::storage) store_as(static_cast<S*>(a.dmask.data));
      else store_as(static_cast<T*>(a.dmask.data));
    }
  });
}

template <class S>
void sink_gradient(const AttentionArgs& a) {
  using T = Acc<S>;
  parallel_for(a.heads, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; h++) {
      double total = 0;
      for (int64_t b = 0; b < a.batch; b++) {
        const QueryHead<S> x(a, b, h);
        for (int64_t i = 0; i < x.sequence.q_len; i++) {
          const T lse = lse_of(x, i);
          if (lse < kInf<T> || lse != lse) total -= double(std::exp(x.sink() - lse) * delta_of(x, i));
        }
      }
      static_cast<T*>(a.dsink)[h] = T(total);
    }
  }, a.batch * a.sequences.q_len * a.v_dim);
}

}  // namespace

void mask_and_sink_gradients(const AttentionArgs& a) {
  visit(a.dtype, [&](auto s) {
    if (a.dmask.data) mask_gradient<decltype(s)>(a);
    if (a.dsink) sink_gradient<decltype(s)>(a);
  });
}

}  // namespace PYGPT_ISA
}  // namespace pygpt::cpu
