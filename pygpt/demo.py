"""`pygpt demo`: trains the reference GPT with PyTorch's kernels and with pygpt's, on the same batches from one start.

First the two take turns, step by step, so that other load on the machine slows both alike. Then pygpt's kernels train
on alone, and the sample of text comes from the model with the most steps.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from statistics import mean, median

import torch

from . import checkpoint, threads
from .data import Corpus, UsageError, check_number
from .dispatch import TABLE
from .files import locked, must_be_folder
from .generate import continuation
from .progress import Progress, clock, plot_losses
from .train import PRESETS, Settings, Trainer

BACKENDS = "torch", "cpp"
ByBackend = dict[str, list[float]]
CALIBRATION = 10  # the first steps of each, which are timed to find how many fit into --seconds
TOGETHER = 0.3  # the share of --seconds in which both train
UNDISTURBED = 0.75  # a main thread that has less of its time on a core waits for cores that others use
PROMPT, TEMPERATURE = "def ", 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="text file or folder; default: Python's standard library")
    parser.add_argument("--seconds", type=float, default=120, help="time for training (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="train each this many steps instead")
    parser.add_argument("--sample", type=int, default=400, help="length of the generated text (default: %(default)s)")
    threads.add_argument(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder of the results (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    for name in BACKENDS:
        if TABLE[name].missing:
            raise UsageError(
                f"the demo compares {' with '.join(BACKENDS)}, and {name} is not available: {TABLE[name].missing}"
            )
    must_be_folder(args.out)
    checkpoint.need_numpy()
    for flag in ("seconds", "steps", "sample"):
        if (value := getattr(args, flag)) is not None:
            check_number(f"--{flag}", value, below=2**31)
            if value <= 0:
                raise UsageError(f"--{flag} must be positive, got {value}")
    settings = Settings(**PRESETS["demo"], data=args.data)
    if args.steps:
        settings = dataclasses.replace(settings, steps=args.steps, decay_steps=args.steps)
    corpus = Corpus.load(settings.data, settings.tokens, settings.block_size)
    trainers = {name: Trainer(dataclasses.replace(settings, backend=name), corpus) for name in BACKENDS}
    with locked(args.out):
        _compare(trainers, args)


def _compare(trainers: dict[str, Trainer], args: argparse.Namespace) -> None:
    """Trains both, prints the comparison and a sample of text, and saves the checkpoint and the plot."""
    settings, corpus, named = trainers["cpp"].settings, trainers["cpp"].corpus, trainers["cpp"].named
    print(
        f"{settings.n_layer} layers x {settings.n_embd}, {sum(p.numel() for p in named.values()):,} parameters, "
        f"{settings.tokens_per_step:,} tokens per step, {settings.dtype}, {torch.get_num_threads()} threads\n"
        f"text: {args.data or 'the source of the Python standard library'}, {len(corpus.train):,} bytes for training, "
        f"{len(corpus.val):,} for validation",
        flush=True,
    )
    losses, seconds, alone = _train_together(trainers, args)
    validation = {name: trainer.evaluate()["val_loss"] for name, trainer in trainers.items()}
    _table(losses, seconds, validation, settings.tokens_per_step)
    if alone:
        _train_alone(trainers["cpp"], alone, losses["cpp"])
    path, plot = args.out / "checkpoint.safetensors", args.out / "loss.png"
    trainers["cpp"].save(path)
    title = f"{settings.n_layer} x {settings.n_embd} GPT on {len(corpus.train) / 1e6:.1f} MB of text"
    curves = {f'backend "{name}"': (range(1, len(losses[name]) + 1), losses[name]) for name in BACKENDS}
    plotted = plot_losses(plot, title, curves)

    print(f"\nWhat the trained model writes after {PROMPT!r}:\n")
    model = trainers["cpp"].model.eval()
    for piece in continuation(model, corpus.tokenizer, PROMPT, args.sample, TEMPERATURE, top_k=None, seed=1):
        print(piece, end="", flush=True)
    print(f"\n\ncheckpoint  {path}  (pygpt generate {args.out})")
    print(f"loss chart  {plot}" if plotted else "no loss chart: matplotlib is not installed, or NumPy")


def _train_together(trainers: dict[str, Trainer], args: argparse.Namespace) -> tuple[ByBackend, ByBackend, int]:
    """Steps the trainers in turn -> losses and seconds per step, and how many steps pygpt's kernels are to train on."""
    losses: ByBackend = {name: [] for name in trainers}
    seconds: ByBackend = {name: [] for name in trainers}
    start, computing = time.perf_counter(), time.thread_time()

    def both() -> None:
        for name in reversed(trainers) if len(losses["cpp"]) % 2 else trainers:
            began = time.perf_counter()
            losses[name].append(trainers[name].step())
            seconds[name].append(time.perf_counter() - began)

    steps, alone = args.steps, 0
    if steps is None:
        print(f"timing {CALIBRATION} steps of each ...", flush=True)
        for _ in range(CALIBRATION):
            both()
        left = args.seconds - (time.perf_counter() - start)
        steps = CALIBRATION + max(1, int(TOGETHER * left / sum(median(s) for s in seconds.values())))
        alone = max(0, int((1 - TOGETHER) * left / median(seconds["cpp"])))
        for trainer in trainers.values():
            trainer.settings = dataclasses.replace(trainer.settings, steps=steps + alone, decay_steps=steps + alone)
        plan = f'{steps} steps of each backend, taking turns, then {alone} of "cpp" alone'
        print(f"{plan}: about {clock(args.seconds)}", flush=True)
    per_step = trainers["cpp"].settings.tokens_per_step
    with Progress("training both", steps, len(losses["cpp"])) as progress:
        while len(losses["cpp"]) < steps:
            both()
            speeds = ", ".join(f"{name} {per_step / median(s[-20:]):,.0f}" for name, s in seconds.items())
            progress.update(len(losses["cpp"]), f"loss {losses['cpp'][-1]:.4f}  {speeds} tokens/s")
    share = (time.thread_time() - computing) / (time.perf_counter() - start)
    if share < UNDISTURBED:
        waited = f"training computed for only {share:.0%} of this time, as if others used its cores"
        print(f"{waited}: the speeds below mean little")
    return losses, seconds, alone


def _train_alone(trainer: Trainer, steps: int, losses: list[float]) -> None:
    """Trains on, and appends the losses."""
    with Progress('training "cpp"', steps) as progress:
        for step in range(1, steps + 1):
            losses.append(trainer.step())
            progress.update(step, f"loss {losses[-1]:.4f}")


def _table(losses: ByBackend, seconds: ByBackend, validation: dict[str, float], tokens_per_step: int) -> None:
    print(f"\n{'backend':10}{'train loss':>12}{'val loss':>10}{'ms/step':>10}{'tokens/s':>11}")
    for name in BACKENDS:
        step = median(seconds[name])
        train = mean(losses[name][-20:])
        print(f"{name:10}{train:12.4f}{validation[name]:10.4f}{step * 1e3:10.1f}{tokens_per_step / step:11,.0f}")
    gaps = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    ratio = median(seconds["torch"]) / median(seconds["cpp"])
    early = min(100, len(gaps))
    print(
        f"largest difference of the two loss curves: {max(gaps[:early]):.1e} in the first {early} steps, "
        f"{max(gaps):.1e} in all"
    )
    print("  (training amplifies differences in the last bit, as between any two runs that add in different orders)")
    print(f'speed of "cpp" relative to "torch": {ratio:.2f}x (medians of {len(losses["cpp"])} steps each)\n')
