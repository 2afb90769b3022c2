"""The ops on a GPU beside PyTorch: eager, torch.compile, and SDPA with each of its backends forced.

python -m bench.gpu, or through `make gpu`. Needs torch and what the backends need, nothing else.
--device cpu is a dry run: the same code on tiny shapes with what serves CPU tensors. Exit codes: 0;
1 where a result is wrong, a kernel of ours failed, or (--check) a first bar was missed; 2 without a GPU.
"""

import argparse
import gc
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

import pygpt
from pygpt.dispatch import TABLE

from .cases import expected
from .cases import gpu as gpu_rows
from .cases.gpu import PEERS, SDPA, Group, Refused, play_cuda_on_the_cpu, trying
from .cases.ops import DIRECTIONS, DTYPES, OPS
from .first_light.steps import TimeUp, stop
from .options import some_of
from .show import report
from .timing import cuda as gpu_timer
from .timing.clocks import Work, caller

COMPILE_SHARE = 0.35  # of the budget, at most
ENOUGH = 6.0  # seconds that must be left to begin a group
DRIFT = 0.05  # between the limits before and after, worth a word


class Broken(BaseException):
    """The device no longer works in this process."""


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    add("--ops", type=some_of(OPS), default=list(OPS), metavar="A,B", help=f"some of {', '.join(OPS)}")
    add("--dtypes", type=some_of(DTYPES), default=list(DTYPES), metavar="A,B", help=f"some of {', '.join(DTYPES)}")
    add("--directions", type=some_of(DIRECTIONS), default=list(DIRECTIONS), metavar="A,B")
    add("--peers", type=some_of(PEERS), default=list(PEERS), metavar="A,B", help=f"some of {', '.join(PEERS)}")
    add("--backends", type=some_of(list(TABLE)), metavar="A,B", help="some of ours; default: all for the device")
    add("--quick", action="store_true", help="bfloat16 only: predicted shapes, each op's first one")
    add("--seconds", type=float, metavar="S", help="time for a row's rounds (0.5; with --quick 0.2)")
    add("--budget", type=float, default=270.0, metavar="S", help="time for everything; what doesn't fit is skipped")
    add("--check", action="store_true", help="exit code 1 where a first bar is missed")
    add("--json", type=Path, metavar="PATH", help="write the rows to this file")
    add("--save", action="store_true", help="write them to bench/results/<gpu>-<date>.json")
    add("--list", action="store_true", help="print our backends for the device and stop")
    add("--prepare", action="store_true", help="run every row once, which fills the compilers' caches, and stop")
    options = parser.parse_args(argv)
    options.seconds = options.seconds or (0.2 if options.quick else 0.5)
    if options.save and options.device == "cpu":
        parser.error("a dry run is no result to --save; --json PATH writes it elsewhere")
    return options


