"""The Triton kernels: a namespace of <op>_fwd and <op>_bwd with the signatures of `pygpt.reference`.

Each op is also registered as torch.ops.pygpt_triton.<op>_fwd/_bwd, with the reference as its fake kernel and the op's own
gradients (``registered``): torch.compile and modes of torch's dispatcher see those. An ordinary call goes straight to the
launcher.
"""

import torch
from torch._C import _len_torch_dispatch_stack

from pygpt.backends import below_autograd
from pygpt.backends import registered as _registered
from pygpt.dispatch import REFERENCE

from . import activation, attention, mlp, norm
from .common import INTERPRETED

_LIBRARY = torch.library.Library("pygpt_triton", "DEF")
_LAUNCHERS = {
    name: launcher
    for module in (attention, mlp, norm, activation)
    for name, launcher in vars(module).items()
    if name.endswith(("_fwd", "_bwd")) and not name.startswith("_")
}

for _name, _launcher in _LAUNCHERS.items():
    _LIBRARY.define(_name + torch.library.infer_schema(getattr(REFERENCE, _name), mutates_args=()))
    _LIBRARY.impl(_name, _launcher, "CompositeExplicitAutograd")

registered = _registered("pygpt_triton", _LIBRARY)


def _seen_by_modes(name, launcher):
    """``launcher``, or where a mode of the dispatcher is active the registered op, which it then sees."""
    op = below_autograd(getattr(registered, name))

    def call(*args):
        return op(*args) if _len_torch_dispatch_stack() else launcher(*args)

    call.__name__, call.__doc__ = name, launcher.__doc__
    return call


globals().update({name: _seen_by_modes(name, launcher) for name, launcher in _LAUNCHERS.items()})
__all__ = ["INTERPRETED", "registered", *_LAUNCHERS]  # noqa: PLE0604 (strings)
