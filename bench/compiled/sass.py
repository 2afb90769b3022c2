"""NVIDIA's machine code: the kernels of a cubin or a library, their loops, spills and serialized products."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path


@dataclass
class Function:
    """One kernel of a cubin or a library."""

    name: str  # mangled
    arch: str  # such as sm_90
    registers: int
    stack: int  # bytes, where spilled registers go
    shared: int  # bytes, of the static kind
    sass: str = field(repr=False)

    @cached_property
    def loops(self) -> list["Loop"]:
        return loops(self.sass)

    @property
    def loop_spills(self) -> int:
        """Instructions in loops that access local memory, which is where spilled registers go.

        Up to a few registers put aside before a loop and fetched after it cost nothing; in one they cost bandwidth.
        """
        return len({at for loop in self.loops for at, text in loop.instructions if re.search(r"\b(STL|LDL)\b", text)})

    @property
    def serialized(self) -> str:
        return "one wait per HGMMA" if any(map(serializes_wgmma, self.loops)) else ""


def tool(name: str, *places: Path) -> str | None:
    """A program of the CUDA toolkit, searched in PATH, CUDA_HOME, the toolkit's usual folder, and then ``places``."""
    homes = filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")))
    folders = [None, *(Path(home) / "bin" for home in (*homes, "/usr/local/cuda")), *places]
    return next(filter(None, (shutil.which(name, path=folder) for folder in folders)), None)


def cuobjdump() -> str:
    """The toolkit's program; without a toolkit, the one that Triton brings."""
    triton = find_spec("triton")
    program = tool("cuobjdump", *([Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []))
    if program is None:
        raise FileNotFoundError("cuobjdump is needed: it is part of the CUDA toolkit, and of Triton")
    return program


def functions(path: Path, arch: str = "") -> list[Function]:
    """Every kernel in a cubin, an object or a library, once for each architecture, or for one of them."""
    only = ["-arch", arch] if arch else []
    dump = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", "-sass", *only, path], capture_output=True, text=True, check=True
    ).stdout
    usage, code, arch, name = {}, {}, "", ""
    for line in dump.splitlines():
        if m := re.match(r"arch = (\w+)", line):
            arch = m[1]
        elif m := re.match(r"\s*Function (\S+):$", line):
            name = m[1]
        elif m := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            usage[arch, name] = tuple(map(int, m.groups()))
        elif m := re.match(r"\s*Function : (\S+)", line):
            name = m[1]
            code[arch, name] = []
        elif (arch, name) in code:
            code[arch, name].append(line)
    return [Function(name, arch, *used, "\n".join(code.get((arch, name), ()))) for (arch, name), used in usage.items()]


@dataclass(frozen=True)
class Loop:
    """A natural loop of a kernel: the instructions between its header and the branches back to it."""

    instructions: list[tuple[int, str]]  # (address, text) in order of address, those of loops within included
    innermost: bool

    @property
    def start(self) -> int:
        """The first instruction's address."""
        return self.instructions[0][0]

    @property
    def end(self) -> int:
        """The last instruction's address. Code between start and end need not all belong to the loop."""
        return self.instructions[-1][0]


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of every instruction of a kernel."""
    return [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", sass)]


def loops(sass: str) -> list[Loop]:
    """Every loop of a kernel, by the address of its first instruction, outer loops before those within.

    Loops that only wait, such as the retry of an mbarrier's wait, are not listed. Backward branches alone would not
    do: the compiler moves blocks that rarely run, such as that retry, behind the kernel's end, from where they branch
    back into the middle of a loop.
    """
    blocks, predecessors = control_flow(instructions(sass))
    bodies = {header: body for header, (body, _) in natural_loops(predecessors).items()}
    code = {header: sorted(i for block in body for i in blocks[block]) for header, body in bodies.items()}
    waits = re.compile(r"\b(SYNCS|NANOSLEEP|BRA)\b")
    working = {header for header in code if not all(waits.search(text) for _, text in code[header])}
    result = [Loop(code[header], not (bodies[header] & working - {header})) for header in working]
    return sorted(result, key=lambda loop: (loop.start, -len(loop.instructions)))


def serializes_wgmma(loop: Loop) -> bool:
    """Tells whether each of several HGMMAs is waited for before the next one starts.

    wgmma runs asynchronously: the products of a tile belong into one group, which is waited for as a whole. Where
    ptxas cannot prove that nothing touches their registers meanwhile, a full wait follows each of them.
    """
    order = "".join(
        "product" if "HGMMA" in text else "wait"
        for _, text in loop.instructions
        if re.search(r"\bHGMMA\b|\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", text)
    )
    return order.count("product") > 1 and "productproduct" not in order * 2


def serialized(log: str) -> str:
    """Returns the codes of the messages in which ptxas reports serialized wgmma instructions, such as C7515."""
    return " ".join(dict.fromkeys(re.findall(r"\((C\d+)\)[^\n]*wgmma\S* instructions are serialized", log)))


def control_flow(code: list[tuple[int, str]]) -> tuple[list[list[tuple[int, str]]], list[set[int]]]:
    """Returns basic blocks, and for each the indices of those that can run right before it (a function's callers)."""
    jump = re.compile(r"\b(?:BRA|CALL)\b.*?\b0x([0-9a-f]+)")
    always = re.compile(r"BRA\S* 0x|(?:EXIT|RET|BRX|JMX)\b")  # without a predicate: nothing falls through
    targets = {at: int(m[1], 16) for at, text in code if (m := jump.search(text))}
    starts, blocks = set(targets.values()), []
    for place, (at, text) in enumerate(code):
        if not place or at in starts or code[place - 1][0] in targets or always.match(code[place - 1][1]):
            blocks.append([])
        blocks[-1].append((at, text))
    index = {block[0][0]: n for n, block in enumerate(blocks)}
    predecessors = [set() for _ in blocks]
    for n, block in enumerate(blocks):
        at, text = block[-1]
        if targets.get(at) in index:
            predecessors[index[targets[at]]].add(n)
        if n + 1 < len(blocks) and not always.match(text):
            predecessors[n + 1].add(n)
    return blocks, predecessors


def natural_loops(predecessors: list[set[int]]) -> dict[int, tuple[set[int], set[int]]]:
    """A loop's first block -> all its blocks, and those that branch back to the first."""
    dominators, loops = _dominators(predecessors), {}
    for header, before in enumerate(predecessors):
        latches = {block for block in before if header in dominators[block]}
        body, todo = {header}, list(latches)
        while todo:
            if (block := todo.pop()) not in body:
                body.add(block)
                todo += predecessors[block]
        if latches:
            loops[header] = body, latches
    return loops


def _dominators(predecessors: list[set[int]]) -> list[set[int]]:
    """Returns for each block its dominators: the blocks on every path to it, itself included."""
    everything = set(range(len(predecessors)))
    dominators = [everything if n and before else {n} for n, before in enumerate(predecessors)]
    previous = None
    while dominators != previous:
        previous = list(dominators)
        for n, before in enumerate(predecessors):
            if n and before:
                dominators[n] = {n}.union(set.intersection(*(dominators[block] for block in before)))
    return dominators
