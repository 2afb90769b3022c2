"""What every kernel shares: types, launching, and the choice of a configuration.

Kernels read 16-bit or float32 tensors and compute in float32. Triton's interpreter (TRITON_INTERPRET=1, which runs
kernels in NumPy on CPU tensors) differs from a GPU: it holds bfloat16 as bare bits and multiplies these bits as if they
were integers, truncates where hardware rounds to nearest even, rounds an fma twice (before 3.9), and passes loop
bounds as arrays of one element, of which NumPy 2.4 makes no int (docs/measured.md T8). `dot`, `fma`, `to_storage` and
`loop_bound` correct all of this and are the only places where a kernel depends on where it runs. A kernel must also
convert bfloat16 with ``.to(tl.float32)`` before any arithmetic. tests/kernels/test_triton_interpreter.py shows the
interpreter's errors.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IN_NUMPY = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# ------------------------------------------------------------------------------- device functions
@triton.jit
def dot(a, b, acc):
    """acc + a b; float32 in true float32 (never TF32), 16-bit types on the tensor cores.

    On a GPU a sum does not depend on which operand comes first. In NumPy it may, except in float64.
    """
    if IN_NUMPY:
        a, b = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
        return acc + tl.dot(a, b, out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def to_storage(x, dtype: tl.constexpr):
    """float32 -> dtype, rounded to nearest even."""
    if IN_NUMPY and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)  # noqa: PLR0124
    else:
        return x.to(dtype)


@triton.jit
def fma(x, y, z):
    """x y + z, rounded once; y is a scalar. NumPy has no fma, but float64 holds the product exactly."""
    if IN_NUMPY:
        return (x.to(tl.float64) * tl.cast(y, tl.float32).to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def loop_bound(n):
    """n as a bound of tl.range."""
    if IN_NUMPY and isinstance(n, tl.tensor):
        return n.handle.data.item()
    else:
        return n


# ------------------------------------------------------------------------------- configurations
@dataclass(frozen=True)
class Config:
    """Constants of a kernel that change its speed but not its result."""

    blocks: dict
    num_warps: int = 4
    num_stages: int = 1


@dataclass
class Configs:
    """Candidates for one kernel, one target and one bucket of sizes, the best first.

    The first candidate that fits the device's registers and shared memory is used; Triton checks both before a launch.
    PYGPT_AUTOTUNE=1 measures all candidates on a GPU instead.
    """

    name: str  # names the bucket and is unique for its kernel
    candidates: tuple[Config, ...]
    chosen: dict = field(default_factory=dict)  # device -> Config


TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
TARGETS = ("sm80", "sm90", "sm100", "gfx942")  # the devices that configurations are shipped for
_target: str | None = None  # set by `compiling_for`
_observe: Callable | None = None
_targets: dict = {}  # device index -> target


def target(t: torch.Tensor) -> str:
    """The target whose configurations this tensor's device uses: the newest of TARGETS that is not newer than it."""
    if _target or t.device.type != "cuda":
        return _target or "sm90"
    if t.device.index not in _targets:
        if torch.version.hip:
            name = "gfx942"
        else:
            major = torch.cuda.get_device_capability(t.device)[0]
            name = "sm90" if major == 9 else "sm100" if major == 10 else "sm80"
        _targets[t.device.index] = name
    return _targets[t.device.index]


@contextmanager
def compiling_for(name: str, observe: Callable | None = None):
    """Inside, launchers choose the configurations of this target, whatever the device of their tensors.

    With observe, they start nothing but call observe(kernel, grid, args, constants, configs) instead.
    """
    global _target, _observe
    previous = _target, _observe
    _target, _observe = name, observe
    try:
        yield
    finally:
        _target, _observe = previous


# ------------------------------------------------------------------------------- tensor descriptors
@dataclass(frozen=True)
class Tiled:
    """An argument of `launch`: a tensor that the kernel reads in blocks through a tensor descriptor (TMA).

    block is the shape of a block; a name in it stands for that constant of the chosen Config.
    """

    tensor: torch.Tensor
    block: tuple[int | str, ...]

    @property
    def device(self):
        return self.tensor.device

    def descriptor(self, blocks: dict) -> TensorDescriptor:
        t = self.tensor
        return TensorDescriptor(t, list(t.shape), list(t.stride()), [blocks.get(n, n) for n in self.block])


def aligned(t: torch.Tensor) -> bool:
    """Whether elements are adjacent and rows begin at multiples of 16 bytes, as vector loads and descriptors need."""
    strides = [stride * t.itemsize for stride in t.stride()[:-1]]
    return t.numel() > 0 and t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in strides)


def tileable(*tensors: torch.Tensor) -> bool:
    """Whether tensor descriptors can read these tensors: the device has TMA, and all are aligned and within limits."""
    return target(tensors[0]) in ("sm90", "sm100") and all(
        aligned(t) and all(0 < stride * t.itemsize < 2**40 for stride in t.stride()) and max(t.shape) < 2**31
        for t in tensors
    )


# ------------------------------------------------------------------------------- launching
def launch(kernel, grid, *args, configs: Configs, fuse: bool = True, in_place: tuple = (), **constants):
    """kernel[grid(blocks)](*args, **constants, **blocks) on the device of the first tensor among args.

    grid maps the blocks of the chosen Config to the number of programs; nothing runs if that is 0.
    fuse says whether the compiler may contract a product and a sum into an fma. in_place: the tensors that the kernel
    overwrites after reading them, which a kernel can do only once, so that measuring must restore them.
    """
    constants["enable_fp_fusion"] = fuse
    if _observe is not None:
        return _observe(kernel, grid, args, constants, configs)
    device = _device(args)
    config = configs.chosen.get(device)
    switch = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if switch else nullcontext():
        if config is not None:
            return _start(kernel, grid, args, constants, config)
        if AUTOTUNE:
            configs.chosen[device] = _tuned(kernel, grid, args, constants, configs, in_place)
        for candidate in (configs.chosen[device],) if device in configs.chosen else configs.candidates:
            try:
                _start(kernel, grid, args, constants, candidate)
            except triton.runtime.errors.OutOfResources as e:
                refused = e
                continue
            configs.chosen[device] = candidate
            return None
        raise RuntimeError(f"pygpt: no configuration of {kernel.__name__} fits {device}: {refused}")


