"""Makes Triton's interpreter quicker, without a change to what kernels compute.

It is written for clarity: every operation builds types, shapes and tables anew that are always the same. In our tests
that takes more time than the arithmetic, so here they are remembered.
"""

import math
from functools import cache
from importlib.metadata import version


def remember_what_is_constant():
    from triton.language import core
    from triton.runtime import interpreter

    prepare = cache(interpreter._patch_lang)

    def call(self, *args, **kwargs):  # of a device function
        prepare(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 9):  # what follows replaces 3.9's code
        return

    np_dtypes: dict = {}
    np_dtype = interpreter._get_np_dtype

    def known_np_dtype(of):
        name = of.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(of)
        return np_dtypes[name]

    interpreter._get_np_dtype = known_np_dtype

    @cache
    def numel_and_shape(shape):
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(n) for n in shape])

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = numel_and_shape(type.shape if type.is_block() else ())

    core.tensor.__init__ = init_tensor

    types: dict = {}
    init_type = core.block_type.__init__

    def init_block_type(self, element_ty, shape):
        key = element_ty.name, *(n if type(n) is int else core._unwrap_if_constexpr(n) for n in shape)
        if key not in types:
            init_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name
        self.element_ty, (self.shape, self.numel, self.name) = element_ty, types[key]

    core.block_type.__init__ = init_block_type

    true, equal = core.constexpr(True), core.tuple.__eq__
    core.tuple.__eq__ = lambda self, other: true if self is other else equal(self, other)

    unwrap = core._unwrap_if_constexpr

    def unwrap_if_constexpr(o):
        kind = type(o)
        return o.value if kind is core.constexpr else o if kind is core.tensor or kind is int else unwrap(o)

    core._unwrap_if_constexpr = unwrap_if_constexpr