# ------------------------------------------------------------------------------- the run
class Run:
    """Measures group after group while there is time; ``rows`` and ``skipped`` are what it leaves."""

    def __init__(self, options, timer, names: list[str], groups: list[Group], now=time.monotonic):
        self.options, self.timer, self.names, self.groups, self.now = options, timer, names, groups, now
        self.start, self.compile_left = now(), COMPILE_SHARE * options.budget
        self.rows: list[dict] = []
        self.skipped: dict[str, list[str]] = {}  # why -> what
        self.limits = self.limits_after = None

    def left(self) -> float:
        return self.start + self.options.budget - self.now()

    def skip(self, what, why: str):
        self.skipped.setdefault(why, []).append(str(what))

    def measure(self, show=lambda row: None):
        """Everything; ``show`` gets each row as soon as it is known."""
        gc.collect()
        gc.freeze()
        waiting = list(self.groups)
        try:
            self.limits = None if self.options.prepare else gpu_timer.limits(self.timer)
            while waiting and self.left() > ENOUGH:
                for row in self.safely(waiting[0]):
                    self.rows.append(row)
                    show(row)
                del waiting[0]
            why = f"the budget of {self.options.budget:.0f} s"
        except TimeUp:
            why = "asked to stop (SIGTERM)"
        except Broken as e:
            why = f"the device is unusable after an error: {e}"
            self.rows.append(failed(waiting[0], "", "", str(e)))
            show(self.rows[-1])
        for group in waiting:
            self.skip(group, why)

    def safely(self, group: Group):
        """The rows of one group. Raises Broken where the device fails; any other error costs this group alone."""
        try:
            yield from self.group(group)
        except torch.OutOfMemoryError as e:
            self.skip(group, gpu_rows.reason(e))
        except Exception as e:  # noqa: BLE001 - it becomes a row
            yield failed(group, "", "", gpu_rows.reason(e))
        self.recover()

    def group(self, group: Group):
        """The rows of one group, as they are measured."""
        device, dtype = self.timer.device, DTYPES[group.dtype]
        work = group.case.setup(lambda *shape: torch.randn(shape, device=device).to(dtype), *group.case.args)
        candidates = {}
        for name in self.names:
            if why := TABLE[name].objections(group.case.op, work.tensors, {}):
                self.skip(group, f"{name} does not serve it: {'; '.join(why)}")
            else:
                candidates[name] = gpu_rows.ours(name, work)
        if not candidates:
            return
        checks = {}
        try:
            if not self.options.prepare:
                checks = trying(lambda: gpu_rows.check(candidates, work))
        except Refused as e:
            self.recover(e)
            self.skip(f"the check of {group}", str(e))
        peers = self.peers(group, work)
        for direction in self.options.directions:
            yield from self.row(group, direction, work, candidates, peers, checks)

    def recover(self, error: Exception | None = None):
        """Gives back memory; raises Broken if the device fails."""
        try:
            self.timer.release()
        except Exception as e:
            raise Broken(error or gpu_rows.reason(e)) from e

    def peers(self, group: Group, work: Work) -> dict:
        found = {"eager": work.eager}
        if group.compiled and "compile" in self.options.peers:
            found["compile"] = gpu_rows.compiled(work)
        if group.case.op == "attention":
            for name in SDPA:
                try:
                    found[name] = gpu_rows.sdpa(name, group)
                except Refused as e:
                    self.skip(f"{name}: {group}", str(e))
        return {name: peer for name, peer in found.items() if name in self.options.peers}

    def warm(self, name: str, function, work: Work, direction: str):
        """A call without arguments, run twice. Raises Refused."""
        began = self.now()
        if name == "compile" and (self.compile_left <= 0 or self.left() < 5 * ENOUGH):
            raise Refused("torch.compile has used its share of the budget")
        try:

            def twice():
                call = caller(function, [work.tensors], direction)
                self.timer.time([(call, 0.0)] * 2)
                return call

            return trying(twice)
        except Refused as e:
            self.recover(e)
            raise
        finally:
            if name == "compile":
                self.compile_left -= self.now() - began

    def row(self, group: Group, direction: str, work: Work, candidates: dict, peers: dict, checks: dict):
        calls = {}
        for name, function in {**candidates, **peers}.items():
            try:
                if isinstance(checks.get(name), Refused):
                    raise checks[name]
                calls[name] = self.warm(name, function, work, direction)
            except Refused as e:
                if name in candidates:
                    yield failed(group, direction, name, str(e))
                else:
                    self.skip(f"{name}: {group} {direction}", str(e))
        if self.options.prepare or not any(name in candidates for name in calls):
            return
        timings = gpu_timer.race(self.timer, calls, self.options.seconds)
        found = {name: timing.summary() for name, timing in timings.items()}
        others = {name: found[name] for name in peers if name in found}
        for name in candidates:
            if name in found:
                row = describe(group, direction, name) | found[name] | {"rounds": len(timings[name].device)}
                row |= self.rates(work, group.dtype, direction, row["ms"])
                row |= versus(row["ms"], others) | {"peers": others}
                if name in checks:
                    row |= vars(checks[name][direction])
                copy = self.limits["copy"]
                row["bar"] = expected.bar(row["op"], row["shape"], group.dtype, direction, gpu_name(), copy)
                yield row

    def rates(self, work: Work, dtype: str, direction: str, ms: float) -> dict:
        amount, memory = work.amount[direction == "backward"], work.bound == "memory"
        rate = amount * (work.tensors[0].element_size() if memory else 1) / ms / 1e9
        limit = self.limits["copy" if memory else dtype]
        return {"rate": rate, "unit": "TB/s" if memory else "TFLOP/s", "share_of_limit": rate / limit}


