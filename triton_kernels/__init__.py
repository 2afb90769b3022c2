"""The Triton kernels: a namespace of <op>_fwd and <op>_bwd with the signatures of `pygpt.reference`.

``registered`` has each op as torch.ops.pygpt_triton.<op>_fwd/_bwd too, with the reference as its fake kernel and the
op's own gradients: torch.compile and modes of torch's dispatcher see these. An ordinary call goes straight to the
launcher.
"""

from torch._C import _len_torch_dispatch_stack

from pygpt.backends import below_autograd, register_ops
from pygpt.dispatch import KERNEL_NAMES

from . import activation, attention, loss, mlp, norm, rope
from .common import INTERPRETED

_LAUNCHERS = {
    name: getattr(module, name)
    for module in (attention, rope, mlp, norm, activation, loss)
    for name in KERNEL_NAMES
    if hasattr(module, name)
}
registered = register_ops("pygpt_triton", _LAUNCHERS)


def _seen_by_modes(name, launcher):
    """``launcher``, or the registered op while a mode of torch's dispatcher is active, so that the mode sees it."""
    op = below_autograd(getattr(registered, name))

    def call(*args):
        return op(*args) if _len_torch_dispatch_stack() else launcher(*args)

    call.__name__, call.__doc__ = name, launcher.__doc__
    return call


globals().update({name: _seen_by_modes(name, launcher) for name, launcher in _LAUNCHERS.items()})
__all__ = ["INTERPRETED", "registered", *_LAUNCHERS]  # noqa: PLE0604 (strings)
