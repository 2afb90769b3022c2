"""The options that choose the rows: one list for argparse (`python -m bench`) and for pytest."""

import argparse

from .ops import DIRECTIONS, DTYPES, OPS


def some_of(names):
    """The type of an option that takes a comma-separated list."""

    def parse(text):
        found = [name.strip() for name in text.split(",")]
        if unknown := [name for name in found if name not in names]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {', '.join(names)}")
        return found

    return parse


def add_options(add):
    """``add`` is ArgumentParser.add_argument, or the like of pytest."""
    for name, names in (("ops", OPS), ("dtypes", tuple(DTYPES)), ("directions", DIRECTIONS)):
        known = f"some of {', '.join(names)}"
        add(f"--{name}", type=some_of(names), default=list(names), metavar="A,B", help=known)
    add("--only-standard", action="store_true", default=False, help="only the standard rows, those that --check judges")
    add("--quick", action="store_true", default=False, help="the standard rows, measured for a shorter time")
    add("--seconds", type=float, default=None, metavar="S", help="time for a row's pairs (1.5; with --quick 0.4)")
    add("--threads", type=int, default=None, metavar="N", help="torch.set_num_threads (default: PyTorch's own choice)")


def complete(options):
    """Fills in what follows from other options."""
    options.only_standard = options.only_standard or options.quick
    options.seconds = options.seconds or (0.4 if options.quick else 1.5)
