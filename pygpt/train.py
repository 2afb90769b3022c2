"""`pygpt train`: the training loop, bit-exactly resumable.

Batches and dropout are pure functions of the seed and the step, so a run continues from its checkpoint alone: weights,
AdamW state, step and gradient scaler. A run's folder holds checkpoint.safetensors, log.jsonl and loss.png.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, reference, threads
from .data import Bytes, Chars, Corpus, UsageError, check_memory, check_number, seed_of, tokenizer
from .dispatch import TABLE, backend, chosen, explain
from .files import locked, must_be_folder
from .model import GPT, GPTConfig
from .progress import Progress, plot_losses
from .signals import Stopped, until_a_signal
from .train_log import Log

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # float32 master weights


def option(
    default: Any,
    help: str,
    type: type | None = None,
    low: float | None = None,
    choices: tuple[str, ...] | None = None,
    adjustable: bool = False,
    below: int = 2**63,
) -> Any:
    """One setting and its command line flag. low, below: the allowed range. adjustable: may change on --resume."""
    metadata = {
        "help": help,
        "type": type or default.__class__,
        "low": low,
        "choices": choices,
        "adjustable": adjustable,
        "below": below,
    }
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """The settings of a run. The defaults are the preset "demo". UsageError on a value out of range."""

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
    norm: str = option("layer_norm", "of every block", choices=("layer_norm", "rms_norm"))
    position: str = option("learned", "how positions are encoded", choices=("learned", "rotary"))
    n_kv_head: int | None = option(None, "heads of keys and values; default: --n-head", int, low=1)
    qk_norm: bool = option(False, "an RMSNorm over each head of queries and keys")
    hidden_dim: int | None = option(None, "width of the MLP; default: 4 times --n-embd", int, low=1)
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
    threads: int | None = option(None, threads.HELP, int, 1, adjustable=True, below=2**31)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, low, choices = getattr(self, f.name), f.metadata["low"], f.metadata["choices"]
            if value is None:
                continue
            if low is not None:
                check_number(flag(f), value, low, f.metadata["below"])
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
        progress = min(1.0, (step - self.warmup) / max(1, (self.decay_steps or self.steps) - self.warmup))
        return self.min_lr + (self.learning_rate - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.block_size * self.grad_accum


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "llama-demo": {  # Llama's architecture in the demo's size
        "n_kv_head": 2, "norm": "rms_norm", "position": "rotary", "activation": "swiglu", "hidden_dim": 344,
    },
    "shakespeare-char-cpu": {  # from nanoGPT's README, "I only have a macbook"
        "tokens": "char", "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "activation": "gelu",
        "steps": 2000, "batch_size": 12, "learning_rate": 1e-3, "min_lr": 1e-4, "warmup": 100,
        "eval_interval": 250, "eval_iters": 20,
    },
    "gpt2": {  # from nanoGPT's config/train_gpt2.py: the 124M model, half a million tokens per step
        "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, "activation": "gelu",
        "steps": 600_000, "batch_size": 4, "grad_accum": 120, "learning_rate": 6e-4, "min_lr": 6e-5, "warmup": 2000,
        "beta2": 0.95, "eval_interval": 1000, "eval_iters": 200, "checkpoint_interval": 10,
    },
}  # fmt: skip


def _compiled(model: GPT) -> Callable[..., Any]:
    """torch.compile(model). UsageError where torch.compile does not work, for example without a C++ compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2))
    except Exception as e:  # noqa: BLE001 - the exceptions are of many types, none of them public
        raise UsageError(f"--compile: torch.compile does not work here: {str(e).splitlines()[0]}") from None
    return torch.compile(model)


