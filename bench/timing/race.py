"""The race: candidates are timed in turn, and what is compared are medians.

Machines drift, so two figures taken a minute apart say nothing about each other. Each round times one block of every
candidate, in an order drawn anew.
"""

import math
import random
import statistics

from .clocks import Block, Times

FEWEST = {0.5: 5, 5.0: 3, math.inf: 1}  # a candidate whose block takes less than so many seconds: rounds at least
MOST = 200  # rounds
SLOW_FACTOR, SLOW_SECONDS = 10, 0.1  # a block above both of these is slow: SLOW_FACTOR times the fastest


def race(clock, blocks: dict[str, Block], seconds: float) -> dict[str, Times]:
    """Times the candidates, which must be warm, for about ``seconds`` each."""
    times = {name: Times(block) for name, block in blocks.items()}
    rounds = rounds_of({name: block.seconds for name, block in blocks.items()}, seconds)
    draw = random.Random(0)
    for i in range(max(rounds.values())):
        names = [name for name in blocks if i < rounds[name]]
        order = draw.sample(names, len(names))
        for name, (device, host) in zip(order, clock.time([blocks[name] for name in order]), strict=True):
            times[name].device.append(device)
            times[name].host.append(host)
    return times


def rounds_of(cost: dict[str, float], seconds: float) -> dict[str, int]:
    """Rounds of each candidate, by the seconds of its block: all have as many, but the slow only their fewest."""
    fewest = lambda block: next(rounds for limit, rounds in FEWEST.items() if block < limit)
    slow = max(SLOW_SECONDS, SLOW_FACTOR * min(cost.values()))
    mean = statistics.mean(block for block in cost.values() if block <= slow)
    usual = min(MOST, max(fewest(mean), int(seconds / mean)))
    return {name: usual if block <= slow else fewest(block) for name, block in cost.items()}
