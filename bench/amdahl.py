"""Who takes what of a training step: `python -m bench.amdahl`.

By Amdahl's law (1967), a step of which a part takes the share p becomes 1 / (1 - p + p / s) times faster if the part
becomes s times faster. The table has the times of every part. Its last column says how much faster our step
would be if the part took no time.

The times are those of torch.profiler, each operation's own time without what it calls, so the parts add up to a step.
Both backends take turns, a step at a time.
"""

import argparse
import re
from collections.abc import Callable

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

import pygpt
from pygpt import GPT, GPTConfig

PARTS = {  # the first that matches the name of an operation or of a region around it
    "optimizer": r"^optimizer$",
    "gradient clipping": r"^clip$",
    "loss": r"cross_entropy|nll_loss|log_softmax|logsumexp",
    "attention": r"attention|attn",
    "rotary": r"rope",
    "norms": r"norm",
    "embedding": r"embedding",
    "linear and mlp": r"linear|mlp|::(add)?mm$|::bmm$",
    "activations": r"gelu|relu|silu",
    "copies": r"::(cat|copy_|clone|contiguous|fill_|zero_)$",
    "rest": r"",
}
MODELS = {
    "6x384": (GPTConfig(256, 256, 6, 6, 384), 8),
    "gpt2": (GPTConfig(50304, 512), 1),
    "llama": (
        GPTConfig(
            32000, 512, bias=False, activation="swiglu", norm="rms_norm", position="rotary", n_kv_head=4,
            hidden_dim=2048,
        ),
        1,
    ),
    "tiny": (GPTConfig(64, 16, 1, 2, 16), 1),
}  # fmt: skip


def training_step(name: str, dropout: float) -> Callable[[], None]:
    """One step of AdamW with gradient clipping, on random tokens."""
    config, batch = MODELS[name]
    config.dropout = dropout
    model = GPT(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens, targets = torch.randint(config.vocab_size, (2, batch, config.block_size))

    def step() -> None:
        model(tokens, targets, return_logits=False)[1].backward()
        with record_function("clip"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step


def part_of(event: FunctionEvent) -> str:
    """The part of PARTS to which an operation's own time belongs."""
    names: list[str] = []
    at: FunctionEvent | None = event
    while at is not None:
        names.append(at.name)
        at = at.cpu_parent
    return next(part for part, pattern in PARTS.items() if any(re.search(pattern, n, re.IGNORECASE) for n in names))


def measure(step: Callable[[], None], backends: tuple[str, ...], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each part, by backend: the least of ``repeats`` steps that take turns."""
    best: dict[str, dict[str, float]] = {}
    for repeat in range(repeats + 1):
        for backend in backends:
            with pygpt.backend(backend), profile(activities=[ProfilerActivity.CPU]) as recorded:
                step()
            parts = dict.fromkeys(PARTS, 0.0)
            for event in recorded.events():
                parts[part_of(event)] += event.self_cpu_time_total / 1e3
            if repeat and (backend not in best or sum(parts.values()) < sum(best[backend].values())):
                best[backend] = parts
    return best


def table(best: dict[str, dict[str, float]]) -> str:
    """A row for each part that takes a thousandth of a step."""
    theirs, ours = best["torch"], best["cpp"]
    whole_theirs, whole_ours = sum(theirs.values()), sum(ours.values())
    lines = [
        "| part | PyTorch, ms | share | pygpt, ms | share | PyTorch / pygpt | step without it |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in PARTS:
        t, o = theirs[part], ours[part]
        if max(t / whole_theirs, o / whole_ours) >= 1e-3:
            ratio = f"{t / o:.2f}" if o else "-"
            lines.append(
                f"| {part} | {t:.1f} | {t / whole_theirs:.1%} | {o:.1f} | {o / whole_ours:.1%} | {ratio} | "
                f"{whole_ours / (whole_ours - o):.2f}x |"
            )
    lines.append(f"| step | {whole_theirs:.1f} | | {whole_ours:.1f} | | {whole_theirs / whole_ours:.2f} | |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.amdahl", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="6x384")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5, help="steps of each backend, of which the fastest counts")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(table(measure(training_step(args.model, args.dropout), ("torch", "cpp"), args.repeats)))


if __name__ == "__main__":
    main()
