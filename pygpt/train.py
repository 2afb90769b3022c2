"""`pygpt train`: the training loop, bit-exactly resumable.

Batches and dropout are pure functions of the seed and the step, so a checkpoint (weights, AdamW state, step, gradient
scaler) is all there is to continue from. A run's folder holds checkpoint.safetensors, log.jsonl and loss.png.
"""

import argparse
import dataclasses
import json
import math
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from . import checkpoint, reference
from .data import Corpus, UsageError, seed_of, tokenizer
from .dispatch import TABLE, backend, chosen, explain
from .model import GPT, GPTConfig
from .report import Progress, plot_losses

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # float32 master weights


def option(default, help: str, type=None, low=None, choices=None, adjustable=False):
    """One setting and its command line flag. low: the least value allowed; adjustable: may change on --resume."""
    metadata = {
        "help": help,
        "type": type or default.__class__,
        "low": low,
        "choices": choices,
        "adjustable": adjustable,
    }
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """What a run computes; the defaults are the preset "demo". UsageError on a value out of range."""

    data: str | None = option(None, "text file or folder; default: Python's standard library", str, adjustable=True)
    tokens: str = option("byte", "what a token is", choices=("byte", "char"))
    n_layer: int = option(4, "transformer blocks", low=1)
    n_head: int = option(4, "attention heads", low=1)
    n_embd: int = option(128, "width", low=1)
    block_size: int = option(64, "context length in tokens", low=1)
    vocab_size: int | None = option(None, "embedding rows; default: as many as there are tokens", int, low=1)
    dropout: float = option(0.0, "dropout probability", low=0.0)
    bias: bool = option(False, "biases in Linear and LayerNorm")
    activation: str = option("gelu_tanh", "of the MLP", choices=tuple(reference.ACTIVATIONS))
    steps: int = option(2000, "optimiser steps", low=1, adjustable=True)
    batch_size: int = option(8, "sequences per micro-batch", low=1)
    grad_accum: int = option(1, "micro-batches per step", low=1)
    learning_rate: float = option(2e-3, "peak learning rate", low=0.0)
    min_lr: float = option(2e-4, "learning rate after the decay", low=0.0)
    warmup: int = option(50, "steps of linear warm-up", low=0)
    decay_steps: int | None = option(None, "step at which the cosine decay ends; default: --steps", int, low=1)
    weight_decay: float = option(0.1, "AdamW's, on matrices only", low=0.0)
    beta1: float = option(0.9, "AdamW's first moment", low=0.0)
    beta2: float = option(0.99, "AdamW's second moment", low=0.0)
    grad_clip: float = option(1.0, "largest gradient norm; 0 = no clipping", low=0.0)
    eval_interval: int = option(250, "steps between evaluations", low=1, adjustable=True)
    eval_iters: int = option(20, "batches per evaluation and split", low=1, adjustable=True)
    checkpoint_interval: int | None = option(
        None, "steps between checkpoints; default: --eval-interval", int, 1, adjustable=True
    )
    seed: int = option(1337, "of initialisation, batches and dropout")
    dtype: str = option(
        "float32", "float64, or 16 bit by autocast", choices=("float32", "bfloat16", "float16", "float64")
    )
    backend: str | None = option(
        None, "default: the first that serves a call", str, choices=tuple(TABLE), adjustable=True
    )
    compile: bool = option(False, "torch.compile the model", adjustable=True)
    threads: int | None = option(None, "CPU threads; default: PyTorch's", int, low=1, adjustable=True)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, low, choices = getattr(self, f.name), f.metadata["low"], f.metadata["choices"]
            if value is None:
                continue
            if low is not None and not (low <= value < math.inf):
                raise UsageError(f"{flag(f)} must be at least {low}, got {value}")
            if choices is not None and value not in choices:
                raise UsageError(f"{flag(f)} must be one of {', '.join(choices)}; got {value!r}")
        for name in ("dropout", "beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise UsageError(f"--{name} must be below 1, got {getattr(self, name)}")
        self.decay_steps = self.steps if self.decay_steps is None else self.decay_steps

    def rate(self, step: int) -> float:
        """The learning rate: linear warm-up, then cosine decay to min_lr."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        progress = min(1.0, (step - self.warmup) / max(1, self.decay_steps - self.warmup))
        return self.min_lr + (self.learning_rate - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.block_size * self.grad_accum


PRESETS = {
    "demo": {},
    "shakespeare-char-cpu": {  # nanoGPT's README, "I only have a macbook", over its config/train_shakespeare_char.py
        "tokens": "char", "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "activation": "gelu",
        "steps": 2000, "batch_size": 12, "learning_rate": 1e-3, "min_lr": 1e-4, "warmup": 100,
        "eval_interval": 250, "eval_iters": 20,
    },
    "gpt2": {  # nanoGPT's config/train_gpt2.py: the 124M model, half a million tokens per step
        "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, "activation": "gelu",
        "steps": 600_000, "batch_size": 4, "grad_accum": 120, "learning_rate": 6e-4, "min_lr": 6e-5, "warmup": 2000,
        "beta2": 0.95, "eval_interval": 1000, "eval_iters": 200, "checkpoint_interval": 10,
    },
}  # fmt: skip


def _compiled(model):
    """torch.compile(model); UsageError where torch.compile does not work, for want of a C++ compiler for example."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2))
    except Exception as e:  # noqa: BLE001 - of many kinds, none of them public
        raise UsageError(f"--compile: torch.compile does not work here: {str(e).splitlines()[0]}") from None
    return torch.compile(model)


class Trainer:
    """One model with its optimiser, batches and step count; the backend is ``settings.backend``."""

    def __init__(self, settings: Settings, corpus: Corpus):
        """UsageError if the model is impossible or an explicit backend cannot train it."""
        s = self.settings = settings
        self.corpus, self.done = corpus, 0
        size = s.vocab_size or corpus.tokenizer.size
        if size < corpus.tokenizer.size:
            raise UsageError(f"--vocab-size {size} is less than the text's {corpus.tokenizer.size} different tokens")
        torch.manual_seed(seed_of("initialisation", s.seed))
        try:
            config = GPTConfig(size, s.block_size, s.n_layer, s.n_head, s.n_embd, s.dropout, s.bias, s.activation)
        except ValueError as e:
            raise UsageError(e) from None
        self.model = GPT(config).to(torch.float64 if s.dtype == "float64" else torch.float32)
        self._check_backend()
        self.named = dict(self.model.named_parameters())
        matrices = [p for p in self.named.values() if p.dim() >= 2]
        vectors = [p for p in self.named.values() if p.dim() < 2]
        groups = {"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)
        self.scaler = torch.amp.GradScaler("cpu", enabled=s.dtype == "float16")
        self.forward = _compiled(self.model) if s.compile else self.model

    def _check_backend(self):
        name, c = self.settings.backend or chosen(), self.model.config
        q = next(self.model.parameters()).new_empty(1, c.n_head, 1, c.n_embd // c.n_head)
        why = [TABLE[name].missing] if name and TABLE[name].missing else None
        if not why:
            with self._context():
                choice = explain(
                    "scaled_dot_product_attention", q, q, q, dropout_p=c.dropout, is_causal=True
                )
            why = choice.rejected[name] if choice.backend is None else None
        if why:
            raise UsageError(f"backend {name!r} cannot train this model: {'; '.join(why)}")

    @contextmanager
    def _context(self):
        name, dtype = self.settings.backend, AUTOCAST.get(self.settings.dtype)
        with backend(name) if name else nullcontext(), torch.autocast("cpu", dtype) if dtype else nullcontext():
            yield

    def step(self) -> float:
        """One optimiser step -> the mean loss of its micro-batches, before the step."""
        s, total = self.settings, 0.0
        torch.manual_seed(seed_of("dropout", s.seed, self.done))
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate(self.done)
        self.model.train()
        for micro in range(s.grad_accum):
            batch = self.corpus.batch("train", s.batch_size, s.block_size, s.seed, self.done, micro)
            with self._context():
                _, loss = self.forward(*batch)
            self.scaler.scale(loss / s.grad_accum).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        if s.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.done += 1
        return total / s.grad_accum

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """train_loss and val_loss, each the mean over the same eval_iters batches every time."""
        s = self.settings
        self.model.eval()
        with self._context():
            return {
                f"{split}_loss": sum(
                    self.forward(*self.corpus.batch(split, s.batch_size, s.block_size, s.seed, "evaluate", i))[1].item()
                    for i in range(s.eval_iters)
                )
                / s.eval_iters
                for split in ("train", "val")
            }

    def save(self, path: Path):
        tensors = dict(self.named)
        for name, p in self.named.items():
            for key, state in self.optimizer.state[p].items():
                tensors[f"adamw.{key}.{name}"] = state
        metadata = {
            "step": self.done,
            "settings": dataclasses.asdict(self.settings),
            "config": dataclasses.asdict(self.model.config),
            "vocabulary": self.corpus.tokenizer.vocabulary,
            "corpus": self.corpus.digest,
            "scaler": self.scaler.state_dict(),
        }
        checkpoint.save(path, tensors, metadata)

    @torch.no_grad()
    def load(self, path: Path):
        """Continues the run saved at ``path``. UsageError if it is not this model on this text."""
        tensors, metadata = checkpoint.load(path)
        if metadata["corpus"] != self.corpus.digest:
            raise UsageError(f"{path} was trained on another text than this one")
        load_model(path, tensors, metadata, self.model)
        for full_name, state in tensors.items():
            if full_name.startswith("adamw."):
                _, key, name = full_name.split(".", 2)
                self.optimizer.state[self.named[name]][key] = state
        self.scaler.load_state_dict(metadata["scaler"])
        self.done = metadata["step"]


def load_model(path: Path, tensors: dict[str, Tensor], metadata: dict, model: GPT | None = None) -> GPT:
    """Fills ``model``, by default a new one of the checkpoint's configuration. UsageError if they do not fit."""
    weights = {name: t for name, t in tensors.items() if not name.startswith("adamw.")}
    try:
        model = model or GPT(GPTConfig(**metadata["config"]))
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        model.to(weights["lm_head.weight"].dtype).load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UsageError(f"{path} does not fit the model: {e}") from None
    return model


def open_checkpoint(path: Path):
    """-> model in eval mode, tokenizer, metadata; path: a checkpoint or a run's folder."""
    path = path / "checkpoint.safetensors" if path.is_dir() else path
    tensors, metadata = checkpoint.load(path)
    model = load_model(path, tensors, metadata).eval()
    return model, tokenizer(metadata["settings"]["tokens"], metadata["vocabulary"]), metadata


# ------------------------------------------------------------------------------- a run in a folder
class Log:
    """log.jsonl: one JSON object per step or evaluation. Opening it keeps the entries up to step ``done``."""

    def __init__(self, path: Path, done: int):
        self.path, self.entries = path, []
        if path.exists():
            self.entries = [e for e in map(_parse, path.read_text().splitlines()) if e and e["step"] <= done]
        with checkpoint.atomic(path) as temporary:
            temporary.write_text("".join(json.dumps(e) + "\n" for e in self.entries))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed with the process, flushed per line)

    def write(self, **entry):
        self.entries.append(entry)
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def curve(self, key: str) -> tuple[list, list]:
        points = [(e["step"], e[key]) for e in self.entries if key in e]
        return [step for step, _ in points], [value for _, value in points]


def _parse(line: str):
    try:
        return json.loads(line)
    except ValueError:  # the process died while writing it
        return None


@contextmanager
def _interruptible():
    """Yields a function that says whether Ctrl-C was pressed; a second press interrupts at once."""
    pressed = []

    def note(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, previous)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


def fit(trainer: Trainer, out: Path):
    """Trains on to ``settings.steps``, logging and saving under ``out``; KeyboardInterrupt comes after saving."""
    s, path = trainer.settings, out / "checkpoint.safetensors"
    every = s.checkpoint_interval or s.eval_interval
    log = Log(out / "log.jsonl", trainer.done)
    durations = []
    with Progress("training", s.steps, trainer.done) as progress, _interruptible() as interrupted:

        def evaluate():
            losses = trainer.evaluate()
            log.write(step=trainer.done, **losses)
            progress.print(
                "step {}: train loss {train_loss:.4f}, val loss {val_loss:.4f}".format(trainer.done, **losses)
            )

        if not log.entries:
            evaluate()
        last = trainer.done >= s.steps or interrupted()
        while not last:
            start, rate = time.perf_counter(), s.rate(trainer.done)
            loss = trainer.step()
            if not math.isfinite(loss):
                raise UsageError(f"the loss is {loss} at step {trainer.done}; {path} keeps the last checkpoint")
            durations = [*durations[-19:], time.perf_counter() - start]
            speed = s.tokens_per_step / median(durations)
            log.write(step=trainer.done, loss=loss, lr=rate, tokens_per_second=round(speed, 1))
            progress.update(trainer.done, f"loss {loss:.4f}  {speed:,.0f} tokens/s")
            if trainer.done % s.eval_interval == 0 or trainer.done == s.steps:
                evaluate()
            last = trainer.done >= s.steps or interrupted()
            if trainer.done % every == 0 or last:
                trainer.save(path)
    curves = {"train": log.curve("loss"), "validation": log.curve("val_loss")}
    plotted = plot_losses(out / "loss.png", f"{s.n_layer} x {s.n_embd} GPT, {s.tokens} tokens", curves)
    print(f"checkpoint  {path} (step {trainer.done})\nlog         {log.path}")
    print(f"plot        {out / 'loss.png'}" if plotted else "no plot: matplotlib is not installed")
    if trainer.done < s.steps:
        print("continue with --resume", flush=True)
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------- command line
def flag(f: dataclasses.Field) -> str:
    return "--" + f.name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="settings to start from; flags override them")
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="folder of the run (default: %(default)s)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out with its own settings, bit-exactly"
    )
    parser.add_argument("--force", action="store_true", help="replace the run in --out")
    for f in dataclasses.fields(Settings):
        kind, default = f.metadata["type"], "" if f.default is None else f" (demo: {f.default})"
        help = f.metadata["help"] + default
        if kind is bool:
            parser.add_argument(flag(f), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            choices = f.metadata["choices"]
            parser.add_argument(flag(f), type=kind, choices=choices, default=argparse.SUPPRESS, help=help)


def run(args: argparse.Namespace):
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if hasattr(args, f.name)}
    path, log = args.out / "checkpoint.safetensors", args.out / "log.jsonl"
    if args.resume:
        settings = _resumed_settings(path, given)
    elif not args.force and (there := [f for f in (path, log) if f.exists()]):
        raise UsageError(f"{there[0]} exists; pass --resume to continue that run, or --force to replace it")
    else:
        settings = Settings(**{**PRESETS[args.preset], **given})
    if settings.threads:
        torch.set_num_threads(settings.threads)
    corpus = Corpus.load(settings.data, settings.tokens, settings.block_size)
    trainer = Trainer(settings, corpus)
    if args.resume:
        trainer.load(path)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        trainer.save(path)
    print(
        f"{sum(p.numel() for p in trainer.named.values()):,} parameters, {len(corpus.train):,} training tokens, "
        f"{settings.tokens_per_step:,} per step, {settings.dtype}, {torch.get_num_threads()} threads",
        flush=True,
    )
    fit(trainer, args.out)


def _resumed_settings(path: Path, given: dict) -> Settings:
    _, metadata = checkpoint.load(path)
    try:
        saved = Settings(**metadata["settings"])
    except TypeError as e:
        raise UsageError(f"{path} does not fit this version of pygpt: {e}") from None
    for f in dataclasses.fields(Settings):
        was = getattr(saved, f.name)
        if f.name in given and not f.metadata["adjustable"] and given[f.name] != was:
            raise UsageError(f"{path} was trained with {flag(f)} {was}; it cannot continue with {given[f.name]}")
    return dataclasses.replace(saved, **given)
