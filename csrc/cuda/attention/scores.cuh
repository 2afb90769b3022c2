// What happens to a head's scores between q k^T and the softmax if it is more than a scale: softcap, ALiBi, a mask, and
// dropout after the softmax. csrc/attention/scores.h has the formulas. Kernels do all of it to a warp's accumulators.
//
// Every option is a field that the kernels test at run time, once for each tile. Tiles of dk and dv are transposed:
// their rows are keys and their columns queries.
#pragma once
#include "params.cuh"

namespace pygpt::cuda::attention {

// ---------------------------------------------------------------- tiles of a boolean mask
// Of each 32 x 32 tile of a boolean mask: whether it has a visible key. Where the mask is broadcast, so are its tiles.
constexpr int kMaskTile = 32;

struct MaskTiles {
  static constexpr bool kCanSkip = true;
  const uint8_t* of_head;  // or null: there is no boolean mask
  int64_t row_stride, key_stride;
  int q_len, k_len;

  __device__ __forceinline__ MaskTiles(const Params& params, int head)
      : of_head(params.scores.mask_tiles), row_stride(params.scores.mask_tiles_stride[2]),
        key_stride(params.scores.mask_tiles_stride[3]), q_len(params.visible.q_len), k_len(params.visible.k_len) {
    const int64_t* stride = params.scores.mask_tiles_stride;
    if (of_head) of_head += head / params.q.heads * stride[0] + head % params.q.heads * stride[1];
  }

  // Whether one of these rows may see one of these keys.
  __device__ __forceinline__ bool any(int row, int rows, int key, int keys) const {
    if (!of_head) return true;
    const int last_row = (min(row + rows, q_len) - 1) / kMaskTile, last_key = (min(key + keys, k_len) - 1) / kMaskTile;
    for (int i = row / kMaskTile; i <= last_row; i++)
      for (int j = key / kMaskTile; j <= last_key; j++)
        if (of_head[i * row_stride + j * key_stride]) return true;
    return false;
  }
};

// For calls without a mask.
struct NoMaskTiles {
  static constexpr bool kCanSkip = false;
  __device__ __forceinline__ NoMaskTiles(const Params&, int) {}
  __device__ __forceinline__ bool any(int, int, int, int) const { return true; }
};

template <Kind kind>
using Tiles = std::conditional_t<kind == Kind::general, MaskTiles, NoMaskTiles>;

// Sets params.scores and computes the tiles of a boolean mask.
Error prepare_scores(Params& params, const AttentionArgs& a, const Stream& stream);

// ---------------------------------------------------------------- the scores of a head
template <class T, bool transposed = false>
struct HeadScores {
  const Params& params;
  uint32_t head;  // counted through the batch, as dropout counts it
  float slope;
  const unsigned char* mask;

  __device__ __forceinline__ HeadScores(const Params& params, int head) : params(params), head(head), slope(0.0f) {
    const ScoreParams& scores = params.scores;
    const int batch = head / params.q.heads, h = head % params.q.heads;
    if (scores.slopes) slope = scores.slopes[batch * scores.slope_stride + h];
    const int64_t size = scores.mask_type == MaskType::boolean   ? 1
                         : scores.mask_type == MaskType::storage ? sizeof(T)
                                                                 : 4;
    mask = static_cast<const unsigned char*>(scores.mask) +
           (batch * scores.mask_stride[0] + h * scores.mask_stride[1]) * size;
  }

  // Turns q . k into scores, without Visible's mask. The tile starts at (row, column). Calls derivative(m, n, i, d)
  // with the derivative of softcap, if there is one.
  template <int M, int N, class F>
  __device__ __forceinline__ void apply(float (&s)[M][N][4], int row, int column, F derivative) const {
    const ScoreParams& scores = params.scores;
    if (scores.softcap > 0.0f)
      for_each_accumulator<M, N>([&](int m, int n, int i, int, int) {
        const float t = tanhf(s[m][n][i] * scores.scale_over_softcap);
        s[m][n][i] = __fmul_rn(scores.softcap, t);
        derivative(m, n, i, fmaf(-t, t, 1.0f));
      });
    else
      for_each_accumulator<M, N>(
          [&](int m, int n, int i, int, int) { s[m][n][i] = __fmul_rn(s[m][n][i], params.scale); });
    if (scores.slopes) {
      const float origin = distance_origin(row, column);
      for_each_accumulator<M, N>(
          [&](int m, int n, int i, int, int) { s[m][n][i] = fmaf(-slope, distance(origin, m, n, i), s[m][n][i]); });
    }
    switch (scores.mask_type) {
      case MaskType::none: break;
      case MaskType::boolean:
        for_each_mask_element<uint8_t, M, N>(row, column, [&](int m, int n, int i, uint8_t keep) {
          if (!keep) s[m][n][i] = -kInf;
        });
        break;
      case MaskType::storage:
        for_each_mask_element<T, M, N>(row, column, [&](int m, int n, int i, T x) { s[m][n][i] += to_float(x); });
        break;
      case MaskType::statistics:
        if constexpr (sizeof(T) != 4)
          for_each_mask_element<float, M, N>(row, column, [&](int m, int n, int i, float x) { s[m][n][i] += x; });
    }
  }