class Trainer:
    """One model with its optimiser, batches and step count. ``settings.backend`` is its backend."""

    def __init__(self, settings: Settings, corpus: Corpus):
        """UsageError if no such model exists or an explicit backend cannot train it."""
        s = self.settings = settings
        self.corpus, self.done = corpus, 0
        size = s.vocab_size or corpus.tokenizer.size
        if size < corpus.tokenizer.size:
            raise UsageError(f"--vocab-size {size} is less than the text's {corpus.tokenizer.size} different tokens")
        torch.manual_seed(seed_of("initialisation", s.seed))
        try:
            of_model = {f.name: getattr(s, f.name) for f in dataclasses.fields(GPTConfig) if hasattr(s, f.name)}
            config = GPTConfig(**{**of_model, "vocab_size": size})
        except ValueError as e:
            raise UsageError(e) from None
        dtype = torch.float64 if s.dtype == "float64" else torch.float32
        parameters = sum(p.numel() for p in GPT(config, device="meta").parameters())
        check_memory("the weights, their gradients and AdamW's moments", 4 * parameters * dtype.itemsize)
        self.model = GPT(config).to(dtype)
        self._check_backend()
        self.named = dict(self.model.named_parameters())
        matrices = [p for p in self.named.values() if p.dim() >= 2]
        vectors = [p for p in self.named.values() if p.dim() < 2]
        groups = {"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)
        self.scaler = torch.amp.GradScaler("cpu", enabled=s.dtype == "float16")
        self.forward = _compiled(self.model) if s.compile else self.model

    def _check_backend(self) -> None:
        name, c = self.settings.backend or chosen(), self.model.config
        q = next(self.model.parameters()).new_empty(1, c.n_head, 1, c.n_embd // c.n_head)
        reasons = [TABLE[name].missing] if name and TABLE[name].missing else None
        if not reasons:
            with self._context():
                choice = explain("scaled_dot_product_attention", q, q, q, dropout_p=c.dropout, is_causal=True)
            reasons = choice.rejected[name] if name and choice.backend is None else None
        if reasons:
            raise UsageError(f"backend {name!r} cannot train this model: {'; '.join(reasons)}")

    @contextmanager
    def _context(self) -> Iterator[None]:
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
                _, loss = self.forward(*batch, return_logits=False)
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
                    self.forward(
                        *self.corpus.batch(split, s.batch_size, s.block_size, s.seed, "evaluate", i),
                        return_logits=False,
                    )[1].item()
                    for i in range(s.eval_iters)
                )
                / s.eval_iters
                for split in ("train", "val")
            }

    def save(self, path: Path) -> None:
        tensors: dict[str, Tensor] = dict(self.named)
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
    def load(self, path: Path) -> None:
        """Continues the run saved at ``path``. UsageError if it is not this model on this text."""
        tensors, metadata = checkpoint.load(path)
        if metadata["corpus"] != self.corpus.digest:
            raise UsageError(f"{path} was trained on another text than this one")
        self._check_fit(path, tensors, metadata)
        load_model(path, tensors, metadata, self.model)
        for full_name, state in tensors.items():
            if full_name.startswith("adamw."):
                _, key, name = full_name.split(".", 2)
                self.optimizer.state[self.named[name]][key] = state
        self.scaler.load_state_dict(metadata["scaler"])
        self.done = metadata["step"]

    def _check_fit(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """UsageError unless the checkpoint has exactly the entries of this run."""
        done, scaler = metadata["step"], metadata["scaler"]
        expected: dict[str, Tensor] = dict(self.named)
        if done < 0 or scaler.keys() != self.scaler.state_dict().keys():
            raise UsageError(f"{path} does not fit this run: its step is {done}, its gradient scaler {scaler}")
        if done:  # fused AdamW has a state even after steps that the scaler skipped
            for name, p in self.named.items():
                expected |= {f"adamw.exp_avg.{name}": p, f"adamw.exp_avg_sq.{name}": p}
                expected[f"adamw.step.{name}"] = torch.zeros((), dtype=torch.float32)
        for name in sorted(expected.keys() | tensors.keys()):
            both = expected.get(name), tensors.get(name)
            wanted, got = ("nothing" if t is None else f"{tuple(t.shape)} {t.dtype}" for t in both)
            if got != wanted:
                raise UsageError(f"{path} does not fit the model: {name} must be {wanted}, found {got}")


def load_model(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], model: GPT | None = None) -> GPT:
    """Fills ``model``, by default a new one of the checkpoint's configuration. UsageError if they do not fit."""
    weights = {name: t for name, t in tensors.items() if not name.startswith("adamw.")}
    try:
        model = model or GPT(GPTConfig(**metadata["config"]))
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        model.to(weights["lm_head.weight"].dtype).load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UsageError(f"{path} does not fit the model: {e}") from None
    return model


def open_checkpoint(path: Path) -> tuple[GPT, Bytes | Chars, dict[str, Any]]:
    """-> model in eval mode, tokenizer, metadata. path: a checkpoint, or the folder of a run."""
    path = path / "checkpoint.safetensors" if path.is_dir() else path
    tensors, metadata = checkpoint.load(path)
    model = load_model(path, tensors, metadata).eval()
    return model, tokenizer(metadata["vocabulary"]), metadata


