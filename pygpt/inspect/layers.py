"""`pygpt.audit`: a model beside the same model on PyTorch alone, layer by layer, against a copy in float64.

The rule is that of `pygpt verify`: our error is at most twice PyTorch's own, plus a few roundings. Here an error is
that of a module's output, or of a parameter's gradient, in a whole step, with what the layers before it have added.

    error(x) = max |x - x64| / scale        scale = max |x64|, and for a gradient at least the largest gradient that
                                            reaches its module, because it is a sum of such terms, which may cancel

Small results have errors that vary by chance. A step with a row that fails is therefore repeated, at most DRAWS times,
with every parameter moved at random by about one rounding, and the largest errors of all steps count. An error far
beyond its limit ends that.

Where the model does not run in float64, or is float64 itself, PyTorch's own results are the truth, and PyTorch's error
is how far they move when every parameter moves by one more rounding.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..dispatch import backend
from ..files import atomic
from ..progress import table
from ..verify import EPS, Judged, allowance, worse
from .step import (
    check_call,
    clear_gradients,
    outputs_seen,
    random_numbers_kept,
    tensors_in,
    train_step,
    unchanged,
    without_compilation,
)

DRAWS = 16
NO_ACCIDENT = 10.0  # an error that is this many times its limit ends the draws
SHOWN = 20  # rows of the table that `print` shows
OUTPUT, GRADIENT = "output", "gradient"


# ------------------------------------------------------------------------------- the result
@dataclass(frozen=True)
class Layer(Judged):
    """The errors of an output of a module, or of a parameter's gradient. See `pygpt.verify.Row` for the rule."""

    name: str  # of the module or the parameter; "" is the model itself
    what: str  # "output", also "output 2[1].logits" of the second call, or "gradient"
    dtype: str
    ours: float  # error
    torch: float  # PyTorch's error
    allowance: float

    @property
    def limit(self) -> float:
        """The largest error that passes."""
        return 2.0 * self.torch + self.allowance


@dataclass(frozen=True)
class Audit:
    """The answer of `audit`. ``print(audit)`` shows the layers with the largest errors, ``audit.table()`` all."""

    model: str  # the name of its class
    layers: list[Layer]  # outputs in the order of forward, then gradients in the order of backward
    truth: str  # what the errors are measured against
    draws: int  # how many steps were run
    classes: dict[str, str] = field(repr=False)  # module -> the name of its class

    @property
    def passed(self) -> bool:
        return all(layer.passed for layer in self.layers)

    @property
    def first(self) -> Layer | None:
        """The first layer whose output, or else gradient, differs from the truth by more than rounding."""
        return next((layer for layer in self.layers if not layer.passed), None)

    def table(self, layers: list[Layer] | None = None) -> str:
        """A line for each of the layers, by default all."""
        columns = dict.fromkeys(("layer", "", "dtype"), "<")
        columns |= dict.fromkeys(("our error", "PyTorch's", "ratio", " "), ">")
        return table(columns, map(self._line, self.layers if layers is None else layers))

    def _line(self, layer: Layer) -> tuple:
        verdict = ("pass", "green") if layer.passed else ("FAIL", "red")
        errors = f"{layer.ours:.2e}", f"{layer.torch:.2e}", f"{layer.ratio:.2f}"
        return layer.name or self.model, layer.what, layer.dtype, *errors, verdict

    def __str__(self) -> str:
        worst = sorted(self.layers, key=lambda layer: (layer.passed, -layer.ours / layer.limit))[:SHOWN]
        shown = [layer for layer in self.layers if layer in worst or layer is self.first]
        left_out = len(self.layers) - len(shown)
        lines = [textwrap.fill(self.verdict(), 110), "", self.table(shown)]
        lines += [f"{left_out} more in audit.table(), which are closer to their limits"] if left_out else []
        return "\n".join([*lines, "", f"Errors against {self.truth}; steps: {self.draws}."])

    def verdict(self) -> str:
        first = self.first
        if first is None:
            return f"{self.model}: all {len(self.layers)} outputs and gradients are as exact as PyTorch's"
        owner = first.name if first.what != GRADIENT else first.name.rpartition(".")[0]
        where = f"{first.name or 'the model'} ({self.classes.get(owner, self.model)})"
        return (
            f"{self.model}: the first layer that differs by more than rounding is {where}: its {first.what}'s error is "
            f"{first.ours:.2e}, PyTorch's own {first.torch:.2e}"
        )

    def svg(self) -> str:
        """A plot of every error beside the largest that passes, as the text of an SVG."""
        return _draw(self)

    def plot(self, path: str | Path) -> None:
        """Writes `svg` to a file."""
        with atomic(Path(path)) as temporary:
            temporary.write_text(self.svg(), encoding="utf-8")


