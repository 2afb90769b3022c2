"""Peers that compile the op for its shape: torch.compile, zentorch, OpenVINO, ONNX Runtime, JAX and tinygrad.

Those that have tensors of their own come with two functions, from PyTorch's tensors to theirs and back, which are not
timed.
"""

import io

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
    compiled = torch.compile(work.eager, backend="zentorch", dynamic=False)

    @torch.no_grad()
    def call(*tensors):
        return compiled(*tensors)

    return call


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


def from_numpy(result):
    found = [torch.from_numpy(array.copy()) for array in (result if isinstance(result, list) else [result])]
    return found[0] if len(found) == 1 else tuple(found)


def with_openvino(work, dims):
    import openvino

    to_numpy(work.tensors)
    model = openvino.convert_model(_Module(work.eager), example_input=work.tensors)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(model, "CPU", settings)

    def call(*arrays):
        found = compiled(list(arrays), share_inputs=True, share_outputs=True)
        return [found[i] for i in range(len(found))]

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


# ------------------------------------------------------------------------------- JAX
def to_jax(tensors):
    import jax

    return tuple(jax.dlpack.from_dlpack(t.contiguous()) for t in tensors)


def from_jax(result):
    found = [torch.from_dlpack(t) for t in verify.as_tuple(result)]
    return found[0] if len(found) == 1 else tuple(found)


def with_jax(expression):
    """``expression``(dims, *tensors), compiled at its first call."""

    def adapt(work, dims):
        import jax

        compiled = jax.jit(lambda *tensors: expression(dims, *tensors))
        return lambda *tensors: jax.block_until_ready(compiled(*tensors))

    return adapt


def _jax_attention(dims, q, k, v):
    import jax

    attention = jax.nn.dot_product_attention(*(t.swapaxes(1, 2) for t in (q, k, v)), is_causal=dims["causal"])
    return attention.swapaxes(1, 2)


def _jax_norm(x, weight, bias):
    from jax import numpy as jnp

    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5) * weight + bias


def _jax_gelu(x, approximate):
    import jax

    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _jax_relu(x):
    import jax

    return jax.nn.relu(x)


def _jax_mlp(dims, x, fc_weight, fc_bias, proj_weight, proj_bias):
    activation = {
        "gelu": lambda h: _jax_gelu(h, "none"),
        "gelu_tanh": lambda h: _jax_gelu(h, "tanh"),
        "relu": _jax_relu,
        "relu2": lambda h: _jax_relu(h) ** 2,
    }[dims["activation"]]
    return activation(x @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias


JAX = {
    "attention": _jax_attention,
    "linear": lambda dims, x, weight, bias: x @ weight.T + bias,
    "mlp": _jax_mlp,
    "layer_norm": lambda dims, x, weight, bias: _jax_norm(x, weight, bias),
    "add_layer_norm": lambda dims, x, r, weight, bias: (_jax_norm(x + r, weight, bias), x + r),
    "rms_norm": lambda dims, x, weight: x / ((x * x).mean(-1, keepdims=True) + 2**-23) ** 0.5 * weight,
    "gelu": lambda dims, x: _jax_gelu(x, dims["approximate"]),
    "relu": lambda dims, x: _jax_relu(x),
}


# ------------------------------------------------------------------------------- tinygrad
def to_tinygrad(tensors):
    from tinygrad import Device, Tensor

    if tensors[0].dtype == torch.bfloat16:
        raise Refused("NumPy, which carries the tensors over, has no bfloat16")
    return tuple(Tensor(t.cpu().numpy(), device=Device.DEFAULT).realize() for t in tensors)


def from_tinygrad(result):
    found = [torch.from_numpy(t.numpy()) for t in verify.as_tuple(result)]
    return found[0] if len(found) == 1 else tuple(found)


def with_tinygrad(expression):
    """``expression``(dims, *tensors), compiled at its second call and replayed from the third."""

    def adapt(work, dims):
        from tinygrad import Device, TinyJit

        @TinyJit
        def jitted(*tensors):
            result = expression(dims, *tensors)
            return tuple(t.realize() for t in result) if isinstance(result, tuple) else result.realize()

        for _ in range(2):
            jitted(*to_tinygrad(work.tensors))

        def call(*tensors):
            result = jitted(*tensors)
            Device[Device.DEFAULT].synchronize()
            return result

        return call

    return adapt


def _tinygrad_gelu(x, approximate):
    return x.gelu() if approximate == "tanh" else 0.5 * x * (1 + (x / 2**0.5).erf())


def _tinygrad_mlp(dims, x, fc_weight, fc_bias, proj_weight, proj_bias):
    act = {
        "gelu": lambda h: _tinygrad_gelu(h, "none"),
        "gelu_tanh": lambda h: h.gelu(),
        "relu": lambda h: h.relu(),
        "relu2": lambda h: h.relu().square(),
    }[dims["activation"]]
    return act(x.linear(fc_weight.T, fc_bias)).linear(proj_weight.T, proj_bias)


TINYGRAD = {
    "attention": lambda dims, q, k, v: q.scaled_dot_product_attention(k, v, is_causal=dims["causal"]),
    "linear": lambda dims, x, weight, bias: x.linear(weight.T, bias),
    "mlp": _tinygrad_mlp,
    "layer_norm": lambda dims, x, weight, bias: x.layernorm(eps=1e-5) * weight + bias,
    "add_layer_norm": lambda dims, x, r, weight, bias: ((x + r).layernorm(eps=1e-5) * weight + bias, x + r),
    "rms_norm": lambda dims, x, weight: x * (x.square().mean(-1, keepdim=True) + 2**-23).rsqrt() * weight,
    "gelu": lambda dims, x: _tinygrad_gelu(x, dims["approximate"]),
    "relu": lambda dims, x: x.relu(),
}