# ------------------------------------------------------------------------------- a run in a folder
def fit(trainer: Trainer, out: Path) -> None:
    """Trains up to ``settings.steps``, logging and saving under ``out``. A signal raises Stopped after saving."""
    s, path = trainer.settings, out / "checkpoint.safetensors"
    every = s.checkpoint_interval or s.eval_interval
    log = Log(out / "log.jsonl", trainer.done)
    parameters = sum(p.numel() for p in trainer.named.values())
    print(
        f"{parameters:,} parameters, {len(trainer.corpus.train):,} training tokens, {s.tokens_per_step:,} per step, "
        f"{s.dtype}, {torch.get_num_threads()} threads",
        flush=True,
    )
    if trainer.done >= s.steps:
        print(f"the run is finished: it is at step {trainer.done} of {s.steps}; a larger --steps trains on", flush=True)
    durations: list[float] = []
    with Progress("training", s.steps, trainer.done) as progress, until_a_signal() as signals:

        def evaluate() -> None:
            losses = trainer.evaluate()
            log.write(step=trainer.done, **losses)
            progress.print(
                "step {}: train loss {train_loss:.4f}, val loss {val_loss:.4f}".format(trainer.done, **losses)
            )

        if not log.entries:
            evaluate()
        last = trainer.done >= s.steps or bool(signals)
        try:
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
                last = trainer.done >= s.steps or bool(signals)
                if trainer.done % every == 0 or last:
                    trainer.save(path)
        except OSError:  # the reader of our output, or the terminal whose SIGHUP is about to arrive, has gone
            trainer.save(path)
            if signals:
                raise Stopped(signals[0]) from None
            raise
    curves = {"train": log.curve("loss"), "validation": log.curve("val_loss")}
    plotted = plot_losses(out / "loss.png", f"{s.n_layer} x {s.n_embd} GPT, {s.tokens} tokens", curves)
    print(f"checkpoint  {path} (step {trainer.done})\nlog         {log.path}")
    print(f"plot        {out / 'loss.png'}" if plotted else "no plot: matplotlib is not installed, or NumPy")
    if trainer.done < s.steps:
        print("continue with --resume", flush=True)
        raise Stopped(signals[0])


# ------------------------------------------------------------------------------- command line
def flag(f: dataclasses.Field) -> str:
    return "--" + f.name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from (default: demo); flags override them")
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="folder of the run (default: %(default)s)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out with its own settings, bit-exactly"
    )
    parser.add_argument("--force", action="store_true", help="replace the run in --out")
    for f in dataclasses.fields(Settings):
        value_type, default = f.metadata["type"], "" if f.default is None else f" (demo: {f.default})"
        help = f.metadata["help"] + default
        if value_type is bool:
            parser.add_argument(flag(f), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            choices = f.metadata["choices"]
            parser.add_argument(flag(f), type=value_type, choices=choices, default=argparse.SUPPRESS, help=help)


def run(args: argparse.Namespace) -> None:
    flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if hasattr(args, f.name)}
    path, log = args.out / "checkpoint.safetensors", args.out / "log.jsonl"
    must_be_folder(args.out)
    checkpoint.need_numpy()
    if args.resume:
        settings = _resumed_settings(path, flags)
        for name in ("preset", "force"):
            if getattr(args, name):
                raise UsageError(f"--resume continues a run with its own settings; --{name} is for a new one")
    else:
        _refuse_to_replace(args, path, log)
        settings = Settings(**{**PRESETS[args.preset or "demo"], **flags})
    if settings.threads:
        torch.set_num_threads(settings.threads)
    corpus = Corpus.load(settings.data, settings.tokens, settings.block_size)
    if settings.compile:
        print(
            "--compile: torch.compile is tried now, and works before the first evaluation and the first step:", end=" "
        )
        print("up to a minute each", flush=True)
    trainer = Trainer(settings, corpus)
    with locked(args.out):
        if args.resume:
            trainer.load(path)
        else:
            _refuse_to_replace(args, path, log)  # another run may have written meanwhile
            log.unlink(missing_ok=True)
            trainer.save(path)
        fit(trainer, args.out)


def _refuse_to_replace(args: argparse.Namespace, *files: Path) -> None:
    if not args.force and (existing := [f for f in files if f.exists()]):
        raise UsageError(f"{existing[0]} exists; pass --resume to continue that run, or --force to replace it")


def _resumed_settings(path: Path, flags: dict[str, Any]) -> Settings:
    _, metadata = checkpoint.load(path)
    try:
        saved = Settings(**metadata["settings"])
    except TypeError as e:
        raise UsageError(f"{path} does not fit this version of pygpt: {e}") from None
    for f in dataclasses.fields(Settings):
        saved_value = getattr(saved, f.name)
        if not f.metadata["adjustable"] and flags.get(f.name, saved_value) != saved_value:
            new_value = flags[f.name]
            raise UsageError(f"{path} was trained with {flag(f)} {saved_value}; it cannot continue with {new_value}")
    return dataclasses.replace(saved, **flags)