# ------------------------------------------------------------------------------- running the models
class _InFloat64(TorchDispatchMode):
    """Casts and new tensors of a narrower dtype become float64, as in a norm that computes in float32 by itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in EPS:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def _in_float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


def _wide(value: Any) -> Any:
    """Tensors of a floating dtype in float64, also inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _wide(item) for key, item in value.items()}
    return type(value)(map(_wide, value)) if type(value) in (list, tuple) else value


Key = tuple[str, str]  # of a Layer: its name, and what it is
See = Callable[[Key, Tensor], None]


def _observe(model: nn.Module, parameters: Mapping[str, Tensor], step: Callable, see: See) -> dict[str, float]:
    """Runs a step; shows each floating output of a named module and each gradient -> the largest upstream gradients.

    ``see`` gets outputs in the order of forward and gradients in that of backward.
    """
    names, calls, upstream = {m: name for name, m in model.named_modules()}, Counter[str](), dict[str, float]()

    def output(module: nn.Module, value: Any) -> None:
        name = names.get(module)
        if name is None:
            return
        calls[name] += 1
        call = f" {calls[name]}" if calls[name] > 1 else ""

        def keep(grad: Tensor | None) -> None:
            if grad is not None:
                upstream[name] = max(upstream.get(name, 0.0), _size(grad))

        for path, t in tensors_in(value):
            if t.dtype in EPS:
                see((name, f"{OUTPUT}{call}{path}"), t.detach())
                if t.requires_grad:
                    t.register_hook(keep)

    def gradient(name: str, p: Tensor) -> None:
        if p.grad is not None:
            see((name, GRADIENT), p.grad)

    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    handles = [p.register_post_accumulate_grad_hook(partial(gradient, name)) for name, p in trained.items()]
    clear_gradients(parameters.values())
    try:
        with random_numbers_kept(parameters.values()), outputs_seen(output):
            step()
    finally:
        for handle in handles:
            handle.remove()
    return upstream


