"""What is measured on a GPU: the rows in order of importance, PyTorch's candidates, the check."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as TF
from torch.nn.attention import SDPBackend, sdpa_kernel

import pygpt
from pygpt import verify
from pygpt.dispatch import TABLE

from . import ops
from .ops import Case

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PEERS = ("eager", "compile", *SDPA)
MATH_BYTES = 2 << 30  # of float32 scores, of which SDPA's math backend keeps several copies


def backends(device: str) -> tuple[list[str], dict[str, str]]:
    """Those of pygpt's own backends that serve the device here, and why each other one that should does not."""
    table = [row for row in TABLE.values() if row.name != "torch" and (row.missing or device in row.devices)]
    absent = {row.name: row.missing for row in table if row.missing and device in row.devices}
    return [row.name for row in table if not row.missing], absent


def play_cuda_on_the_cpu():
    """For a rehearsal: the emulator in the place of the CUDA kernels."""
    from tests import emulator

    TABLE["cuda"] = replace(TABLE["cuda"], kernels=emulator.kernels(), missing="", devices=("cpu",))


# ------------------------------------------------------------------------------- the rows
@dataclass(frozen=True)
class Group:
    """One op on one shape in one dtype: a row for each backend and direction."""

    case: Case
    dtype: str
    compiled: bool = False  # torch.compile is among the peers

    def __str__(self):
        return f"{self.case.op} {self.case.shape} {self.dtype}"


TOKENS = 16384


def _attention(B, H, T, D, causal=True):
    shape = f"B{B} H{H} T{T} D{D} {'causal' if causal else 'full'}"
    return Case(ops.attention, (B, H, T, T, D, causal), shape)


def _mlp(C, B=16, T=1024):
    return Case(ops.mlp, (B, T, C, "gelu_tanh"), f"B{B} T{T} C{C} gelu_tanh")


def _linear(C, M=TOKENS):
    return Case(ops.linear, (M, C, 4 * C), f"{M} x {C} -> {4 * C}")


def _rows(op, C, N=TOKENS, *rest):
    return Case(op, (N, C, *rest), " ".join([f"{N} x {C}", *rest]))


BFLOAT16 = [  # (case, with torch.compile); the tail is what is skipped when time runs out
    (_attention(16, 12, 1024, 64), True),
    (_mlp(768), True),
    (_rows(ops.layer_norm, 768), True),
    (_attention(2, 32, 8192, 128), False),
    (_mlp(1600), True),
    (_linear(768), False),
    (_attention(16, 25, 1024, 64), False),
    (_rows(ops.add_layer_norm, 768), True),
    (_rows(ops.layer_norm, 4096), True),
    (_mlp(4096), True),
    (_rows(ops.rms_norm, 768), True),
    (_rows(ops.gelu, 3072, TOKENS, "tanh"), True),
    (_attention(16, 12, 1024, 64, causal=False), False),
    (_linear(1600), False),
    (_rows(ops.layer_norm, 1600), True),
    (_attention(2, 32, 8192, 128, causal=False), False),
    (_linear(4096), False),
    (_rows(ops.add_layer_norm, 1600), True),
    (_rows(ops.add_layer_norm, 4096), True),
    (_attention(1, 32, 16384, 128), False),
    (_rows(ops.rms_norm, 1600), True),
    (_rows(ops.rms_norm, 4096), True),
    (_rows(ops.gelu, 3072, TOKENS, "none"), True),
    (_rows(ops.relu, 3072), False),
]
PREDICTED = (_attention(2, 32, 8192, 128), _mlp(4096), _rows(ops.layer_norm, 4096))  # and some ops' first shapes


def plan(ops_wanted=ops.OPS, dtypes=tuple(ops.DTYPES), quick: bool = False, tiny: bool = False) -> list[Group]:
    """All of BFLOAT16, then each op's first shape in the other dtypes. quick: PREDICTED and first shapes in bfloat16."""
    first = {}
    for case, _ in BFLOAT16:
        first.setdefault(case.op, case)
    short = {*first.values(), *PREDICTED}
    groups = [Group(case, "bfloat16", compiled) for case, compiled in BFLOAT16 if not quick or case in short]
    groups += [Group(case, dtype) for dtype in ("float32", "float16") for case in first.values() if not quick]
    if tiny:  # what was different may now be equal; the first one stays
        small = [replace(group, case=_tiny(group.case)) for group in groups]
        groups = list({(group.case, group.dtype): group for group in reversed(small)}.values())[::-1]
    return [group for group in groups if group.case.op in ops_wanted and group.dtype in dtypes]


def _tiny(case: Case) -> Case:
    """The same op small enough for a dry run, under Triton's interpreter too."""
    match case.op:
        case "attention":
            return _attention(1, 2, 40, 16, case.args[-1])
        case "mlp":
            return _mlp(32, 1, 24)
        case "linear":
            return _linear(32, 24)
    return _rows(case.setup, 48, 24, *case.args[2:])


# ------------------------------------------------------------------------------- Triton's attention kernels, one by one
ATTENTION = {64: (16, 12, 1024), 128: (2, 16, 4096), 256: (2, 8, 2048)}  # head dimension: batch, heads, positions


