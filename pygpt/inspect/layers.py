"""`pygpt.audit`: a model beside the same model on PyTorch alone, layer by layer, against a copy in float64.

The rule is that of `pygpt verify`: our error is at most twice PyTorch's own, plus a few roundings. Here an error is
that of a module's output, or of a parameter's gradient, in a whole step, with what the layers before it have added.

    error(x) = max |x - x64| / scale        scale = max |x64|, and for a gradient at least the largest gradient that
                                            reaches its module, because it is a sum of such terms, which may cancel

Small results have errors that vary by chance. A step with a row that fails is therefore repeated, at most DRAWS times,
with every parameter moved at random by about one rounding, and the largest errors of all steps count. An error far
beyond its limit, in a result that is not small, ends that.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..dispatch import backend
from ..files import atomic
from ..progress import table
from ..verify import ELEMENTS, EPS, Judged, allowance, worse
from .plot import draw
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
NO_ACCIDENT = 10.0  # an error of this many times its limit, among ELEMENTS or more, ends the draws
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
        lines = [textwrap.fill(self.verdict(), 110), ""]
        lines += [f"The {len(shown)} closest to their limits; audit.table() has {left_out} more:"] if left_out else []
        lines.append(self.table(shown))
        return "\n".join([*lines, "", f"Errors against {self.truth}; steps: {self.draws}."])

    def verdict(self) -> str:
        first = self.first
        if first is None:
            verdict = f"{self.model}: all {len(self.layers)} outputs and gradients are as exact as PyTorch's"
            if all(layer.ours == layer.torch for layer in self.layers):
                verdict += ", with the same errors, so that probably no kernel of pygpt ran (pygpt.report tells)"
            return verdict
        owner = first.name if first.what != GRADIENT else first.name.rpartition(".")[0]
        where = f"{first.name or 'the model'} ({self.classes.get(owner, self.model)})"
        return (
            f"{self.model}: the first layer that differs by more than rounding is {where}: its {first.what}'s error is "
            f"{first.ours:.2e}, PyTorch's own {first.torch:.2e}"
        )

    def svg(self) -> str:
        """A plot of every error beside the largest that passes, as the text of an SVG."""
        return draw(self)

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


def _observe(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    step: Callable,
    see: See,
    upstream: dict[str, float] | None = None,
) -> None:
    """Runs a step and shows each floating output of a named module and each gradient, in the order of the step.

    upstream: gets the largest gradient that reaches each module.
    """
    names, calls = {m: name for name, m in model.named_modules()}, Counter[str]()

    def output(module: nn.Module, value: Any) -> None:
        name = names.get(module)
        if name is None:
            return
        calls[name] += 1
        call = f" {calls[name]}" if calls[name] > 1 else ""

        def keep(grad: Tensor | None) -> None:
            if grad is not None and upstream is not None:
                upstream[name] = max(upstream.get(name, 0.0), _size(grad))

        for path, t in tensors_in(value):
            if t.dtype in EPS:
                see((name, f"{OUTPUT}{call}{path}"), t.detach())
                if t.requires_grad and upstream is not None:
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
        self.sizes: dict[Key, int] = {}
        self.no_float64 = ""  # why PyTorch's own results are the truth
        if self.of_model and all(p.dtype == torch.float64 for p in self.of_model.values()):
            self.no_float64 = "the model is float64 itself"
        self.generator = torch.Generator().manual_seed(0)

    def in_float64(self, see: See, upstream: dict[str, float]) -> None:
        state = {name: nn.Parameter(p.detach().double(), p.requires_grad) if p.is_floating_point() else p
                 for name, p in self.of_original.items()}  # fmt: skip
        buffers = {name: _wide(b) for name, b in self.original.named_buffers()}

        def call(*inputs: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self.original, state | buffers, inputs, kwargs)

        with _in_float64():
            inputs = _wide(self.inputs), _wide(self.kwargs)
            _observe(self.original, state, lambda: train_step(call, *inputs), see, upstream)

    def truth(self) -> tuple[dict[Key, Tensor], dict[str, float]]:
        """The truth of every output and gradient, and the largest gradients that reach the modules."""
        values: dict[Key, Tensor] = {}
        upstream: dict[str, float] = {}

        def see(key: Key, t: Tensor) -> None:
            values[key] = t.to(torch.float64, copy=True)

        if not self.no_float64:
            try:
                self.in_float64(see, upstream)
                return values, upstream
            except Exception as e:  # noqa: BLE001 - a model can fail in any way on a dtype that it does not know
                first_line = str(e).partition("\n")[0]
                self.no_float64 = f"the model does not run in float64: {type(e).__name__}: {first_line}"
                values.clear()
        self.run(self.original, self.of_original, see, upstream)
        return values, upstream

    def run(
        self, model: nn.Module, parameters: Mapping[str, Tensor], see: See, upstream: dict[str, float] | None = None
    ) -> None:
        _observe(model, parameters, lambda: train_step(model, self.inputs, self.kwargs), see, upstream)

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
                self.dtypes[key], self.sizes[key] = t.dtype, t.numel()

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

    def settled(self, layers: list[Layer]) -> bool:
        """Whether every row passes, or one with many elements is far beyond its limit, or is no number."""
        failing = [layer for layer in layers if not layer.passed]
        return not failing or any(
            not layer.ours < math.inf
            or (layer.ours > NO_ACCIDENT * layer.limit and self.draws * self.sizes[layer.name, layer.what] >= ELEMENTS)
            for layer in failing
        )

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
    training modes and random generators are what they were before. What is no module raises TypeError. ValueError for a
    reference with other parameters, and where there is nothing to compare.
    """
    original = model if reference is None else reference
    for name, m in (("model", model), ("reference", original)):
        check_call("audit", m, (inputs, kwargs), name)
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
            if not layers:
                raise ValueError("pygpt.audit: no output or gradient of the model can be compared")
            if comparison.draws == DRAWS or comparison.settled(layers):
                break
            comparison.nudge()
    truth = f"PyTorch's own results ({comparison.no_float64})" if comparison.no_float64 else "the model in float64"
    classes = {name: type(m).__name__ for name, m in model.named_modules()}
    return Audit(type(model).__name__, layers, truth, comparison.draws, classes)
