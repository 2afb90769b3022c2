"""`pygpt generate`: prints text that continues a prompt, token by token as it is drawn."""

import argparse
import codecs
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch

from . import threads
from .data import Bytes, Chars, UsageError, check_number
from .dispatch import TABLE, backend
from .model import GPT
from .train import open_checkpoint


def continuation(
    model: GPT,
    tokenizer: Bytes | Chars,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[str]:
    """Yields ``prompt``, then one piece of text per token. Inside a multi-byte character the piece is empty."""
    idx = tokenizer.encode(prompt.encode()).long()[None]
    generator = torch.Generator().manual_seed(seed)
    tokens = model.stream(idx, max_new_tokens, temperature, top_k, generator)
    first = next(tokens)  # errors come before anything is printed
    yield prompt
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in chain((first,), tokens):
        yield decoder.decode(tokenizer.decode(token[0].tolist()))
    yield decoder.decode(b"", final=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a new line)")
    parser.add_argument("--max-new-tokens", type=int, default=500)
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 = always the likeliest (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest tokens")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--backend", choices=TABLE, help="default: the first that serves a call")
    threads.add_argument(parser)


def run(args: argparse.Namespace) -> None:
    for name, low, below in (
        ("max_new_tokens", 1, 2**63),
        ("temperature", 0, math.inf),
        ("top_k", 1, 2**63),
        ("seed", 0, 2**64),
    ):
        if (value := getattr(args, name)) is not None:
            check_number(f"--{name.replace('_', '-')}", value, low, below)
    if args.backend and TABLE[args.backend].missing:
        raise UsageError(f"backend {args.backend!r} is not available: {TABLE[args.backend].missing}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("--prompt is not UTF-8") from None
    if not args.prompt:
        raise UsageError("--prompt is empty; the model needs something to continue")
    model, tokenizer, _ = open_checkpoint(args.checkpoint)
    with backend(args.backend) if args.backend else nullcontext():
        pieces = continuation(
            model, tokenizer, args.prompt, args.max_new_tokens, args.temperature, args.top_k, args.seed
        )
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    print()