def attention_calls(kernels, q, k, v, dout) -> dict[str, Callable]:
    """A causal call for each kernel of a namespace of ops; backward's launch attention_delta_kernel as well."""
    scale = q.shape[-1] ** -0.5
    out, lse = kernels.attention_fwd(q, k, v, True, scale)

    def backward(*needs):
        kernels.attention_bwd(dout, None, q, k, v, out, lse, True, scale, list(needs))

    return {
        "fwd": lambda: kernels.attention_fwd(q, k, v, True, scale),
        "dkdv": lambda: backward(False, True, True),
        "dq": lambda: backward(True, False, False),
    }


# ------------------------------------------------------------------------------- the candidates
class Refused(Exception):
    """A candidate cannot serve a row; says why."""


def ours(name: str, work: ops.Work) -> Callable:
    """The op on one of our backends, whatever the table would choose."""

    def call(*tensors):
        with pygpt.backend(name):
            return work.ours(*tensors)

    return call


def sdpa(name: str, group: Group) -> Callable:
    """PyTorch's attention with one of its backends forced. Raises Refused where that would be foolish."""
    B, H, L, S, _, causal = group.case.args
    if name == "math" and (scores := 4 * B * H * L * S) > MATH_BYTES:
        raise Refused(f"would keep several copies of {scores / 1e9:.0f} GB of scores")

    def call(q, k, v):
        with sdpa_kernel(SDPA[name]):
            return TF.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def compiled(work: ops.Work) -> Callable:
    """torch.compile of PyTorch's expression in default mode, for these shapes alone."""
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # else backward cannot be run again on one forward
    torch._dynamo.reset()
    return torch.compile(work.eager, dynamic=False)


NO_REASON = ("runtime disabled", "not used because")  # SDPA's warnings about the backends that were not asked for


def reason(error: BaseException, caught=()) -> str:
    """One line: why SDPA refused, which only its warnings say, else the error's own first line."""
    said = [str(w.message).split(" (Triggered internally")[0].strip() for w in caught]
    if "No available kernel" not in str(error):
        said = []
    lines = [line for line in said if line and not any(no in line for no in NO_REASON)] or [str(error)]
    text = "; ".join(line.strip().splitlines()[0] for line in dict.fromkeys(lines) if line.strip())
    text = text or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def trying(call: Callable):
    """call(), whose failure becomes Refused with the reason; PyTorch's warnings don't reach the table."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return call()
        except Exception as e:
            raise Refused(reason(e, caught)) from e


# ------------------------------------------------------------------------------- is it right
FACTOR = 4.0  # of PyTorch's own error. The tests judge exactness by 2; here a wrong kernel must not look fast
BLOCKS = 64


@dataclass(frozen=True)
class Check:
    """Errors of one direction against PyTorch in the wider type; the worst of its tensors' blocks."""

    error: float  # ||ours - wide|| / ||wide||
    eager_error: float
    difference: float  # max |ours - eager| / max |eager|
    wrong: bool


def results(function: Callable, tensors, grads=None) -> tuple[dict[str, tuple], tuple]:
    """{"forward": outputs, "backward": gradients of all tensors}, and the upstream gradients (drawn unless given)."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outs = verify.as_tuple(function(*leaves))
    grads = tuple(torch.randn_like(o) for o in outs) if grads is None else grads
    found = torch.autograd.grad(outs, leaves, grads)
    return {"forward": tuple(o.detach() for o in outs), "backward": found}, grads


def _squares(t: torch.Tensor) -> torch.Tensor:
    """Sums of squares over up to BLOCKS blocks of rows (of all heads together), in float64."""
    t = t.movedim(-2, 0).flatten(1) if t.dim() > 1 else t[None]
    return torch.stack([block.sum() for block in t.square().sum(1, dtype=torch.float64).chunk(BLOCKS)])


def compare(x: torch.Tensor, eager: torch.Tensor, wide: torch.Tensor) -> Check:
    """One tensor. By blocks, since a causal row's size depends on where it stands and a defect has a place."""
    if x.shape != eager.shape or x.dtype != eager.dtype:
        return Check(float("inf"), 0.0, float("inf"), True)
    error, theirs = (_squares(t.to(wide.dtype) - wide).sqrt() for t in (x, eager))
    scale = _squares(wide).sqrt()
    right = error <= FACTOR * theirs + verify.allowance(x.dtype) * scale  # False for NaN
    scale = torch.where(scale > 0, scale, 1.0)
    difference = (x - eager).abs().max() / eager.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
    numbers = (error / scale).max(), (theirs / scale).max(), difference
    return Check(*(n.item() for n in numbers), not right.all().item())


def check(candidates: dict[str, Callable], work: ops.Work) -> dict[str, dict[str, Check] | Refused]:
    """Each candidate's Check by direction, or why it could not run. Wide is float32, for float32 float64."""
    dtype = work.tensors[0].dtype
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    eager, grads = results(work.eager, work.tensors)
    wide, _ = results(work.eager, [t.to(wider) for t in work.tensors], [g.to(wider) for g in grads])
    found = {}
    for name, function in candidates.items():
        try:
            got, _ = trying(lambda f=function: results(f, work.tensors, grads))
        except Refused as e:
            found[name] = e
            continue
        found[name] = {}
        for way in ops.DIRECTIONS:
            each = [compare(*three) for three in zip(got[way], eager[way], wide[way], strict=True)]
            worst = max(each, key=lambda c: (c.wrong, c.error / max(c.eager_error, 1e-12)))
            found[name][way] = replace(worst, wrong=any(c.wrong for c in each))
    return found
