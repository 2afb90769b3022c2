"""How long a kernel's blocks keep a multiprocessor: its machine code is played through, cycle by cycle.

One sub-core of four is played: they do the same. The warps of all blocks that fit at a time share its pipes; in each
cycle the warp that could go first issues its next instruction, where

    the stall count before it has passed, and the scoreboards it waits for are free (ptxas wrote both),
    its pipe is free, and no other warp issued in this cycle,
    a barrier has everyone, a wait for wgmma (`WARPGROUP.DEPBAR`) has its products, a wait for a tile its bytes.

Nothing is said about how pipes overlap: that follows. A product that is waited for at once adds to what comes after it,
as does everything in a block that is alone; two blocks fill each other's gaps as far as their warps come out of step.

Tiles come from the L2 cache at its bandwidth, each after TMA_LATENCY (cp.async: the latency of a load), and are waited
for in the order in which they were asked for. Left out: bank conflicts, instruction fetch, branches that warps take
apart, registers' bank conflicts.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from . import pipes
from .pipes import Instruction
from .sass import _control_flow, _dominators

PLAYED = 8  # times that a loop is played through; the rest goes on as the last ones did
BLOCKS = 2  # that are timed, one after the other in each place of a multiprocessor


# ------------------------------------------------------------------------------- the way through a kernel
@dataclass
class Loop:
    """One time through a loop: instructions and inner loops. short: with as few of them as the products allow."""

    short: list
    long: list
    trips: list[float] = field(default_factory=lambda: [1.0, 0.0])  # by the short way, then by the long one

    @property
    def flop(self) -> int:
        return sum(i.flop for i in flat(self.short))


def flat(items) -> Iterator[Instruction]:
    """All instructions, those of each inner loop once."""
    for item in items:
        if isinstance(item, Loop):
            yield from flat(item.long)
        else:
            yield item


def way(sass: str, prefer: dict[str, float]) -> list:
    """A kernel from its first instruction to its end: instructions, and loops in their places.

    A branch goes where most products are, then where `prefer` has its largest sum, {the start of a name with suffixes:
    value of such an instruction}; then where memory is accessed most widely, and then the shortest way.
    """
    code = pipes.decode(sass)
    blocks, before = _control_flow([(at, i.text) for at, i in code.items()])
    dominators = _dominators(before)
    after = [[m for m, p in enumerate(before) if n in p] for n in range(len(blocks))]
    lists = [[code[at] for at, _ in block] for block in blocks]
    latches = {h: {n for n in p if h in dominators[n]} for h, p in enumerate(before)}
    latches = {header: ends for header, ends in latches.items() if ends}

    def body(header):
        inside, todo = {header}, list(latches[header])
        while todo:
            if (n := todo.pop()) not in inside:
                inside.add(n)
                todo += before[n]
        return inside

    bodies = {header: body(header) for header in latches}

    def value(items, length: float) -> float:
        total = 0.0
        for i in flat(items):
            total += 1e6 * i.flop + sum(v for start, v in prefer.items() if i.name.startswith(start)) * 1e3
            total += (-10 if i.width < 4 else 1) if i.pipe == "shared" or i.op == "UTMALDG" else 0
            total += length
        return total

    def route(inside: set[int], start: int, ends: set[int], length: float):
        """(value, items) of the best way from block start to one of ends."""
        known = {}

        def from_(n):
            if n in known:
                return known[n]
            known[n] = None  # a cycle that is no loop leads nowhere
            if n in bodies and n != start:
                loop = Loop(*(route(bodies[n], n, latches[n], sign)[1] for sign in (-1e-2, 1e-2)))
                items, ways = [loop], {m for b in bodies[n] for m in after[b]} - bodies[n]
                worth, is_end = value(loop.short, length), bool(bodies[n] & ends)
            else:
                items, ways, worth, is_end = lists[n], set(after[n]), value(lists[n], length), n in ends
            best = (0.0, []) if is_end else None
            if not is_end or inside is everything:  # an EXIT with a predicate need not be the end
                for m in sorted(ways & inside - {start}):
                    if (rest := from_(m)) and (best is None or rest[0] > best[0]):
                        best = rest
            known[n] = best and (best[0] + worth, items + best[1])
            return known[n]

        return from_(start)

    everything = set(range(len(blocks)))
    last = {n for n, block in enumerate(blocks) if block[-1][1].split()[0] == "EXIT"}
    return route(everything, 0, last, -1e-2)[1]


def loops(items: list) -> list[Loop]:
    return [item for item in items if isinstance(item, Loop)]


def main_loop(items: list) -> Loop | None:
    """The one that makes products, the shorter where a second one masks them; else the longest."""
    by_size = sorted(loops(items), key=lambda loop: len(list(flat(loop.short))), reverse=True)
    with_products = [loop for loop in by_size if loop.flop]
    return with_products[-1] if with_products else by_size[0] if by_size else None


# ------------------------------------------------------------------------------- playing
@dataclass
class Residency:
    """What is on a multiprocessor at one time."""

    blocks: int
    warps: int  # of a block
    load_bytes: Callable[[Instruction], float]  # that a block gets by one asynchronous load
    memory: float = pipes.L2_LATENCY  # cycles of a load


class _Warp:
    """A warp and what it waits for."""

    def __init__(self, place: "_Place", code: list[Instruction], ready: float):
        self.place, self.code, self.next, self.ready = place, code, 0, ready
        self.free = [0.0] * 6  # when each scoreboard is
        self.products = deque()  # when each committed group of wgmma ends
        self.copies, self.copied = deque(), 0.0  # the same of cp.async; when the last copy is there
        self.tiles = 0  # waited for so far

    def earliest(self, pipe_free: dict[str, float]) -> float:
        """When the next instruction can be issued, if no other warp is."""
        i = self.code[self.next]
        t = max(self.ready, pipe_free[i.pipe] - i.queue)
        for scoreboard in i.waits:
            t = max(t, self.free[scoreboard])
        return t


class _Place:
    """Where one block after the other runs: the programs that are left, the warps of the block that is there."""

    def __init__(self, programs: list[list[Instruction]], warps: int):
        self.programs, self.size, self.ends = programs, warps, []
        self.next_block(0.0)

    def next_block(self, now: float):
        code = self.programs[len(self.ends)]
        self.warps = [_Warp(self, code, now) for _ in range(self.size)]
        self.running, self.at_barrier, self.arrivals = self.size, [], []  # arrivals: of tiles


def play(programs: list[list[list[Instruction]]], on: Residency, tiles_per_wait: float = 1.0) -> list[list[float]]:
    """When each block ends, [place][number].

    programs: what the blocks of each place issue, one after the other. tiles_per_wait: that an mbarrier's phase brings.
    """
    free, l2_free = dict.fromkeys(pipes.PIPES, 0.0), 0.0
    places = [_Place(queue, max(on.warps // 4, 1)) for queue in programs]
    live = [warp for place in places for warp in place.warps]
    while live:
        when, w = float("inf"), None
        for warp in live:
            if warp.ready < when and (t := warp.earliest(free)) < when:
                when, w = t, warp
        i, place, now = w.code[w.next], w.place, max(when, free["issue"])
        start = max(now, free[i.pipe])  # later than now where it waits in a queue
        free["issue"] = now + 1
        free[i.pipe] = max(start + i.busy, free[i.pipe])
        w.ready = now + i.stall
        if not i.special:
            pass
        elif i.op == "HGMMA":
            w.products.append(start + i.busy)
        elif i.name.startswith("WARPGROUP.DEPBAR"):
            w.ready = max(w.ready, _drained(w.products, i))
        elif i.op in ("UTMALDG", "LDGSTS"):
            if w is place.warps[0]:  # for the whole block
                l2_free = max(l2_free, now) + on.load_bytes(i) / pipes.per_cycle(pipes.L2)
                place.arrivals += [l2_free + pipes.TMA_LATENCY] * (i.op == "UTMALDG")
            w.copied = l2_free + on.memory
        elif i.op == "LDGDEPBAR":
            w.copies.append(w.copied)
        elif i.name.startswith("DEPBAR.LE"):
            w.ready = max(w.ready, _drained(w.copies, i))
        elif i.name.startswith("SYNCS.PHASECHK"):
            w.tiles += tiles_per_wait
            if w.tiles <= len(place.arrivals):
                w.ready = max(w.ready, place.arrivals[int(w.tiles) - 1])
        elif i.name.startswith("BAR.SYNC"):
            place.at_barrier.append(w)
            w.ready = float("inf")
            if len(place.at_barrier) == place.running:
                for other in place.at_barrier:
                    other.ready = now + pipes.BARRIER
                place.at_barrier = []
        if i.sets < 6:
            w.free[i.sets] = max(w.free[i.sets], start + i.latency(on.memory))
        if i.reads < 6:
            w.free[i.reads] = max(w.free[i.reads], start + pipes.OTHER_LATENCY)
        w.next += 1
        if w.next == len(w.code):
            live.remove(w)
            place.running -= 1
            if not place.running:
                place.ends.append(now)
                if len(place.ends) < len(place.programs):
                    place.next_block(now + 1)
                    live += place.warps
    return [place.ends for place in places]


def _drained(groups: deque, wait: Instruction) -> float:
    """When no more groups than the instruction allows are under way."""
    when = 0.0
    while len(groups) > int(wait.text.rsplit("0x", 1)[1], 16):
        when = max(when, groups.popleft())
    return when


def unroll(items, most: int = 10**9) -> list[Instruction]:
    """What a block issues; each loop at most so often."""
    found = []
    for item in items:
        if isinstance(item, Loop):
            for body, trips in zip((item.short, item.long), item.trips, strict=True):
                once = unroll(body, most)
                found += once * min(round(trips), most)
        else:
            found.append(item)
    return found


@dataclass
class Time:
    """Of one block where as many run as fit, in cycles of the multiprocessor that it has to itself."""

    block: float
    step: float  # once through the main loop; of a kernel without one, the block
    busy: dict[str, float]  # of a step, the cycles of each pipe
    share: dict[str, float]  # of a whole block, the part of its cycles in which each pipe works


def block_time(items: list, on: Residency) -> Time:
    places = max(on.blocks * min(on.warps, 4) // 4, 1)  # a block of less than four warps is on some sub-cores only
    per_core, main = max(on.warps // 4, 1), main_loop(items)
    names = [i.name for i in flat(main.short if main else ())]
    tiles, waits = (sum(name.startswith(start) for name in names) for start in ("UTMALDG", "SYNCS.PHASECHK"))
    ratio = tiles / waits if tiles and waits else 1.0

    def steady(loop: Loop, body: list) -> float:
        """Cycles of one more time through a loop. What stands before it has asked for the first tiles."""
        before = [i for i in items[: items.index(loop)] if isinstance(i, Instruction)]
        once = unroll(body)
        few, many = (play([[before + once * n]] * places, on, ratio) for n in (PLAYED, 3 * PLAYED))
        return sum(m[-1] - f[-1] for f, m in zip(few, many, strict=True)) / places / (2 * PLAYED)

    short = unroll(items, PLAYED)
    # The places start out of step, as they are after a while: each with a different part of a block.
    ends = play([[short[len(short) * p // places :], *[short] * BLOCKS] for p in range(places)], on, ratio)
    cycles = sum(e[-1] - e[0] for e in ends) / BLOCKS / places
    for loop in loops(items):
        for body, trips in zip((loop.short, loop.long), loop.trips, strict=True):
            if rest := trips - min(round(trips), PLAYED):
                cycles += rest * steady(loop, body)
    share = {pipe: n * places / cycles for pipe, n in busy(items, per_core).items()}
    step = steady(main, main.short) if main else cycles
    return Time(cycles / on.blocks, step / on.blocks, busy(main.short if main else items, per_core), share)


def busy(items: list, warps: int) -> dict[str, float]:
    """Cycles of each pipe for so many warps."""
    found = dict.fromkeys(pipes.PIPES, 0.0)
    for i, times in _counted(items):
        found["issue"] += times * warps
        if i.pipe != "issue":
            found[i.pipe] += times * warps * i.busy
    return found


def _counted(items, times: float = 1.0) -> Iterator[tuple[Instruction, float]]:
    """Every instruction and how often a warp issues it."""
    for item in items:
        if isinstance(item, Loop):
            for body, trips in zip((item.short, item.long), item.trips, strict=True):
                if trips:
                    yield from _counted(body, times * trips)
        else:
            yield item, times
