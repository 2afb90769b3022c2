"""How long a kernel's blocks occupy a multiprocessor: its machine code is simulated, cycle by cycle.

One of the four sub-cores is simulated, because all do the same. The warps of all blocks that fit at a time share its
pipes. In each cycle the warp that is ready first issues its next instruction. A warp is ready when

    the stall count of its last instruction has passed, and the scoreboards it waits for are free (ptxas wrote both),
    its pipe is free, and no other warp has issued in this cycle,
    what it waits for has happened: a barrier, wgmma's products (`WARPGROUP.DEPBAR`), or the bytes of a tile.

How far pipes overlap is a result of this and no assumption: a product that is waited for at once delays what follows,
and two blocks fill each other's gaps as far as their warps are out of step.

Tiles come from the L2 cache at its bandwidth, each after TMA_LATENCY (cp.async: the latency of a load), in the order in
which they were requested. Not modelled: bank conflicts, instruction fetch, divergent branches.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from . import pipes
from .pipes import Instruction
from .sass import control_flow, natural_loops

PLAYED = 8  # times that a loop is simulated; the rest is extrapolated
BLOCKS = 2  # blocks that are timed, one after the other in each place of a multiprocessor


# ------------------------------------------------------------------------------- the way through a kernel
@dataclass
class Loop:
    """One iteration: instructions and inner loops. short: the shortest path through it that makes the products."""

    short: list
    long: list
    trips: list[float] = field(default_factory=lambda: [1.0, 0.0])  # by the short path, and by the long one

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
    blocks, before = control_flow([(at, i.text) for at, i in code.items()])
    after = [[m for m, p in enumerate(before) if n in p] for n in range(len(blocks))]
    lists = [[code[at] for at, _ in block] for block in blocks]
    natural = natural_loops(before)

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
            known[n] = None  # a cycle that is no natural loop is no path
            if n in natural and n != start:
                body, latches = natural[n]
                loop = Loop(*(route(body, n, latches, sign)[1] for sign in (-1e-2, 1e-2)))
                items, ways = [loop], {m for b in body for m in after[b]} - body
                worth, is_end = value(loop.short, length), bool(body & ends)
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
    """The loop that makes the products, the shorter one where another masks them; else the longest loop."""
    by_size = sorted(loops(items), key=lambda loop: len(list(flat(loop.short))), reverse=True)
    with_products = [loop for loop in by_size if loop.flop]
    return with_products[-1] if with_products else by_size[0] if by_size else None


# ------------------------------------------------------------------------------- playing
@dataclass
class Residency:
    """What a multiprocessor holds at one time."""

    blocks: int
    warps: int  # of a block
    load_bytes: Callable[[Instruction], float]  # bytes that one asynchronous load brings to a block
    memory: float = pipes.L2_LATENCY  # cycles of a load


class _Warp:
    """A warp and what it waits for."""

    def __init__(self, place: "_Place", code: list[Instruction], ready: float):
        self.place, self.code, self.next, self.ready = place, code, 0, ready
        self.free = [0.0] * 6  # when each scoreboard becomes free
        self.products = deque()  # when each committed group of wgmma ends
        self.copies, self.copied = deque(), 0.0  # when each group of cp.async ends; when the last copy arrives
        self.tiles = 0  # tiles waited for so far

    def earliest(self, pipe_free: dict[str, float]) -> float:
        """Tells when the next instruction can be issued, if no other warp is ready."""
        i = self.code[self.next]
        t = max(self.ready, pipe_free[i.pipe] - i.queue)
        for scoreboard in i.waits:
            t = max(t, self.free[scoreboard])
        return t


class _Place:
    """A place where blocks run one after the other: the programs that remain, the warps of the current block."""

    def __init__(self, programs: list[list[Instruction]], warps: int):
        self.programs, self.size, self.ends = programs, warps, []
        self.next_block(0.0)

    def next_block(self, now: float):
        code = self.programs[len(self.ends)]
        self.warps = [_Warp(self, code, now) for _ in range(self.size)]
        self.running, self.at_barrier, self.arrivals = self.size, [], []  # arrivals: of tiles


def play(programs: list[list[list[Instruction]]], on: Residency, tiles_per_wait: float = 1.0) -> list[list[float]]:
    """Tells when each block ends, [place][number].

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
        start = max(now, free[i.pipe])  # later than now if it waits in a queue
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
    """Tells when at most as many groups are pending as the instruction allows."""
    when = 0.0
    while len(groups) > int(wait.text.rsplit("0x", 1)[1], 16):
        when = max(when, groups.popleft())
    return when


def unroll(items, most: int = 10**9) -> list[Instruction]:
    """The instructions that a block issues, with at most ``most`` iterations of each loop."""
    issued = []
    for item in items:
        if isinstance(item, Loop):
            for body, trips in zip((item.short, item.long), item.trips, strict=True):
                issued += unroll(body, most) * min(round(trips), most)
        else:
            issued.append(item)
    return issued


@dataclass
class Time:
    """A block's time while as many run as fit: cycles of a multiprocessor divided by the blocks on it."""

    block: float
    step: float  # one iteration of the main loop; without one, the block
    busy: dict[str, float]  # of a step, the cycles of each pipe
    share: dict[str, float]  # of a whole block, the part of its cycles in which each pipe works


def block_time(items: list, on: Residency) -> Time:
    places = max(on.blocks * min(on.warps, 4) // 4, 1)  # a block of less than four warps leaves sub-cores idle
    per_core, main = max(on.warps // 4, 1), main_loop(items)
    names = [i.name for i in flat(main.short if main else ())]
    tiles, waits = (sum(name.startswith(start) for name in names) for start in ("UTMALDG", "SYNCS.PHASECHK"))
    ratio = tiles / waits if tiles and waits else 1.0

    def steady(loop: Loop, body: list) -> float:
        """Returns the cycles of one more iteration of a loop. The code before it has requested the first tiles."""
        before = [i for i in items[: items.index(loop)] if isinstance(i, Instruction)]
        once = unroll(body)
        few, many = (play([[before + once * n]] * places, on, ratio) for n in (PLAYED, 3 * PLAYED))
        return sum(m[-1] - f[-1] for f, m in zip(few, many, strict=True)) / places / (2 * PLAYED)

    short = unroll(items, PLAYED)
    # Each place starts with a different part of a block: in a long run, blocks are out of step.
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
    """Returns the cycles for which ``warps`` warps occupy each pipe."""
    cycles = dict.fromkeys(pipes.PIPES, 0.0)
    for i, times in _counted(items):
        cycles["issue"] += times * warps
        if i.pipe != "issue":
            cycles[i.pipe] += times * warps * i.busy
    return cycles


def _counted(items, times: float = 1.0) -> Iterator[tuple[Instruction, float]]:
    """Every instruction and how often a warp issues it."""
    for item in items:
        if isinstance(item, Loop):
            for body, trips in zip((item.short, item.long), item.trips, strict=True):
                if trips:
                    yield from _counted(body, times * trips)
        else:
            yield item, times
