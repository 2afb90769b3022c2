// Prepares the options of attention: which tiles of a boolean mask have a visible key.
#include "scores.cuh"

namespace pygpt::cuda::attention {
namespace {

constexpr int kWarps = 8;

struct MaskGeometry {
  const uint8_t* mask;
  int64_t stride[4];
  int64_t heads, row_tiles, key_tiles, tiles;  // of what is not broadcast; tiles: of all heads
  int q_len, k_len;
  uint8_t* any;  // (batch, heads, row_tiles, key_tiles)
};

// A warp reads one tile. Each lane reads a column.
__global__ void __launch_bounds__(32 * kWarps) attention_mask_tiles_kernel(const MaskGeometry g) {
  const int64_t tile = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (tile >= g.tiles) return;
  const int64_t head = tile / (g.key_tiles * g.row_tiles);
  const int row0 = int(tile / g.key_tiles % g.row_tiles) * kMaskTile;
  const int key = int(tile % g.key_tiles) * kMaskTile + threadIdx.x % 32;
  const uint8_t* from = g.mask + head / g.heads * g.stride[0] + head % g.heads * g.stride[1];
  bool any = false;
  if (key < g.k_len)
    for (int row = row0; row < min(row0 + kMaskTile, g.q_len); row++)
      any = any || from[row * g.stride[2] + key * g.stride[3]];
  any = __any_sync(0xffffffffu, any);
  if (threadIdx.x % 32 == 0) g.any[tile] = any;
}

}  // namespace

Error prepare_scores(Params& params, const AttentionArgs& a, const Stream& stream) {
  const Scores& from = a.scores;
  ScoreParams& to = params.scores;
  to.softcap = static_cast<float>(from.softcap);
  to.scale_over_softcap = from.softcap > 0 ? static_cast<float>(from.scale / from.softcap) : 0.0f;
  to.slopes = static_cast<const float*>(from.slopes), to.slope_stride = from.slope_stride;
  to.mask_type = from.mask_type, to.mask = from.mask;
  std::copy_n(from.mask_stride, 4, to.mask_stride);
  to.seed = from.seed, to.threshold = static_cast<uint32_t>(std::min<uint64_t>(from.threshold, 0xffffffffu));
  to.keep = from.seed ? static_cast<float>(from.keep) : 1.0f;
  if (from.mask_type != MaskType::boolean) return nullptr;

  // Where the mask is broadcast, it has one row, key, head or batch entry.
  const auto size = [&](int d, int64_t n) { return from.mask_stride[d] ? n : std::min<int64_t>(n, 1); };
  MaskGeometry g{};
  g.mask = static_cast<const uint8_t*>(from.mask), std::copy_n(from.mask_stride, 4, g.stride);
  g.q_len = static_cast<int>(size(2, a.sequences.q_len)), g.k_len = static_cast<int>(size(3, a.sequences.k_len));
  g.heads = size(1, a.heads), g.row_tiles = ceil_div(g.q_len, kMaskTile), g.key_tiles = ceil_div(g.k_len, kMaskTile);
  g.tiles = size(0, a.batch) * g.heads * g.row_tiles * g.key_tiles;
  if (g.tiles == 0) return nullptr;
  if (ceil_div(g.tiles, kWarps) > kMaxHeads) return "attention: the mask has more than 2^33 tiles";
  g.any = static_cast<uint8_t*>(stream.scratch(g.tiles));
  to.mask_tiles = g.any;
  const int64_t strides[4] = {g.heads * g.row_tiles * g.key_tiles, g.row_tiles * g.key_tiles, g.key_tiles, 1};
  for (int d = 0; d < 4; d++) to.mask_tiles_stride[d] = from.mask_stride[d] ? strides[d] : 0;
  return launch(attention_mask_tiles_kernel, make_grid(ceil_div(g.tiles, kWarps)), dim3(32 * kWarps), 0, stream, g);
}

}  // namespace pygpt::cuda::attention
