"""The Triton kernels: a namespace of <op>_fwd and <op>_bwd with the signatures of `pygpt.reference`.

Each op is also registered as torch.ops.pygpt_triton.<op>_fwd/_bwd, with the reference as its fake
kernel. torch.compile sees those; an ordinary call goes straight to the launcher.
"""

import torch

from pygpt import reference

from . import activation, attention, mlp, norm
from .common import INTERPRETED

__all__ = ["INTERPRETED"]
_LIBRARY = torch.library.Library("pygpt_triton", "DEF")


def _namespace_function(name, launcher):
    _LIBRARY.define(name + torch.library.infer_schema(getattr(reference, name), mutates_args=()))
    _LIBRARY.impl(name, launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pygpt_triton::{name}", getattr(reference, name), lib=_LIBRARY)
    registered = getattr(torch.ops.pygpt_triton, name).default

    def call(*args):
        return registered(*args) if torch.compiler.is_compiling() else launcher(*args)

    call.__name__, call.__doc__ = name, launcher.__doc__
    return call


for _module in (attention, mlp, norm, activation):
    for _name in [n for n in vars(_module) if n.endswith(("_fwd", "_bwd")) and not n.startswith("_")]:
        globals()[_name] = _namespace_function(_name, getattr(_module, _name))
        __all__.append(_name)
