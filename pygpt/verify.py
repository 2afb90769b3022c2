"""The exactness rule, which `pygpt verify` and the tests share.

Inputs and upstream gradients are drawn at random and rounded to the dtype d. Three results are computed from the same
rounded values: x64, the reference in float64 (`reference.<op>_fwd`/`_bwd`); PyTorch's own in d (the ordinary expression
`reference.<op>` and autograd); ours in d (`pygpt.functional`). Then

    error(x) = max |x - x64| / scale        scale = max(|x64|, |cancelled|) over the whole result
    ours passes  iff  error(ours) <= 2 error(PyTorch) + ULPS eps(accumulator) + eps(d) / 2

The allowance is a few roundings while accumulating (in float32, or float64 for float64) and one rounding of the result.
It matters where PyTorch happens to be exact.

``cancelled`` is the largest of the terms that cancel in the input gradient of a softmax or a norm. Where they cancel
completely (one key, rows of width 1), the result consists of rounding errors alone. Small results are drawn several
times, so that one lucky element decides for neither side. For the same reason a direction fails only after MOST draws,
by the largest errors and the largest scale of all draws.

For float64 there is no wider reference: x64 has rounding errors of its own, and PyTorch's may be the same ones.
PyTorch's error is therefore taken as its error in float32, which can be measured, times eps(float64) / eps(float32), if
that is larger.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from . import (
    functional,  # noqa: F401 (registers the ops)
    threads,
)
from .data import UsageError, check_memory, check_number
from .dispatch import OPS, REFERENCE, SPECS, TABLE, chosen, ops_by_name, pick, tensors_of
from .dispatch import backend as use_backend
from .ops.common import as_tuple, lead
from .progress import table

Dims = dict[str, Any]  # the sizes of an op by the keys of --shape
ULPS = 4.0
REDRAWN = 8
ELEMENTS, DRAWS, MOST = 512, 24, 96  # elements or draws after which an op may pass, and draws after which it fails
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES.values()}


class Judged:
    """The rule on a result's error: ``ours``, and PyTorch's own as ``torch``. ``allowance`` is for a few roundings."""

    ours: float  # error
    torch: float  # PyTorch's error
    allowance: float

    @property
    def ratio(self) -> float:
        """Our error over PyTorch's own."""
        return self.ours / self.torch if self.torch else math.inf if self.ours else 1.0

    @property
    def passed(self) -> bool:
        """Whether our error is at most twice PyTorch's own plus the allowance; False for NaN."""
        return self.ours <= 2.0 * self.torch + self.allowance


@dataclass(frozen=True)
class Row(Judged):
    """The error of one direction of an op, "fwd" or a gradient such as "dq": ``ours``, and PyTorch's own as ``torch``.

    Both are relative to the largest value of the reference. ``allowance`` is for a few roundings.
    """

    op: str
    shape: str
    dtype: str
    backend: str
    direction: str
    ours: float  # error
    torch: float  # PyTorch's error
    allowance: float


# ------------------------------------------------------------------------------- measuring
def complete(op: str, dims: Dims) -> Dims:
    """``dims`` with the op's defaults filled in. UsageError for a key that the op does not have."""
    _check_keys(op, dims)
    full = {**SPECS[op].dims, **dims}
    return {key: value(full) if callable(value) else value for key, value in full.items()}


def _check_keys(op: str, keys: Collection[str]) -> None:
    if unknown := [key for key in keys if key not in SPECS[op].dims]:
        raise UsageError(f"verify: {op} has no dimension {unknown[0]!r}; it has {', '.join(SPECS[op].dims)}")


def describe(op: str, dims: Dims) -> str:
    return ",".join(f"{key}={'x'.join(map(str, lead(value)))}" for key, value in complete(op, dims).items())


def draw(
    op: str,
    dims: Dims,
    dtype: torch.dtype,
    generator: torch.Generator | None,
    view: Callable[[Tensor], Tensor] = lambda t: t,
    device: str = "cpu",
) -> tuple[tuple, tuple[Tensor, ...]]:
    """Canonical arguments and upstream gradients for ``op``, rounded to ``dtype`` and passed through ``view``.

    The CPU ``generator`` draws the values for any device. They are drawn anew, a few times, until the op's Spec is
    settled.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def rounded(a: Any, dtype: torch.dtype = dtype) -> Any:
        if _is_floating(a):
            return view(a.to(device, dtype))
        return a.to(device) if isinstance(a, Tensor) else a

    for _ in range(REDRAWN):
        args = tuple(rounded(a) for a in SPECS[op].draw(random, complete(op, dims)))
        if SPECS[op].settled(args):
            break
    with torch.no_grad():
        outs = as_tuple(eager(op)(*args))
    return args, tuple(rounded(random(*o.shape), o.dtype) for o in outs)


def _is_floating(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def announces(backend: str, op: str) -> bool:
    """Whether the backend serves the optional features that every call of ``op`` uses."""
    row, spec = TABLE[backend], SPECS[op]
    return row.kernels is REFERENCE or set(spec.features) <= set(row.features.get(spec.op, ()))


def eager(op: str) -> Callable:
    """PyTorch's own expression of the op."""
    return SPECS[op].yardstick or OPS[SPECS[op].op].composite


