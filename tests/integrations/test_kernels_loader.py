"""The folder for Hugging Face's loader `kernels`: its variants load, serve and train, one version in a process.

The loader runs in processes of its own, because tests/kernels hides a module called kernels here.
"""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import pygpt
from pygpt.integrations import hub_layers, kernels
from pygpt.verify import allowance

ROOT = Path(__file__).parents[2]
SYSTEM = "x86_64-linux"
try:
    importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("kernels is not installed", allow_module_level=True)
built = pytest.mark.skipif(importlib.util.find_spec("pygpt._C") is None, reason="the CPU kernels are not built")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    kernels.write(folder, cuda=None)
    return folder


LOAD = """
import json, sys
from pathlib import Path
{before}
import kernels, torch
from kernels import LocalLayerRepository, kernelize, Mode, register_kernel_mapping, use_kernel_forward_from_hub
kernel = kernels.get_local_kernel(Path(sys.argv[1]))
{after}
"""
TRAIN = """
from torch import nn

@use_kernel_forward_from_hub("Linear")
class Linear(nn.Linear):
    pass

@use_kernel_forward_from_hub("RMSNorm")
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(48)), 1e-6
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]

names = ("Linear", "RMSNorm")
register_kernel_mapping({name: {"cpu": LocalLayerRepository(Path(sys.argv[1]), layer_name=name)} for name in names})
torch.manual_seed(0)
model, x = nn.Sequential(Linear(32, 48), Norm()), torch.randn(7, 32)
theirs = gradients(model, x)
model = kernelize(model, mode=Mode.TRAINING, device="cpu", use_fallback=False)
report = kernel.pygpt.report(model, x)
print(json.dumps({
    "file": kernel.pygpt.__file__,
    "served": sorted({row.op for row in report.rows if row.served and row.phase == "forward"}),
    "close": all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(theirs, gradients(model, x))),
    "chosen": str(kernel.pygpt.explain("linear", x, model[0].weight)),
    "result": kernel.linear(x, model[0].weight).shape,
}))
"""


@built
def test_a_kernel_from_a_folder_trains_a_model(folder, run_new_python):
    """Without pygpt on the path, and through the loader's own way to replace the layers of a model."""
    done = run_new_python(LOAD.format(before="", after=TRAIN), str(folder), PYTHONPATH="")
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr
    assert Path(found["file"]).is_relative_to(folder), found
    assert found["close"]
    assert found["served"] == ["linear", "rms_norm"]
    assert found["chosen"] == "linear: cpp"
    assert found["result"] == [7, 48]


@built
@pytest.mark.parametrize("version, says", [(pygpt.__version__, "same"), ("0.0.1", "torch.ops.pygpt exists once")])
def test_one_version_in_a_process(version, says, folder, run_new_python):
    before = f"import pygpt; pygpt.__version__ = {version!r}"
    done = run_new_python(
        LOAD.format(before=before, after="print('same', kernel.pygpt is pygpt)"), str(folder), PYTHONPATH=str(ROOT)
    )
    assert says in (done.stdout if says == "same" else done.stderr), done.stdout + done.stderr
    assert (done.returncode == 0) == (says == "same")


RULES = """
import json, sys
from kernels.backends import CUDA
from kernels.layer.layer import _validate_layer
from kernels.variants import Version, _resolve_variant_for_system, parse_variant
from torch import nn
from pygpt.integrations import hub_layers

variant, fits = parse_variant(sys.argv[1]), []
for of_torch, of_cuda in (("2.10", "13.0"), ("2.13", "13.2"), ("2.9", "13.0"), ("2.13", "12.8")):
    found, _ = _resolve_variant_for_system(
        [variant], CUDA(Version(of_cuda)), cpu="x86_64", os="linux", torch_version=Version(of_torch),
        torch_cxx11_abi=True, tvm_ffi_version=None,
    )
    fits.append(bool(found))
layers = [v for v in vars(hub_layers).values() if isinstance(v, type) and v.__module__ == hub_layers.__name__]
for layer in layers:
    _validate_layer(check_cls=layer, cls=layer, repo=layer)
print(json.dumps([fits, len(layers)]))
"""


def test_the_rules_of_the_loader(run_new_python):
    """A variant is for torch from 2.10 on and for CUDA of its major version. Layers have no state and one method."""
    done = run_new_python(RULES, f"torch-stable-abi210-cu130-{SYSTEM}", PYTHONPATH=str(ROOT))
    assert json.loads(done.stdout) == [[True, True, False, False], 6], done.stderr


@built
def test_the_folder_is_named_as_the_loader_wants_it(folder):
    (cpu,) = (folder / "build").iterdir()
    assert cpu.name == f"torch-stable-abi210-cpu-{SYSTEM}"


@pytest.mark.skipif(importlib.util.find_spec("pygpt._cuda") is None, reason="the CUDA kernels are not built")
def test_a_cuda_variant_has_both_libraries(tmp_path):
    paths = kernels.write(tmp_path, cuda="13.0")
    assert [path.name for path in paths] == [f"torch-stable-abi210-{name}-{SYSTEM}" for name in ("cpu", "cu130")]
    libraries = [{lib.name for lib in path.glob("pygpt/*.so")} for path in paths]
    assert libraries == [{"_C.abi3.so"}, {"_C.abi3.so", "_cuda.abi3.so"}]
    assert json.loads((paths[1] / "metadata.json").read_text())["backend"] == {"type": "cuda"}
    assert kernels.write(tmp_path, cuda="13.0") == paths  # in the place of the first
    assert {path.name for path in (tmp_path / "build").iterdir()} == {path.name for path in paths}


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"a version such as 13\.0, got '13'"):
        kernels.write(tmp_path, cuda="13")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="the CPU kernels were not built"):
        kernels.write(tmp_path, cuda=None)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- layers
class Llama(nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.randn(40)), 1e-5, offset

    def forward(self, x):
        normalized = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (self.offset + self.weight) * normalized.to(x.dtype)


@pytest.mark.parametrize("layer, offset", [(hub_layers.RMSNorm, 0.0), (hub_layers.RMSNormZeroCentered, 1.0)])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_norms(layer, offset, x_dtype, weight_dtype):
    """The dtype of the result is that of the model's own expression, for any pair of dtypes."""
    module, x = Llama(offset).to(weight_dtype), torch.randn(5, 40).to(x_dtype)
    want, got = module(x), layer.forward(module, x)
    assert got.dtype == want.dtype
    exact = Llama(offset).double()
    exact.load_state_dict(module.state_dict())
    exact = exact.weight.add(offset) * x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + exact.eps)
    theirs, ours = ((result.double() - exact).abs().max().item() for result in (want, got))
    coarsest = max((x_dtype, weight_dtype), key=lambda dtype: torch.finfo(dtype).eps)
    assert ours <= 2 * theirs + allowance(coarsest) * exact.abs().max().item()


@pytest.mark.parametrize("layer, torchs", [
    (hub_layers.Linear, nn.Linear(12, 20)), (hub_layers.LayerNorm, nn.LayerNorm(12)), (hub_layers.GELU, nn.GELU()),
    (hub_layers.GELUTanh, nn.GELU("tanh")),
])  # fmt: skip
def test_layers_of_torch(layer, torchs):
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer.forward(torchs, x), torchs(x))