def _device(args) -> torch.device:
    return next(a for a in args if a is not None).device


def _start(kernel, grid, args, constants, config):
    programs = grid(config.blocks)
    if programs:
        args = [a.descriptor(config.blocks) if isinstance(a, Tiled) else a for a in args]
        intact = [a for a in args if isinstance(a, torch.Tensor) and _is_intact(a)] if POISON else []
        kernel[(programs,)](
            *args, **constants, **config.blocks, num_warps=config.num_warps, num_stages=config.num_stages
        )
        if not all(map(_is_intact, intact)):
            raise RuntimeError(f"pygpt: PYGPT_POISON: {kernel.__name__} wrote outside of a result or of scratch memory")


# ------------------------------------------------------------------------------- autotuning, on request
AUTOTUNE = os.environ.get("PYGPT_AUTOTUNE") == "1" and not INTERPRETED


def cache_file() -> Path:
    """The file with the choices of PYGPT_AUTOTUNE=1, in PYGPT_CACHE_DIR or in pygpt in the user's cache folder."""
    folder = os.environ.get("PYGPT_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pygpt"
    return (Path(folder) if folder else base) / "triton.json"


def read_cache() -> dict:
    """{key: index of a candidate}; empty where the file is missing or invalid."""
    try:
        content = json.loads(cache_file().read_text())
        return {k: v for k, v in content.items() if isinstance(v, int)} if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_cache(key: str, index: int):
    """Adds one entry by replacing the whole file. A folder that cannot be written is not an error."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".tmp-", delete=False) as file:
            json.dump({**read_cache(), key: index}, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        pass


def _tuned(kernel, grid, args, constants, configs: Configs, in_place=()) -> Config:
    device = torch.cuda.get_device_name(_device(args))
    blocks = ";".join(map(str, configs.candidates))
    key = f"{device} | triton {triton.__version__} | {kernel.__name__} | {configs.name} | {blocks}"
    index = read_cache().get(key)
    if index is None or not 0 <= index < len(configs.candidates):
        before = [t.clone() for t in in_place]
        index = _fastest(kernel, grid, args, constants, configs.candidates)
        for t, values in zip(in_place, before, strict=True):
            t.copy_(values)
        if not POISON:  # whose checks are in the times
            _write_cache(key, index)
    return configs.candidates[index]


def _fastest(kernel, grid, args, constants, candidates) -> int:
    times = []
    for candidate in candidates:
        try:
            times.append(triton.testing.do_bench(lambda c=candidate: _start(kernel, grid, args, constants, c)))
        except triton.runtime.errors.OutOfResources:
            times.append(float("inf"))
    return times.index(min(times))


# ------------------------------------------------------------------------------- helpers of launchers
def rows_of(t: torch.Tensor) -> torch.Tensor:
    """(..., C) as (rows, C) with adjacent elements: a view where the strides allow, else a copy."""
    t = t.reshape(-1, t.shape[-1]) if t.shape[-1] else t.new_empty(t.shape[:-1].numel(), 0)
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


POISON = os.environ.get("PYGPT_POISON") == "1"
BAND = 256  # bytes of a guard band, which keep the alignment


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous tensor for a kernel to write, on the device of ``like``."""
    if POISON:
        return _poisoned(like, shape, torch.empty(shape, device="meta").stride(), dtype or like.dtype)
    return like.new_empty(shape, dtype=dtype)


def empty_strided(like: torch.Tensor, shape, strides) -> torch.Tensor:
    """The same as `empty` with the given strides, which leave no gaps."""
    return _poisoned(like, shape, strides, like.dtype) if POISON else like.new_empty_strided(shape, strides)


def _poisoned(like: torch.Tensor, shape, strides, dtype: torch.dtype) -> torch.Tensor:
    """Such a tensor for PYGPT_POISON=1: it holds NaN, and so do two guard bands around it, which `launch` checks."""
    numel, band = math.prod(shape), BAND // dtype.itemsize
    storage = like.new_full((numel + 2 * band,), float("nan"), dtype=dtype).untyped_storage()
    storage.poisoned = dtype, storage.nbytes()  # of all tensors in it, views included
    return like.new_empty(0, dtype=dtype).set_(storage, band, shape, strides)


def _is_intact(t: torch.Tensor) -> bool:
    """Whether nothing has written to the guard bands of a tensor's memory. Memory that was resized has none."""
    storage = t.untyped_storage()
    dtype, nbytes = getattr(storage, "poisoned", (None, None))
    if dtype is None or storage.nbytes() != nbytes:
        return True
    size, band = nbytes // dtype.itemsize, BAND // dtype.itemsize
    whole = t.new_empty(0, dtype=dtype).set_(storage, 0, (size,), (1,))
    return bool(whole[:band].isnan().all() and whole[size - band :].isnan().all())


def in_order(t: torch.Tensor, strides) -> torch.Tensor:
    """t, or a copy of it, with these strides. Strides of dimensions with one element do not matter."""
    same = all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True))
    return t if same else t.new_empty_strided(t.shape, strides).copy_(t)


def contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """An optional tensor, contiguous because the kernel takes no strides for it."""
    return None if t is None else t.contiguous()