def directions(op: str, function: Callable, args: Sequence, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    """Every output of ``function(*args)`` that has a gradient in ``grads``, and every gradient, by name."""
    spec = SPECS[op]
    trained = len(spec.inputs)
    args = [a.detach().requires_grad_(i < trained) if _is_floating(a) else a for i, a in enumerate(args)]
    differentiated = {f"d{name}": a for name, a in zip(spec.inputs, args, strict=False) if _is_floating(a)}
    outs = as_tuple(function(*args))[: len(grads)]
    gradients = torch.autograd.grad(outs, list(differentiated.values()), grads)
    return dict(zip((*spec.outputs, *differentiated), (*(o.detach() for o in outs), *gradients), strict=True))


def in_float64(op: str, args: Sequence, grads: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's results from the rounded inputs, and the terms that cancel in them."""
    args = [a.double() if _is_floating(a) else a for a in args]
    grads = [g.double() for g in grads]
    spec = SPECS[op]
    function = OPS[spec.op].function
    results = directions(op, lambda *a: function.apply(REFERENCE, *spec.canonical(*a)), args, grads)
    return results, spec.cancelled(args, grads)


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _size(t: Tensor) -> float:
    """The largest finite value. lse is -inf in rows that see no key."""
    return _largest(t[t.isfinite()])


def _deviation(x: Tensor, x64: Tensor) -> float:
    x = x.double()
    return _largest(torch.where(x == x64, 0.0, x - x64))  # equal infinities are no error


def worse(a: float, b: float) -> float:
    """The larger one. NaN is the largest error."""
    return a if math.isnan(a) or a > b else b


def allowance(dtype: torch.dtype) -> float:
    return ULPS * EPS[torch.float64 if dtype == torch.float64 else torch.float32] + EPS[dtype] / 2


def measure(
    op: str,
    dims: Dims,
    dtype: torch.dtype,
    generator: torch.Generator | None,
    backend: str | None = None,
    elements: int | None = None,
    **how: Any,
) -> list[Row]:
    """Returns one `Row` for each direction of ``op``, at the sizes ``dims`` in ``dtype``.

    ``op`` and ``dims`` are what ``pygpt verify`` calls them. Sizes that are left out have the op's defaults.
    ``backend`` is None for the default one. ``elements``: how many of each result are drawn at least, by default
    ELEMENTS. ``how`` is passed to `draw`: ``device="cuda"`` measures on a GPU. An unknown size raises UsageError.
    """
    elements = ELEMENTS if elements is None else elements
    name, shape = str(dtype).removeprefix("torch."), describe(op, dims)
    worst: dict[str, list[float]] = {}  # direction -> the largest of all draws: our error, PyTorch's error, the scale
    for n in range(1, MOST + 1):
        args, grads = draw(op, dims, dtype, generator, **how)
        x64, terms = in_float64(op, args, grads)
        # PyTorch's bfloat16 products may read what lies beside the rows of a view (docs/measured.md B11).
        contiguous = [[a.contiguous() if _is_floating(a) else a for a in group] for group in (args, grads)]
        theirs, narrow = directions(op, eager(op), *contiguous), None
        if dtype == torch.float64:
            few = [[a.float() if _is_floating(a) else a for a in group] for group in (args, grads)]
            narrow = directions(op, eager(op), *few), in_float64(op, *few)[0]
        with use_backend(backend) if backend else nullcontext():
            ours = directions(op, SPECS[op].call, args, grads)
            tensors = tensors_of(OPS[SPECS[op].op], SPECS[op].canonical(*args))
            used = pick(SPECS[op].op, tensors, SPECS[op].features).name
        for key, r in x64.items():
            got, want = (f"{tuple(t.shape)} {t.dtype}" for t in (ours[key], theirs[key]))
            if got != want:
                raise AssertionError(f"verify: {op}: {key} is {got}, PyTorch's is {want}")
            their = _deviation(theirs[key], r)
            if narrow:
                their = max(their, _deviation(narrow[0][key], narrow[1][key]) * EPS[torch.float64] / EPS[torch.float32])
            errors = _deviation(ours[key], r), their, max(_size(r), _size(terms.get(key, r)))
            worst[key] = [worse(a, b) for a, b in zip(errors, worst.get(key, (0.0,) * 3), strict=True)]
        rows = [
            Row(op, shape, name, used, key, our / (scale or 1.0), their / (scale or 1.0), allowance(ours[key].dtype))
            for key, (our, their, scale) in worst.items()
        ]
        enough = n >= DRAWS or all(r.numel() * n >= elements or not r.numel() for r in x64.values())
        if enough and all(row.passed for row in rows):
            break
    return rows


# ------------------------------------------------------------------------------- command line
def _value(op: str, key: str, text: str) -> Any:
    """One value of --shape, parsed by the type of its default."""
    default, choices = SPECS[op].dims[key], (SPECS[op].choices or {}).get(key)
    try:
        if isinstance(default, float):
            return float(text)
        if choices:
            return choices[choices.index(text)]
        sizes = [int(n) for n in text.split("x")]
        if min(sizes) < 0 or max(sizes) >= 2**63 or (len(sizes) > 1 and key != "M"):
            raise ValueError
        return sizes[0] if len(sizes) == 1 else tuple(sizes)
    except ValueError:
        raise UsageError(f"verify: --shape: {key}={text!r} is not valid") from None


def parse_shape(text: str, ops: Sequence[str], named: bool) -> dict[str, Dims]:
    """The dims of ``--shape`` for each of ``ops`` that has all its keys. named: all of them must."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if bad := [key for key, equals, _ in pairs if not equals]:
        raise UsageError(f"verify: --shape wants KEY=VALUE,..., got {bad[0]!r}")
    keys = [key for key, _, _ in pairs]
    fitting = ops if named else [op for op in ops if all(key in SPECS[op].dims for key in keys)]
    if not fitting:
        known = "; ".join(f"{op}: {', '.join(SPECS[op].dims)}" for op in ops)
        raise UsageError(f"verify: --shape: no op has the dimensions {', '.join(keys)}; they are {known}")
    shapes = {}
    for op in fitting:
        _check_keys(op, keys)
        shapes[op] = {key: _value(op, key, value) for key, _, value in pairs}
    return shapes


def _names(text: str | None, known: Collection[str], what: str) -> list[str]:
    names = text.split(",") if text else list(known)
    if unknown := [n for n in names if n not in known]:
        raise UsageError(f"verify: unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
    return names


def _check_memory(op: str, dims: Dims) -> None:
    """UsageError where the inputs alone exceed this machine's memory."""
    args = SPECS[op].draw(lambda *shape: torch.empty(shape, dtype=torch.float64, device="meta"), complete(op, dims))
    check_memory(f"{op}'s inputs in float64", sum(a.nbytes for a in args if isinstance(a, Tensor)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=TABLE, help="default: what serves each op here")
    parser.add_argument("--ops", help=f"comma-separated, of {', '.join(SPECS)}; default: all")
    parser.add_argument("--dtypes", help=f"comma-separated, of {', '.join(DTYPES)}; default: all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the tensors are; default: cpu")
    dims = "; ".join(f"{op}: {','.join(spec.dims)}" for op, spec in SPECS.items())
    parser.add_argument(
        "--shape", help=f"your own sizes, such as B=2,H=4,L=100,S=80,E=64,causal=1 or M=8x128,K=768,N=2304. {dims}"
    )
    parser.add_argument("--seed", type=int, help="of the random inputs; default: a fresh one")
    threads.add_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if every row passes, else 1. UsageError on bad arguments."""
    known = ops_by_name()
    ops = _names(args.ops and ",".join(known[n].name if n in known else n for n in args.ops.split(",")), SPECS, "op")
    dtypes = _names(args.dtypes, DTYPES, "dtype")
    if not args.ops and (backend := args.backend or chosen()):
        ops = [op for op in ops if announces(backend, op)]
    own = parse_shape(args.shape, ops, bool(args.ops)) if args.shape else None
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    check_number("--seed", seed, -(2**63), 2**64)  # what torch takes
    generator = torch.Generator().manual_seed(seed)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("verify: --device cuda: torch finds no GPU here")
    if args.backend and not args.dtypes:
        dtypes = [name for name in dtypes if DTYPES[name] in TABLE[args.backend].dtypes]
    for op, dims in (own or {}).items():
        _check_memory(op, dims)
    rows = []
    for op in ops if own is None else own:
        for dims in SPECS[op].shapes if own is None else (own[op],):
            for dtype in dtypes:
                rows += measure(op, dims, DTYPES[dtype], generator, args.backend, device=args.device)
    failed = sum(not row.passed for row in rows)
    if args.json:
        json.dump({"seed": seed, "passed": not failed, "rows": [_json_row(row) for row in rows]}, sys.stdout, indent=1)
        print()
    else:
        _print(rows)
        print(
            f"{len(rows) - failed} of {len(rows)} pass: error against float64 at most 2x PyTorch's plus a few ulp "
            f"(--seed {seed})"
        )
    return 1 if failed else 0


def _json_row(row: Row) -> dict[str, Any]:
    """The row as JSON holds it, which has no infinities: they become None."""
    values = {**asdict(row), "ratio": row.ratio, "passed": row.passed}
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _print(rows: list[Row]) -> None:
    columns = dict.fromkeys(("dtype", "direction", "backend"), "<") | dict.fromkeys(
        ("our error", "PyTorch's", "ratio", ""), ">"
    )
    for (op, shape), group in groupby(rows, key=lambda row: (row.op, row.shape)):
        print(f"{op}  {shape}")
        lines = [
            (row.dtype, row.direction, row.backend, f"{row.ours:.2e}", f"{row.torch:.2e}", f"{row.ratio:.2f}",
             ("pass", "green") if row.passed else ("FAIL", "red"))
            for row in group
        ]  # fmt: skip
        print(table(columns, lines), end="\n\n")