def describe(group: Group, direction: str, backend: str) -> dict:
    case = group.case
    return {"op": case.op, "shape": case.shape, "dtype": group.dtype, "direction": direction, "backend": backend}


def failed(group: Group, direction: str, backend: str, why: str) -> dict:
    return describe(group, direction, backend) | {"failed": why}


def versus(ms: float, peers: dict) -> dict:
    """The fastest peer and how many times its speed we have."""
    best = min(peers, key=lambda name: peers[name]["ms"], default=None)
    return {"best_peer": best, "ratio": peers[best]["ms"] / ms if best else None}


def gpu_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


# ------------------------------------------------------------------------------- what it says
def verdict(row: dict) -> str:
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    if row.get("wrong"):
        return f"WRONG: error {row['error']:.1e}, PyTorch's {row['eager_error']:.1e}"
    ratio = row["ratio"]
    word = (
        ""
        if ratio is None
        else "faster"
        if ratio > 1 + report.NOISE
        else "even"
        if ratio >= 1 - report.NOISE
        else "slower"
    )
    unchecked = "" if "wrong" in row else ", unchecked"
    return word + unchecked + (", launch-bound" if row.get("launch_bound") else "")


def met(row: dict) -> bool | None:
    """Whether the first bar is met; None without one."""
    if row.get("bar") is None:
        return None
    return row["rate"] >= row["bar"] and not row.get("wrong")


class Table:
    """One line a row, as the rows come."""

    def __init__(self, groups: list[Group], names: list[str]):
        self.shape = max([len(g.case.shape) for g in groups] + [5])
        self.name = max([len(n) for n in names] + [4])
        titles = "op,shape,dtype,way,ours,ms,q1-q3 %,rate,of limit,best peer,ratio,bar,verdict; peers in ms"
        print(self.line(*titles.split(",")))

    def line(self, op, shape, dtype, way, name, ms, spread, rate, share, peer, ratio, bar, rest) -> str:
        front = f"{op:<14} {shape:<{self.shape}} {dtype:<8} {way:<8} {name:<{self.name}}"
        return f"{front} {ms:>8} {spread:>7} {rate:>13} {share:>8} {peer:>9} {ratio:>5} {bar:>10}  {rest}".rstrip()

    def show(self, row: dict):
        about = [row[key] for key in ("op", "shape", "dtype", "direction", "backend")]
        if "failed" in row:
            print(self.line(*about, *[""] * 7, verdict(row)), flush=True)
            return
        spread = f"{(row['q3_ms'] - row['q1_ms']) / row['ms']:.1%}"
        bar = "" if row["bar"] is None else f"{row['bar']:.3g} {'met' if met(row) else 'missed'}"
        rate, ratio = f"{row['rate']:.3g} {row['unit']}", "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        numbers = f"{row['ms']:.4g}", spread, rate, f"{row['share_of_limit']:.0%}", row["best_peer"] or "", ratio, bar
        peers = ", ".join(f"{name} {peer['ms']:.4g}" for name, peer in row["peers"].items())
        print(self.line(*about, *numbers, f"{verdict(row)}; {peers}"), flush=True)


def head(m: dict) -> str:
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "cuda", "cudnn", "triton", "driver") if m[name])
    return f"{m['gpu']}: {versions}; ours: {', '.join(m['backends']) or 'none'}"


def limits_line(found: dict, after: dict | None) -> str:
    text = "limits: " + ", ".join(
        f"{name} {value:.3g} {'TB/s' if name == 'copy' else 'TFLOP/s'}" for name, value in found.items()
    )
    for name, value in (after or {}).items():
        if abs(value / found[name] - 1) > DRIFT:
            text += f"\n{name} was {value / found[name] - 1:+.0%} at the end of the run: its shares are that uncertain"
    return text


