"""Attention's configurations: tile sizes, warps and stages by target, head dimension and element size."""

from ..common import TARGETS, Config, Configs

# Candidates (BLOCK_M, BLOCK_N, num_warps, num_stages), the best first, by (bucket, itemsize), or by (bucket, itemsize,
# target) where a target needs its own. The bucket is the largest padded head dimension. None of them spills registers
# (docs/measured.md T4).
FWD_CANDIDATES = {
    (64, 2): ((128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 2)),
    (64, 2, "sm80"): ((128, 64, 8, 3), (64, 64, 4, 3)),
    (64, 2, "gfx942"): ((128, 64, 4, 3), (64, 64, 4, 2)),
    (128, 2): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2)),
    (128, 2, "sm80"): ((128, 32, 8, 3), (64, 32, 4, 2)),
    (128, 2, "sm100"): ((128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2)),
    (128, 2, "gfx942"): ((128, 32, 8, 2), (64, 32, 4, 2)),
    (256, 2): ((128, 32, 8, 2), (64, 32, 8, 1)),
    (256, 2, "sm80"): ((64, 64, 8, 1),),
    (256, 2, "gfx942"): ((64, 32, 8, 2), (32, 32, 8, 2)),
    (64, 4): ((64, 16, 8, 1), (32, 16, 4, 1)),
    (128, 4): ((64, 16, 8, 1), (32, 16, 8, 1)),
    (256, 4): ((32, 16, 8, 1), (16, 16, 8, 1)),
}
DKDV_CANDIDATES = {
    (64, 2): ((64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 1)),
    (64, 2, "sm80"): ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)),
    (64, 2, "gfx942"): ((32, 128, 8, 1), (32, 64, 4, 2)),
    (128, 2): ((64, 64, 8, 2), (32, 64, 8, 1)),
    (128, 2, "sm100"): ((64, 64, 8, 1), (32, 64, 8, 1)),
    (128, 2, "gfx942"): ((32, 64, 8, 1), (32, 32, 8, 1)),
    (256, 2): ((32, 128, 8, 2), (32, 64, 8, 2)),
    (256, 2, "sm80"): ((32, 64, 8, 1), (16, 64, 8, 1)),
    (256, 2, "gfx942"): ((16, 64, 8, 1), (16, 32, 8, 1)),
    (64, 4): ((16, 64, 8, 1), (16, 32, 4, 1)),
    (128, 4): ((16, 32, 8, 1), (16, 16, 8, 1)),
    (256, 4): ((16, 16, 8, 1),),
}
DQ_CANDIDATES = {
    (64, 2): ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)),
    (64, 2, "sm80"): ((64, 64, 4, 2), (64, 32, 4, 2)),
    (64, 2, "gfx942"): ((64, 64, 4, 2), (64, 32, 4, 1)),
    (128, 2): ((128, 64, 8, 2), (64, 32, 8, 1)),
    (128, 2, "sm80"): ((128, 32, 8, 2), (64, 64, 8, 2)),
    (128, 2, "gfx942"): ((64, 32, 8, 1),),
    (256, 2): ((128, 32, 8, 2), (64, 32, 8, 2)),
    (256, 2, "sm80"): ((64, 32, 8, 1),),
    (256, 2, "gfx942"): ((64, 16, 8, 1), (32, 16, 8, 1)),
    (64, 4): ((64, 16, 8, 1), (32, 16, 4, 1)),
    (64, 4, "sm80"): ((32, 16, 8, 1), (32, 16, 4, 1)),
    (128, 4): ((32, 16, 8, 1), (16, 16, 8, 1)),
    (256, 4): ((16, 16, 8, 1),),
}

# The same for packed sequences, which are not read by TMA and whose statistics of rows are not aligned: both take
# registers.
PACKED_FWD_CANDIDATES = FWD_CANDIDATES | {(128, 2, "sm100"): ((128, 32, 8, 3), (64, 64, 4, 2))}
PACKED_DKDV_CANDIDATES = DKDV_CANDIDATES | {
    (128, 2, "gfx942"): ((16, 64, 8, 1),),
    (256, 2, "sm90"): ((32, 64, 8, 2),),  # Triton 3.6 serializes the larger tile's wgmma
}

