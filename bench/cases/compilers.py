"""Peers that compile the op for its shape: torch.compile, zentorch, OpenVINO, ONNX Runtime, JAX and tinygrad.

Those that have tensors of their own come with two functions, from PyTorch's tensors to theirs and from their results to
a tuple of PyTorch's, which are not timed.
"""

import io
from functools import partial
from types import SimpleNamespace

import torch

from pygpt import verify

from .refusal import Refused


# ------------------------------------------------------------------------------- on PyTorch's tensors
def with_inductor(work, dims):
    """torch.compile of PyTorch's expression in default mode, for these shapes alone."""
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # else backward cannot be run again on one forward
    torch._dynamo.reset()
    return torch.compile(work.eager, dynamic=False)


def with_zentorch(work, dims):
    import zentorch  # noqa: F401 (registers its backend)

    torch._dynamo.reset()
    return torch.no_grad()(torch.compile(work.eager, backend="zentorch", dynamic=False))


# ------------------------------------------------------------------------------- on NumPy's arrays
class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def to_numpy(tensors):
    if tensors[0].dtype != torch.float32:
        raise Refused("it is measured in float32 only")
    return tuple(t.numpy() for t in tensors)


def from_numpy(arrays):
    return tuple(torch.from_numpy(array.copy()) for array in arrays)


def with_openvino(work, dims):
    import openvino

    to_numpy(work.tensors)
    model = openvino.convert_model(_Module(work.eager), example_input=work.tensors)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(model, "CPU", settings)

    def call(*arrays):
        result = compiled(list(arrays), share_inputs=True, share_outputs=True)
        return [result[i] for i in range(len(result))]

    return call


ONNX = ("attention", "linear", "mlp", "layer_norm", "add_layer_norm", "gelu", "relu")  # what torch.onnx can export


def with_onnxruntime(work, dims):
    import onnxruntime

    to_numpy(work.tensors)
    file = io.BytesIO()
    names = [f"input{i}" for i in range(len(work.tensors))]
    torch.onnx.export(_Module(work.eager), work.tensors, file, dynamo=False, input_names=names, opset_version=20)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), settings, providers=["CPUExecutionProvider"])
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


# ------------------------------------------------------------------------------- JAX and tinygrad
def _mlp(lib, dims, x, fc_weight, fc_bias, proj_weight, proj_bias):
    if dims["activation"] == "swiglu":
        raise Refused("no expression of a gated activation")
    activation = {
        "gelu": lib.gelu["none"],
        "gelu_tanh": lib.gelu["tanh"],
        "relu": lib.relu,
        "relu2": lambda h: lib.relu(h) ** 2,
    }[dims["activation"]]
    return lib.linear(activation(lib.linear(x, fc_weight, fc_bias)), proj_weight, proj_bias)


# Each op in the functions of a library ``lib``, whose norms have no weights.
EXPRESSIONS = {
    "attention": lambda lib, dims, q, k, v: lib.attention(q, k, v, is_causal=dims["causal"]),
    "linear": lambda lib, dims, x, weight, bias: lib.linear(x, weight, bias),
    "mlp": _mlp,
    "layer_norm": lambda lib, dims, x, weight, bias: lib.layer_norm(x) * weight + bias,
    "add_layer_norm": lambda lib, dims, x, r, weight, bias: (lib.layer_norm(x + r) * weight + bias, x + r),
    "rms_norm": lambda lib, dims, x, weight: lib.rms_norm(x) * weight,
    "add_rms_norm": lambda lib, dims, x, r, weight: (lib.rms_norm(x + r) * weight, x + r),
    "gelu": lambda lib, dims, x: lib.gelu[dims["approximate"]](x),
    "relu": lambda lib, dims, x: lib.relu(x),
}


def to_jax(tensors):
    import jax

    return tuple(jax.dlpack.from_dlpack(t.contiguous()) for t in tensors)


def from_jax(result):
    return tuple(torch.from_dlpack(t) for t in verify.as_tuple(result))


def with_jax(op, work, dims):
    """The op's expression, compiled at its first call."""
    import jax

    def attention(q, k, v, is_causal):
        heads_inside = (t.swapaxes(1, 2) for t in (q, k, v))
        return jax.nn.dot_product_attention(*heads_inside, is_causal=is_causal).swapaxes(1, 2)

    def layer_norm(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jax.numpy.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)

    lib = SimpleNamespace(
        attention=attention,
        linear=lambda x, weight, bias: x @ weight.T + bias,
        layer_norm=layer_norm,
        rms_norm=lambda x: x / ((x * x).mean(-1, keepdims=True) + 2**-23) ** 0.5,
        gelu={kind: partial(jax.nn.gelu, approximate=kind == "tanh") for kind in ("none", "tanh")},
        relu=jax.nn.relu,
    )
    compiled = jax.jit(partial(EXPRESSIONS[op], lib, dims))
    return lambda *tensors: jax.block_until_ready(compiled(*tensors))


def to_tinygrad(tensors):
    from tinygrad import Device, Tensor

    if tensors[0].dtype == torch.bfloat16:
        raise Refused("NumPy, which carries the tensors over, has no bfloat16")
    return tuple(Tensor(t.cpu().numpy(), device=Device.DEFAULT).realize() for t in tensors)


def from_tinygrad(result):
    return tuple(torch.from_numpy(t.numpy()) for t in verify.as_tuple(result))


def with_tinygrad(op, work, dims):
    """The op's expression, compiled at its second call and replayed from the third."""
    from tinygrad import Device, Tensor, TinyJit

    lib = SimpleNamespace(
        attention=Tensor.scaled_dot_product_attention,
        linear=lambda x, weight, bias: x.linear(weight.T, bias),
        layer_norm=lambda x: x.layernorm(eps=1e-5),
        rms_norm=lambda x: x * (x.square().mean(-1, keepdim=True) + 2**-23).rsqrt(),
        gelu={"none": lambda x: 0.5 * x * (1 + (x / 2**0.5).erf()), "tanh": Tensor.gelu},
        relu=Tensor.relu,
    )

    @TinyJit
    def jitted(*tensors):
        return tuple(t.realize() for t in verify.as_tuple(EXPRESSIONS[op](lib, dims, *tensors)))

    for _ in range(2):
        jitted(*to_tinygrad(work.tensors))

    def call(*tensors):
        result = jitted(*tensors)
        Device[Device.DEFAULT].synchronize()
        return result

    return call