def _size(t: Tensor) -> float:
    """The largest finite value."""
    finite = t[t.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def _deviation(x: Tensor, truth: Tensor) -> float:
    """max |x - truth|, where the truth is a number; infinite where the shapes differ."""
    if x.shape != truth.shape:
        return math.inf
    difference = torch.where((x == truth) | truth.isnan(), 0.0, x.double() - truth).abs()
    return difference.max().item() if difference.numel() else 0.0


class _Comparison:
    """The largest errors so far of ours and PyTorch's, and the largest scale, for each Key."""

    def __init__(self, model: nn.Module, original: nn.Module, inputs: tuple, kwargs: dict) -> None:
        self.model, self.original, self.inputs, self.kwargs = model, original, inputs, kwargs
        self.of_model, self.of_original = (dict(m.named_parameters()) for m in (model, original))
        self.draws = 0
        self.worst: dict[Key, list[float]] = {}  # ours, PyTorch's, the scale
        self.dtypes: dict[Key, torch.dtype] = {}
        self.no_float64 = ""  # why PyTorch's own results are the truth
        if all(p.dtype == torch.float64 for p in self.of_model.values()):
            self.no_float64 = "the model is float64 itself"
        self.generator = torch.Generator().manual_seed(0)

    def in_float64(self, see: See) -> dict[str, float]:
        state = {name: nn.Parameter(p.detach().double(), p.requires_grad) if p.is_floating_point() else p
                 for name, p in self.of_original.items()}  # fmt: skip
        buffers = {name: _wide(b) for name, b in self.original.named_buffers()}

        def call(*inputs: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self.original, state | buffers, inputs, kwargs)

        with _in_float64():
            inputs = _wide(self.inputs), _wide(self.kwargs)
            return _observe(self.original, state, lambda: train_step(call, *inputs), see)

    def truth(self) -> tuple[dict[Key, Tensor], dict[str, float]]:
        """The truth of every output and gradient, and the largest gradients that reach the modules."""
        values: dict[Key, Tensor] = {}

        def see(key: Key, t: Tensor) -> None:
            values[key] = t.to(torch.float64, copy=True)

        if not self.no_float64:
            try:
                return values, self.in_float64(see)
            except Exception as e:  # noqa: BLE001 - a model can fail in any way on a dtype that it does not know
                self.no_float64 = (
                    f"the model does not run in float64: {type(e).__name__}: {str(e).partition(chr(10))[0]}"
                )
                values.clear()
        return values, self.run(self.original, self.of_original, see)

    def run(self, model: nn.Module, parameters: Mapping[str, Tensor], see: See) -> dict[str, float]:
        return _observe(model, parameters, lambda: train_step(model, self.inputs, self.kwargs), see)

    def draw(self) -> None:
        """Runs the truth, PyTorch and the model once more."""
        self.draws += 1
        with backend("torch"):
            truth, upstream = self.truth()
        ours = self.errors(self.model, self.of_model, truth)
        if self.no_float64:
            self.nudge()
        with backend("torch"):
            theirs = self.errors(self.original, self.of_original, truth)
        for key in [key for key in truth if key in theirs]:
            name, what = key
            if key not in ours and what != GRADIENT:  # a fused module does not call its children
                continue
            owner = name.rpartition(".")[0] if what == GRADIENT else None
            scale = max(_size(truth[key]), upstream.get(owner, 0.0) if owner is not None else 0.0)
            errors = ours.get(key, math.inf), theirs[key], scale
            self.worst[key] = [worse(a, b) for a, b in zip(errors, self.worst.get(key, (0.0,) * 3), strict=True)]

    def errors(self, model: nn.Module, parameters: Mapping[str, Tensor], truth: dict[Key, Tensor]) -> dict[Key, float]:
        found: dict[Key, float] = {}

        def see(key: Key, t: Tensor) -> None:
            if key in truth:
                found[key] = _deviation(t, truth[key])
                self.dtypes[key] = t.dtype

        self.run(model, parameters, see)
        return found

    @torch.no_grad()
    def nudge(self) -> None:
        """Moves every floating parameter by up to eps at random, that of the same name in both models alike."""
        for name, p in self.of_model.items():
            if p.dtype in EPS:
                noise = torch.rand(p.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
                other = self.of_original[name]
                for q in (p,) if other is p else (p, other):
                    q.copy_(q.double() * (1 + EPS[q.dtype] * noise.to(q.device)))

    def layers(self) -> list[Layer]:
        rows = []
        for key in sorted(self.worst, key=lambda key: key[1] == GRADIENT):
            ours, theirs, scale = self.worst[key]
            dtype = self.dtypes[key]
            rows.append(
                Layer(*key, str(dtype).removeprefix("torch."), ours / (scale or 1.0), theirs / (scale or 1.0),
                      allowance(dtype))
            )  # fmt: skip
        return rows


def audit(model: nn.Module, *inputs: Any, reference: nn.Module | None = None, **kwargs: Any) -> Audit:
    """Runs ``model(*inputs, **kwargs)`` as it is and on PyTorch alone, and compares every layer.

    PyTorch alone is the same model under ``pygpt.backend("torch")``, or ``reference``, such as a copy from before
    `pygpt.patch`, whose modules and parameters have the same names. Both run in evaluation mode, without dropout,
    forward and backward as in `report`. The output of each named module and the gradient of each parameter are held to
    a copy in float64, by the rule of `pygpt verify`.

    The result is an `Audit`: ``audit.passed``, ``audit.first`` is the first layer that differs by more than rounding,
    ``print(audit)`` shows a table and ``audit.plot("audit.svg")`` draws it. The parameters, buffers, gradients,
    training modes and random generators are what they were before. What is no module raises TypeError, a reference with
    other parameters ValueError.
    """
    original = model if reference is None else reference
    for m in (model, original):
        check_call("audit", m, (inputs, kwargs))
    shapes, of_reference = ({name: p.shape for name, p in m.named_parameters()} for m in (model, original))
    if other := sorted(
        name for name in shapes.keys() | of_reference.keys() if shapes.get(name) != of_reference.get(name)
    ):
        raise ValueError(f"pygpt.audit: the reference has other parameters than the model: {', '.join(other[:3])}")
    with unchanged([model, original], (inputs, kwargs)), torch.enable_grad(), without_compilation():
        model.eval()
        original.eval()
        comparison = _Comparison(model, original, inputs, kwargs)
        while True:
            comparison.draw()
            layers = comparison.layers()
            failing = [layer for layer in layers if not layer.passed]
            far = any(not layer.ours <= NO_ACCIDENT * layer.limit for layer in failing)  # also NaN
            if not failing or far or comparison.draws == DRAWS:
                break
            comparison.nudge()
    truth = f"PyTorch's own results ({comparison.no_float64})" if comparison.no_float64 else "the model in float64"
    classes = {name: type(m).__name__ for name, m in model.named_modules()}
    return Audit(type(model).__name__, layers, truth, comparison.draws, classes)


# ------------------------------------------------------------------------------- the plot
OURS, PYTORCHS, FAILS = "#30638e", "#999999", "#d1495b"
LEGEND = {"ours": OURS, "fails": FAILS, "PyTorch's own": PYTORCHS}
LEFT, TOP, RIGHT, WIDTH, HEIGHT = 60, 60, 20, 900, 300  # pixels


def _draw(audit: Audit) -> str:
    """Our errors as dots and PyTorch's as a line over the layers, on a logarithmic scale."""
    finite = [e for layer in audit.layers for e in (layer.ours, layer.torch) if 0 < e < math.inf]
    low, high = math.floor(math.log10(min(finite, default=0.1))), math.ceil(math.log10(max(finite, default=1.0)))
    high = max(high, low + 1)

    def y(error: float) -> float:
        share = (
            (math.log10(min(max(error, 10.0**low), 10.0**high)) - low) / (high - low) if not math.isnan(error) else 1.0
        )
        return TOP + HEIGHT * (1 - share)

    def x(i: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / max(len(audit.layers), 1)

    def text(at: float, height: float, words: str, more: str = "") -> str:
        return f'<text x="{at:.1f}" y="{height:.1f}" {more}>{escape(words)}</text>'

    bottom = TOP + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 40}" width="{WIDTH}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222222">',
        f'<rect width="{WIDTH}" height="{bottom + 40}" fill="#ffffff"/>',
        text(12, 22, audit.verdict(), 'font-size="13" font-weight="bold"'),
        *(text(LEFT + 100 * i, 44, name, f'fill="{colour}"') for i, (name, colour) in enumerate(LEGEND.items())),
        text(LEFT, bottom + 30, "outputs in the order of forward, then gradients in the order of backward"),
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#dddddd"/>')
        parts.append(text(LEFT - 8, at + 4, f"1e{power}", 'text-anchor="end"'))
    points = " ".join(f"{x(i):.1f},{y(layer.torch):.1f}" for i, layer in enumerate(audit.layers))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{PYTORCHS}"/>')
    for i, layer in enumerate(audit.layers):
        colour = OURS if layer.passed else FAILS
        title = f"<title>{escape(f'{layer.name or audit.model} {layer.what}: {layer.ours:.2e}')}</title>"
        parts.append(f'<circle cx="{x(i):.1f}" cy="{y(layer.ours):.1f}" r="3" fill="{colour}">{title}</circle>')
    return "\n".join([*parts, "</svg>", ""])
