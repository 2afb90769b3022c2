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
    busy: int = 0  # how many busy processes there were beside it

    @property
    def shape(self) -> str:
        return self.case.shape + (f", {self.busy} busy" if self.busy else "")

    @property
    def facts(self) -> dict:
        c = self.case
        return {
            "op": c.op, "shape": self.shape, "dtype": self.dtype, "direction": self.direction, "dims": c.dims,
            "standard": self.dtype in c.standard, "busy": self.busy,
        }  # fmt: skip

    def __str__(self):
        return f"{self.case.op} {self.shape} {self.dtype} {self.direction}"


def cases(options) -> list[Case]:
    """Every case that the options name."""
    if options.shape:
        return [case for text in options.shape for case in shapes.custom(text, options.ops)]
    if options.sweep:
        return shapes.sweep(options.sweep)
    on_gpu = options.device == "cuda" or options.rehearse
    suite = [*(ops.GPU if on_gpu else ops.CPU), *(gpt.CASES if not options.rehearse else ())]
    suite = [case for case in suite if case.op in options.ops]
    if options.quick:
        wanted = [*shapes.first_of_each_op(suite), *(ops.PREDICTED if on_gpu else ())]
        suite = [case for case in suite if case in wanted]
    return shapes.tiny(suite) if options.rehearse else suite


def rows(options) -> list[Row]:
    """Every row that the options name, the most important first, because a run may end early."""
    wanted, first = [], shapes.first_of_each_op(ops.GPU)
    for case in cases(options):
        whole_model = case.op in gpt.DIRECTIONS
        dtypes, directions = (gpt.DTYPES, (gpt.DIRECTIONS[case.op],)) if whole_model else (ops.DTYPES, ops.DIRECTIONS)
        for dtype in (name for name in dtypes if name in options.dtypes):
            if options.only_standard and dtype not in case.standard:
                continue
            if options.device == "cuda" and dtype != "bfloat16" and case in ops.GPU and case not in first:
                continue  # the other dtypes only show that their kernels work
            wanted += [Row(case, dtype, direction) for direction in directions if direction in options.directions]
    if options.device == "cuda":
        return sorted(wanted, key=lambda row: ("bfloat16", "float32", "float16").index(row.dtype))
    order = list(ops.DTYPES)
    return sorted(wanted, key=lambda row: (row.dtype not in row.case.standard, order.index(row.dtype)))
