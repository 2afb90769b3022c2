"""Data parallel training of each family in two processes (gloo), with pygpt's kernels and without.

Both models take turns, a step at a time, each with its own AdamW. A step's memory is its peak beyond what was resident
before it, in one of the processes. The losses of the last step say whether both learn the same.
"""

import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..timing.memory import peak_bytes
from .models import FAMILIES, Size, batch_of, copied, served
from .results import logits_and_loss

PROCESSES = 2
WARM_UP = 2  # steps that are not counted
DEADLINE = 900.0  # seconds


class Run(NamedTuple):
    """Of PyTorch and of ours."""

    seconds: tuple[float, float]  # the median of a step
    bytes: tuple[int | None, int | None]  # None where the system does not tell
    losses: tuple[float, float]  # of the last step


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _shard(model: nn.Module) -> nn.Module:
    """FSDP2: each layer by itself, then what remains."""
    for layer in _layers(model):
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"DDP": DistributedDataParallel, "FSDP2": _shard}


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(rank: int, port: int, how: str, name: str, size: Size, steps: int, results: multiprocessing.Queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model = FAMILIES[name].build(size)
    batch = batch_of(name, size, torch.Generator().manual_seed(rank))
    sides = []
    for side in (copied(name, size, model), served(name, size, model, loss=FAMILIES[name].loss_head)):
        side = WRAPPERS[how](side)
        sides.append((side, torch.optim.AdamW(side.parameters(), lr=1e-3, fused=True)))
    times: tuple[list[float], list[float]] = ([], [])
    losses = [0.0, 0.0]

    def step(i: int) -> None:
        side, optimizer = sides[i]
        _, loss = logits_and_loss(side(**batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[i] = loss.item()

    for _ in range(WARM_UP + steps):
        for i, kept in enumerate(times):
            dist.barrier()
            start = time.perf_counter()
            step(i)
            kept.append(time.perf_counter() - start)
    last = tuple(losses)
    peaks = [peak_bytes(lambda: step(i)) for i in range(2)]  # noqa: B023
    if rank == 0:
        medians = (statistics.median(kept[WARM_UP:]) for kept in times)
        results.put(Run(tuple(medians), tuple(peaks), last))
    dist.barrier()
    dist.destroy_process_group()


def run(how: str, name: str, size: Size, steps: int) -> Run:
    """Trains in processes of their own; RuntimeError if one of them fails or does not end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (port, how, name, size, steps, results)
    processes = [context.Process(target=_train, args=(rank, *arguments), daemon=True) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + DEADLINE
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            break  # what one of them waits for does not come
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"bench.families: {how} of {name} failed in a process")
    return results.get()


def lines(names: Iterable[str], size: Size, steps: int) -> Iterator[str]:
    heads = "step", "MiB", "loss"
    columns = ["family", *(f"{how}: {head}" for how in WRAPPERS for head in heads)]
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for name in names:
        cells = [name]
        for how in WRAPPERS:
            r = run(how, name, size, steps)
            cells.append(f"{r.seconds[0] / r.seconds[1]:.2f}")
            cells.append(" / ".join(f"{b / 2**20:.0f}" if b else "" for b in r.bytes))
            cells.append(" / ".join(f"{loss:.4f}" for loss in r.losses))
        yield f"| {' | '.join(cells)} |"