  // distance(distance_origin(row, column), m, n, i) is the distance of an accumulator's key from its query's own.
  __device__ __forceinline__ float distance_origin(int row, int column) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, right = column + 2 * t - (row + g);
    return static_cast<float>((transposed ? -right : right) - params.visible.diagonal);
  }
  static __device__ __forceinline__ float distance(float origin, int m, int n, int i) {
    const int right = 8 * n + i % 2 - (16 * m + i / 2 * 8);
    return fabsf(origin + static_cast<float>(transposed ? -right : right));
  }

  // Calls f(m, n, i, is_kept) for each accumulator of a tile at (row, column), in a call with dropout. Four
  // neighbouring keys of a row take the four words of one draw, so every lane makes one draw for its 4 accumulators of
  // an mma tile and its neighbour's, or neighbours', and gives away the words that are theirs.
  template <int M, int N, class F>
  __device__ __forceinline__ void dropout(const float (&)[M][N][4], int row, int column, F f) const {
    const int64_t seed = *params.scores.seed;
    const uint32_t threshold = params.scores.threshold;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++) {
        uint32_t w[4];  // the words of the accumulators
        if constexpr (transposed) {
          // Lanes g = 4a .. 4a + 3 share their keys' draws. Lane g % 4 = k draws for accumulator k of all four.
          const int k = g % 4;
          const RandomWords drawn =
              random_words(seed, (row + 16 * m + k / 2 * 8 + g) / 4, column + 8 * n + 2 * t + k % 2, head);
#pragma unroll
          for (int j = 0; j < 4; j++) w[j] = drawn.word[j];
          transpose_step<1>(w, g), transpose_step<2>(w, g);
        } else {
          // Lanes t = 2a and 2a + 1 share their keys' draws. The first draws for the upper row, the second for the
          // lower.
          const bool lower = t % 2;
          const RandomWords drawn =
              random_words(seed, (column + 8 * n + 2 * t) / 4, row + 16 * m + (lower ? 8 : 0) + g, head);
          const uint32_t first = __shfl_xor_sync(0xffffffffu, lower ? drawn.word[0] : drawn.word[2], 1);
          const uint32_t second = __shfl_xor_sync(0xffffffffu, lower ? drawn.word[1] : drawn.word[3], 1);
          w[0] = lower ? first : drawn.word[0], w[1] = lower ? second : drawn.word[1];
          w[2] = lower ? drawn.word[2] : first, w[3] = lower ? drawn.word[3] : second;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) f(m, n, i, w[i] >= threshold);
      }
  }

  // Whether dropout keeps key j of row i.
  __device__ __forceinline__ bool is_kept(int i, int j) const {
    const RandomWords drawn = random_words(*params.scores.seed, j / 4, i, head);
    const uint32_t word =
        j % 4 < 2 ? (j % 4 == 0 ? drawn.word[0] : drawn.word[1]) : (j % 4 == 2 ? drawn.word[2] : drawn.word[3]);
    return word >= params.scores.threshold;
  }

 private:
  // Half of the transpose of the words of 4 lanes, whose g differ in the last two bits.
  template <int BIT>
  static __device__ __forceinline__ void transpose_step(uint32_t (&w)[4], int g) {
    const bool upper = g & BIT;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (!(i & BIT)) {
        const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i | BIT], 4 * BIT);
        w[i] = upper ? received : w[i], w[i | BIT] = upper ? w[i | BIT] : received;
      }
  }

  // Calls f(m, n, i, mask element) for the accumulators inside the mask.
  template <class E, int M, int N, class F>
  __device__ __forceinline__ void for_each_mask_element(int row, int column, F f) const {
    const Visible<int>& visible = params.visible;
    const int64_t *stride = params.scores.mask_stride, row_stride = stride[transposed ? 3 : 2],
                  column_stride = stride[transposed ? 2 : 3];
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int rows = (transposed ? visible.k_len : visible.q_len) - row - g;
    const int columns = (transposed ? visible.q_len : visible.k_len) - column - 2 * t;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const E* from = reinterpret_cast<const E*>(mask) + (row + 16 * m + 8 * r + g) * row_stride +
                        (column + 2 * t) * column_stride;
#pragma unroll
        for (int n = 0; n < N; n++, from += 8 * column_stride) {
          if (16 * m + 8 * r >= rows) continue;
          if (8 * n < columns) f(m, n, 2 * r, from[0]);
          if (8 * n + 1 < columns) f(m, n, 2 * r + 1, from[column_stride]);
        }
      }
  }
};

// The accumulators that dropout keeps, one bit each.
template <int M, int N>
struct Kept {
  uint32_t bits[(M * N + 7) / 8];
  __device__ __forceinline__ Kept() {
#pragma unroll
    for (uint32_t& word : bits) word = 0;
  }
  __device__ __forceinline__ void set(int m, int n, int i, bool kept) {
    const int bit = (m * N + n) * 4 + i;
    if (kept) bits[bit / 32] |= 1u << bit % 32;
  }
  __device__ __forceinline__ bool operator()(int m, int n, int i) const {
    const int bit = (m * N + n) * 4 + i;
    return bits[bit / 32] >> bit % 32 & 1;
  }
};

}  // namespace pygpt::cuda::attention