# The same for scores that are not only scaled, whose terms take registers.
GENERAL_FWD_CANDIDATES = {
    (64, 2): ((128, 64, 8, 2), (64, 32, 4, 2)),
    (64, 2, "gfx942"): ((64, 32, 4, 2),),
    (128, 2): ((64, 64, 8, 1),),
    (128, 2, "gfx942"): ((64, 32, 8, 1),),
    (256, 2): ((64, 32, 8, 1),),
    (256, 2, "gfx942"): ((32, 16, 8, 1),),
    (64, 4): ((32, 16, 8, 1),),
    (128, 4): ((32, 16, 8, 1),),
    (256, 4): ((16, 16, 8, 1),),
}
GENERAL_DKDV_CANDIDATES = {
    (64, 2): ((32, 64, 4, 2),),
    (64, 2, "sm80"): ((32, 32, 4, 1),),
    (64, 2, "sm100"): ((32, 64, 8, 1),),
    (128, 2): ((32, 64, 8, 1),),
    (128, 2, "sm90"): ((16, 64, 8, 1),),
    (128, 2, "gfx942"): ((16, 32, 8, 1),),
    (256, 2): ((16, 16, 8, 1),),  # larger tiles spill; this one is too small for wgmma and tcgen05
    (256, 2, "sm80"): ((32, 32, 8, 1),),
    (256, 2, "gfx942"): ((16, 32, 8, 1),),
    (64, 4): ((16, 32, 8, 1),),
    (128, 4): ((16, 16, 8, 1),),
    (256, 4): ((16, 16, 8, 1),),
}
GENERAL_DQ_CANDIDATES = {
    (64, 2): ((64, 64, 8, 2), (64, 32, 4, 2)),
    (64, 2, "sm80"): ((64, 32, 4, 2),),
    (64, 2, "gfx942"): ((64, 32, 4, 2),),
    (128, 2): ((64, 32, 8, 1),),
    (128, 2, "gfx942"): ((16, 32, 8, 1),),
    (256, 2): ((16, 16, 8, 1),),
    (256, 2, "sm80"): ((32, 32, 8, 1),),
    (256, 2, "gfx942"): ((32, 16, 8, 1),),
    (64, 4): ((32, 16, 8, 1),),
    (128, 4): ((16, 16, 8, 1),),
    (256, 4): ((16, 16, 8, 1),),
}
DMASK_CANDIDATES = {
    (64, 2): ((64, 64, 8, 2),),
    (64, 2, "sm80"): ((32, 32, 4, 1),),
    (128, 2): ((64, 32, 8, 1),),
    (128, 2, "sm80"): ((16, 32, 8, 1),),
    (128, 2, "sm100"): ((64, 64, 8, 1),),
    (128, 2, "gfx942"): ((16, 32, 8, 1),),
    (256, 2): ((64, 32, 8, 1),),
    (256, 2, "sm80"): ((16, 16, 4, 1),),
    (256, 2, "gfx942"): ((32, 16, 8, 1),),
    (64, 4): ((16, 16, 8, 1),),
    (128, 4): ((16, 16, 8, 1),),
    (256, 4): ((16, 16, 8, 1),),
}


def _configs(candidates: dict) -> dict[tuple[str, int, int], Configs]:
    """A table such as FWD_CANDIDATES -> {(target, bucket, itemsize): Configs}."""

    def of_bucket(target, bucket, itemsize):
        shapes = candidates.get((bucket, itemsize, target)) or candidates[bucket, itemsize]
        configs = (Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages) for m, n, warps, stages in shapes)
        return Configs(f"{target}, head dimension {bucket}, {itemsize} bytes", tuple(configs))

    return {(name, *key[:2]): of_bucket(name, *key[:2]) for name in TARGETS for key in candidates if len(key) == 2}


FWD, DKDV, DQ = _configs(FWD_CANDIDATES), _configs(DKDV_CANDIDATES), _configs(DQ_CANDIDATES)
PACKED_FWD, PACKED_DKDV = _configs(PACKED_FWD_CANDIDATES), _configs(PACKED_DKDV_CANDIDATES)
GENERAL_FWD, GENERAL_DKDV = _configs(GENERAL_FWD_CANDIDATES), _configs(GENERAL_DKDV_CANDIDATES)
GENERAL_DQ, DMASK = _configs(GENERAL_DQ_CANDIDATES), _configs(DMASK_CANDIDATES)
DELTA = Configs("any", (Config({"BLOCK_M": 32}, 4), Config({"BLOCK_M": 16}, 4)))
WIDE = 256  # the bucket in which registers hold the accumulators of dk or of dv, but not of both
GENERAL_WIDE = 128  # the same for scores that are not only scaled
