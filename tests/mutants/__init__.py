"""The faults that tests/mutate.py plants, each with the test that must notice it and what it would do to a user.

A fault that no test can notice without a GPU, because it changes no result, is in EQUIVALENT, with the reason.
"""

from .cpu import CPU
from .cpu_attention import CPU_OPTIONS, CPU_VARLEN
from .cuda import CUDA, EQUIVALENT
from .cuda_attention import CUDA_OPTIONS, CUDA_VARLEN
from .dropout_norm import DROPOUT_NORM
from .loss import LOSS
from .mutant import Mutant
from .python import PYTHON
from .rope import ROPE
from .triton import TRITON
from .triton_attention import TRITON_OPTIONS, TRITON_VARLEN

__all__ = ["EQUIVALENT", "MUTANTS", "Mutant"]

MUTANTS = [
    *CUDA, *CUDA_OPTIONS, *CUDA_VARLEN, *CPU, *CPU_OPTIONS, *CPU_VARLEN, *PYTHON, *TRITON, *TRITON_OPTIONS,
    *TRITON_VARLEN, *ROPE, *LOSS, *DROPOUT_NORM,
]  # fmt: skip
