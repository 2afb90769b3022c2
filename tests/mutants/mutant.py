"""What a planted fault is, and the test files that several faults name."""

from dataclasses import dataclass

MEMORY, POISON, KERNELS, THREADS = (
    f"tests/kernels/test_{name}.py" for name in ("memory", "poison", "kernels", "threads")
)
PARITY, TRAIN = "tests/ops/test_parity.py", "tests/model/test_train.py"
OPTIONS, DROPOUT, EDGES = (f"tests/ops/test_attention_{name}.py" for name in ("options", "dropout", "edges"))
QKV, VARLEN = "tests/ops/test_qkv_attention.py", "tests/ops/test_varlen_attn.py"


@dataclass(frozen=True)
class Mutant:
    """``old`` is a regular expression that matches once in all files that ``file``, a pattern, names. ``new`` may refer
    to its groups."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # words that the names of the tests contain, the first of them their file

    @property
    def builds_cpu_library(self) -> bool:
        return self.file.startswith(("csrc/cpu", "csrc/attention", "csrc/bind"))
