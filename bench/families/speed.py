"""What pygpt serves of every family, how fast and how exact: the first table of docs/models.md."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .models import FAMILIES, Size, batch_of, drawn, served
from .results import Errors, errors, greedy, in_float64, share, step

DRAWS = 8  # models whose largest errors are compared, so that no lucky element decides


def ratio(theirs: Callable[[], Any], ours: Callable[[], Any], seconds: float) -> float:
    """The median time of ``theirs`` over that of ``ours``, run in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    theirs(), ours()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[0]) < 5:
        for run, kept in zip((theirs, ours), times, strict=True):
            before = time.perf_counter()
            run()
            kept.append(time.perf_counter() - before)
    return statistics.median(times[0]) / statistics.median(times[1])


def row(name: str, small: Size, size: Size, seconds: float) -> str:
    """The family's line of the table. ``seconds`` 0 leaves the speed out."""
    torch.manual_seed(0)  # for the configurations' own initialisation
    generator = torch.Generator().manual_seed(0)
    model = drawn(name, small, generator)
    ours = served(name, small, model)
    batch = batch_of(name, small, generator, "left" if FAMILIES[name].inputs in ("tokens", "two texts") else "")
    cells = [name, f"{share(model, ours, batch):.1%}"]
    if seconds:
        large = FAMILIES[name].build(size)
        of_large, large_batch = served(name, size, large), batch_of(name, size, generator)
        for run in (lambda m: _forward(m, large_batch), lambda m: step(m, large_batch)):
            cells.append(f"{ratio(lambda: run(large), lambda: run(of_large), seconds):.2f}")  # noqa: B023
    else:
        cells += ["", ""]
    same = greedy(model, batch, 8).equal(greedy(ours, batch, 8)) if FAMILIES[name].generates else None
    found: list[Errors] = []
    for _ in range(DRAWS):
        model = drawn(name, small, generator)
        results = step(model, batch), step(served(name, small, model), batch)
        found += errors(in_float64(model, batch), *results).values()
    worst = max(e.ours for e in found) / max(e.torchs for e in found)
    cells += [f"{worst:.2f}", {True: "yes", False: "no", None: ""}[same]]
    return f"| {' | '.join(cells)} |"


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**batch)


def lines(names: list[str], size: Size, seconds: float) -> Iterator[str]:
    yield (
        "| family | served share | forward | training step | error over PyTorch's | same tokens |\n"
        "|---|---|---|---|---|---|"
    )
    for name in names:
        yield row(name, Size(), size, seconds)
