"""The rows as pytest's items: `pygpt bench`, or `pytest bench/suite.py` with its own options."""

from .cases import gpt, ops
from .timing import run
from .timing.candidates import Row


def cases(options) -> list[ops.Case]:
    """Every shape asked for."""
    if options.shape:
        return [case for text in options.shape for case in ops.custom(text, options.ops)]
    if options.sweep:
        return ops.sweep(options.sweep)
    if options.device == "cuda":
        from .cases import gpu as gpu_rows

        found = list(dict.fromkeys(group.case for group in gpu_rows.plan(options.ops)))
    else:
        found = [case for case in ops.CASES if case.op in options.ops]
    found += [case for case in gpt.CASES if case.op in options.ops]
    if options.quick:
        found = list({case.op: case for case in reversed(found)}.values())[::-1]
    return found


def rows(options) -> list[Row]:
    """Every row asked for; those that matter most first, for a run may end early."""
    found = []
    for case in cases(options):
        whole = case.op in gpt.DIRECTIONS
        known, ways = (gpt.USUAL, (gpt.DIRECTIONS[case.op],)) if whole else (tuple(ops.DTYPES), ops.DIRECTIONS)
        for dtype in (d for d in known if d in options.dtypes):
            if dtype in case.standard or not options.only_standard:
                found += [Row(case, dtype, way) for way in ways if way in options.directions]
    order = list(ops.DTYPES)
    return sorted(found, key=lambda row: (row.dtype not in row.case.standard, order.index(row.dtype)))


def row_id(row) -> str:
    """A row, or its Result, in a pytest item's name."""
    return str(row).replace(" ", "_")


def pytest_generate_tests(metafunc):
    found = rows(run.of(metafunc.config).options)
    metafunc.parametrize("row", found, ids=[row_id(row) for row in found])


def test_row(row, pytestconfig):
    run.of(pytestconfig).measure(row)