def machine(options, names: list[str]) -> dict:
    """What the figures depend on."""
    m = {"gpu": gpu_name() if options.device == "cuda" else "cpu, a dry run"}
    if options.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        m |= {"capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
        m |= {"memory_gb": p.total_memory / 1e9, "l2_mb": p.L2_cache_size / 1e6}
        m |= {"cudnn": torch.backends.cudnn.version()}
    clocks = gpu_timer.clocks() if options.device == "cuda" else {}
    triton = getattr(sys.modules.get("triton"), "__version__", None)  # where a backend has imported it
    m |= {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip, "triton": triton}
    m |= {"driver": clocks.get("driver_version"), "pygpt": pygpt.__version__, "python": sys.version.split()[0]}
    m |= {"backends": names, "peers": options.peers, "seconds": options.seconds, "budget": options.budget}
    m |= {"command": shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]])}
    return {"cudnn": None, **m, "date": time.strftime("%Y-%m-%d %H:%M:%S%z")}


def finish(run: Run, m: dict, options) -> int:
    """The end of the output, the file, the exit code."""
    m["limits"], m["limits_after"], m["used_s"] = run.limits, run.limits_after, run.now() - run.start
    m["skipped"] = run.skipped
    if run.limits:
        print("\n" + limits_line(run.limits, run.limits_after))
    for when in ("clocks_before", "clocks_after"):
        if m.get(when):
            print(f"{when.replace('_', ' ')}, under load: {', '.join(f'{k} {v}' for k, v in m[when].items())}")
    for why, what in run.skipped.items():
        print(f"skipped ({len(what)}): {why}\n  {'; '.join(what[:4])}{'; ...' if len(what) > 4 else ''}")
    bad = [row for row in run.rows if "failed" in row or row.get("wrong")]
    judged = [met(row) for row in run.rows if met(row) is not None]
    wrong = sum(bool(row.get("wrong")) for row in run.rows)
    print(f"{len(run.rows)} rows in {m['used_s']:.0f} s: {wrong} WRONG, {len(bad) - wrong} FAILED", end="")
    print(f"; first bar: {sum(judged)} of {len(judged)} met" if judged else "; no first bars for this device")
    for path in (options.json, report.default_path(m) if options.save else None):
        if path and run.rows:
            report.save(path, run.rows, m)
            print(f"wrote {path}")
    return 1 if bad or not run.rows or (options.check and not all(judged)) else 0


def main(argv=None) -> int:
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} in {sys.executable} sees none (--device cpu is a dry run)")
        return 2
    if options.device == "cpu" and "cuda" in (options.backends or ()):
        play_cuda_on_the_cpu()
    names, absent = gpu_rows.backends(options.device)
    names = [name for name in names if name in (options.backends or names)]
    if options.list:
        print(",".join(names))
        return 0
    torch.set_float32_matmul_precision("highest")  # PyTorch's default: float32 is float32, on both sides
    torch.manual_seed(0)
    groups = gpu_rows.plan(options.ops, options.dtypes, options.quick, tiny=options.device == "cpu")
    timer = gpu_timer.CudaTimer() if options.device == "cuda" else gpu_timer.CpuTimer()
    run = Run(options, timer, names, groups)
    if options.prepare:
        run.measure()
        for why, what in run.skipped.items():
            print(f"skipped: {why}: {'; '.join(what)}")
        print(f"all but these of {len(groups)} rows in the compilers' caches")
        return 0
    for name, why in absent.items():
        run.skip(f"backend {name}", why)
    if not all(group.compiled for group in groups) and "compile" in options.peers:
        run.skip("torch.compile elsewhere", "only for bfloat16 mlp, norms, gelu and one attention, to save time")
    m = machine(options, names)
    print(head(m))
    m["clocks_before"] = gpu_timer.clocks_under_load(timer)
    signal.signal(signal.SIGTERM, stop)
    table = Table(groups, names)

    def found(row: dict):
        table.show(row)
        if options.json:  # a run that is killed leaves its rows
            report.save(options.json, run.rows, m | {"limits": run.limits})

    run.measure(found)
    if run.left() > 0:
        try:
            m["clocks_after"] = gpu_timer.clocks_under_load(timer)
            run.limits_after = gpu_timer.limits(timer)
        except (TimeUp, RuntimeError):
            pass
    return finish(run, m, options)


if __name__ == "__main__":
    sys.exit(main())
