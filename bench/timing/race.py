"""The race: candidates are timed in turn, and what is compared are medians.

Machines drift, so two figures taken a minute apart say nothing about each other. Each round times one block of every
candidate, in an order drawn anew. A busy round follows several quiet ones. Its blocks are longer than the scheduler's
time slices, because a thread that was just woken runs for some milliseconds as if nothing else did.
"""

import math
import random
import statistics
from dataclasses import replace

from .clocks import Block, Times
from .processes import Busy

FEWEST = {0.5: 5, 5.0: 3, math.inf: 1}  # a candidate whose block takes less than so many seconds: rounds at least
MOST = 200  # rounds
BUSY_BLOCK = 0.04  # seconds that a block of a busy round takes at least
BUSY_FEWEST = 5  # busy rounds at least, where there are as many quiet ones
SLOW_FACTOR, SLOW_SECONDS = 10, 0.1  # a block above both of these is slow: SLOW_FACTOR times the fastest


def race(clock, blocks: dict[str, Block], seconds: float, busy: Busy | None = None) -> dict[str, Times]:
    """Times the candidates, which must be warm, for about ``seconds`` each, and as long again inside ``busy``."""
    longer = lambda block: replace(block, calls=math.ceil(block.calls / 40), least=BUSY_BLOCK)
    times = {name: Times(block, busy=Times(longer(block)) if busy else None) for name, block in blocks.items()}
    rounds = rounds_of({name: block.seconds for name, block in blocks.items()}, seconds)
    every = math.ceil(BUSY_BLOCK / min(block.seconds for block in blocks.values()))
    every = max(1, min(every, max(rounds.values()) // BUSY_FEWEST))
    draw = random.Random(0)
    for i in range(max(rounds.values())):
        names = [name for name in blocks if i < rounds[name]]
        order = draw.sample(names, len(names))
        _round(clock, {name: times[name] for name in order})
        if busy and i % every == 0:
            with busy:
                _round(clock, {name: times[name].busy for name in order})
    return times


def _round(clock, times: dict[str, Times]):
    for each, (device, host) in zip(times.values(), clock.time([each.block for each in times.values()]), strict=True):
        each.device.append(device)
        each.host.append(host)


def rounds_of(cost: dict[str, float], seconds: float) -> dict[str, int]:
    """Rounds of each candidate, by the seconds of its block: all have as many, but the slow only their fewest."""
    fewest = lambda block: next(rounds for limit, rounds in FEWEST.items() if block < limit)
    slow = max(SLOW_SECONDS, SLOW_FACTOR * min(cost.values()))
    mean = statistics.mean(block for block in cost.values() if block <= slow)
    usual = min(MOST, max(fewest(mean), int(seconds / mean)))
    return {name: usual if block <= slow else fewest(block) for name, block in cost.items()}
