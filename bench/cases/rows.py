"""A row of the table, and which rows a run measures."""

from dataclasses import dataclass

from . import gpt, ops, shapes
from .ops import Case


@dataclass(frozen=True)
class Row:
    """One line of the table: a case, in a dtype and a direction."""

    case: Case
    dtype: str
    direction: str

    @property
    def facts(self) -> dict:
        c = self.case
        return {
            "op": c.op, "shape": c.shape, "dtype": self.dtype, "direction": self.direction, "dims": c.dims,
            "standard": self.dtype in c.standard,
        }  # fmt: skip

    def __str__(self):
        return f"{self.case.op} {self.case.shape} {self.dtype} {self.direction}"


def cases(options) -> list[Case]:
    """Every case that the options name."""
    if options.shape:
        return [case for text in options.shape for case in shapes.custom(text, options.ops)]
    if options.sweep:
        return shapes.sweep(options.sweep)
    on_gpu = options.device == "cuda" or options.rehearse
    found = [case for case in (ops.GPU if on_gpu else ops.CPU) if case.op in options.ops]
    found += [case for case in gpt.CASES if case.op in options.ops and not options.rehearse]
    if options.quick:
        predicted = ops.PREDICTED if on_gpu else ()
        first = shapes.first_of_each_op(found)
        found = [case for case in found if case in first or case in predicted]
    return shapes.tiny(found) if options.rehearse else found


def rows(options) -> list[Row]:
    """Every row that the options name, the most important first, because a run may end early."""
    found, first = [], shapes.first_of_each_op(ops.GPU)
    for case in cases(options):
        whole_model = case.op in gpt.DIRECTIONS
        dtypes, directions = (gpt.DTYPES, (gpt.DIRECTIONS[case.op],)) if whole_model else (ops.DTYPES, ops.DIRECTIONS)
        for dtype in (name for name in dtypes if name in options.dtypes):
            wanted = dtype in case.standard or not options.only_standard
            if options.device == "cuda" and dtype != "bfloat16" and case in ops.GPU:
                wanted &= case in first  # the other dtypes only show that their kernels work
            if wanted:
                found += [Row(case, dtype, direction) for direction in directions if direction in options.directions]
    if options.device == "cuda":
        return sorted(found, key=lambda row: ("bfloat16", "float32", "float16").index(row.dtype))
    order = list(ops.DTYPES)
    return sorted(found, key=lambda row: (row.dtype not in row.case.standard, order.index(row.dtype)))
