"""The folder for Hugging Face's loader `kernels`: its variants load, serve and train, one version in a process.

The loader runs in processes of its own, because tests/kernels hides a module called kernels here.
"""

import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from pygpt.integrations import hub_layers, kernels
from pygpt.verify import allowance

ROOT = Path(__file__).parents[2]
SYSTEM = f"{platform.machine()}-linux"
try:
    importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("kernels is not installed", allow_module_level=True)
built = pytest.mark.skipif(importlib.util.find_spec("pygpt._C") is None, reason="the CPU kernels are not built")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    kernels.write(folder)
    return folder


HIDE = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "pygpt._C" else find(name, *package)
"""
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
    """Also through the loader's own way to replace the layers of a model."""
    done = run_new_python(LOAD.format(before="", after=TRAIN), str(folder), PYTHONPATH="")
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr
    assert Path(found["file"]).is_relative_to(folder), found
    assert found["close"]
    assert found["served"] == ["linear", "rms_norm"]
    assert found["chosen"] == "linear: cpp"
    assert found["result"] == [7, 48]


@built
@pytest.mark.parametrize("change, says", [
    ("", "same True"), ("pygpt.__version__ = '0.0.1'", "torch.ops.pygpt exists once"),
    (HIDE, "without its library _C"),
])  # fmt: skip
def test_one_version_in_a_process(change, says, folder, run_new_python):
    before = f"import pygpt\n{change}"
    done = run_new_python(
        LOAD.format(before=before, after="print('same', kernel.pygpt is pygpt)"), str(folder), PYTHONPATH=str(ROOT)
    )
    assert says in (done.stderr if change else done.stdout), done.stdout + done.stderr
    assert (done.returncode != 0) == bool(change)


@built
def test_a_library_that_does_not_load_is_an_error(tmp_path, run_new_python):
    """PyTorch would serve in its place, and nobody would know."""
    (variant,) = [path for path in kernels.write(tmp_path) if "-cpu-" in path.name]
    next(variant.glob("pygpt/_C*")).write_bytes(b"of another system")
    done = run_new_python(LOAD.format(before="", after=""), str(tmp_path), PYTHONPATH="")
    assert done.returncode != 0 and "ImportError" in done.stderr and "_C" in done.stderr, done.stdout


RULES = """
import json, sys
from kernels.backends import CUDA
from kernels.layer.layer import _validate_layer
from kernels.variants import Version, _resolve_variant_for_system, parse_variant
from torch import nn
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from pygpt.integrations import hub_layers

variant, fits = parse_variant(sys.argv[1]), []
for of_torch, of_cuda in (("2.10", "13.0"), ("2.13", "13.2"), ("2.9", "13.0"), ("2.13", "12.8")):
    found, _ = _resolve_variant_for_system(
        [variant], CUDA(Version(of_cuda)), cpu=variant.arch.platform, os="linux", torch_version=Version(of_torch),
        torch_cxx11_abi=True, tvm_ffi_version=None,
    )
    fits.append(bool(found))
replaced = {
    "Linear": nn.Linear, "LayerNorm": nn.LayerNorm, "RMSNorm": LlamaRMSNorm, "RMSNormZeroCentered": Gemma3RMSNorm,
    "GELU": GELUActivation, "GELUTanh": NewGELUActivation,
}
for name, theirs in replaced.items():
    _validate_layer(check_cls=theirs, cls=getattr(hub_layers, name), repo=name)
layers = [v for v in vars(hub_layers).values() if isinstance(v, type) and v.__module__ == hub_layers.__name__]
print(json.dumps([fits, sorted(layer.__name__ for layer in layers) == sorted(replaced)]))
"""


def test_the_rules_of_the_loader(run_new_python):
    """A variant is for torch from 2.10 on and for CUDA of its major version. Layers have no state and one method."""
    done = run_new_python(RULES, f"torch-stable-abi210-cu130-{SYSTEM}", PYTHONPATH=str(ROOT))
    assert json.loads(done.stdout) == [[True, True, False, False], True], done.stderr


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


@pytest.mark.parametrize("torchs, has_kernels", [(None, False), ("13.0", False), (None, True), ("13.0", True)])
def test_the_default_variants(torchs, has_kernels, tmp_path, monkeypatch):
    """A CUDA variant where there are CUDA kernels and torch has CUDA; else none, and no error."""
    monkeypatch.setattr(torch.version, "cuda", torchs)
    monkeypatch.setattr(kernels, "has_cuda", lambda: has_kernels)
    monkeypatch.setattr(kernels, "_write_variant", lambda variant, device: variant)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert len(kernels.write(tmp_path)) == 1 + bool(torchs and has_kernels)


@built
def test_a_variant_that_cannot_be_replaced_stays(folder, monkeypatch):
    (variant,) = (folder / "build").iterdir()
    rename = Path.rename

    def refuse(self, target):
        if self.name == "new":
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        kernels.write(folder)
    assert [*(folder / "build").iterdir()] == [variant] and (variant / "metadata.json").is_file()


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"a version such as 13\.0, got '13'"):
        kernels.write(tmp_path, cuda="13")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the CUDA kernels were not built"):
        kernels.write(tmp_path, cuda="13.0")
    with pytest.raises(FileNotFoundError, match="the CPU kernels were not built"):
        kernels.write(tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- layers
def theirs_of(name):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    return llama.LlamaRMSNorm(40, 1e-5) if name == "RMSNorm" else Gemma3RMSNorm(40, 1e-5)


@pytest.mark.parametrize("name", ["RMSNorm", "RMSNormZeroCentered"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_norms(name, x_dtype, weight_dtype):
    """As transformers' classes compute them, for any pair of dtypes, on which the dtype of the result depends."""
    module, x = theirs_of(name), torch.randn(5, 40).to(x_dtype)
    nn.init.normal_(module.weight)
    module = module.to(weight_dtype)
    want, got = module(x), getattr(hub_layers, name).forward(module, x)
    assert got.dtype == want.dtype
    weight = module.weight.double() + (name != "RMSNorm")
    exact = weight * x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    theirs, ours = ((result.double() - exact).abs().max().item() for result in (want, got))
    coarsest = max((x_dtype, weight_dtype), key=lambda dtype: torch.finfo(dtype).eps)
    assert ours <= 2 * theirs + allowance(coarsest) * exact.abs().max().item()


def test_norms_of_other_modules():
    x = torch.randn(3, 8)
    for module in (nn.RMSNorm(8), nn.RMSNorm(8, elementwise_affine=False)):
        torch.testing.assert_close(hub_layers.RMSNorm.forward(module, x), module(x))
    with pytest.raises(AttributeError, match="Linear has none of variance_epsilon, eps, epsilon, norm_eps"):
        hub_layers.RMSNorm.forward(nn.Linear(8, 8), x)


@pytest.mark.parametrize("layer, torchs", [
    (hub_layers.Linear, nn.Linear(12, 20)), (hub_layers.LayerNorm, nn.LayerNorm(12)), (hub_layers.GELU, nn.GELU()),
    (hub_layers.GELUTanh, nn.GELU("tanh")),
])  # fmt: skip
def test_layers_of_torch(layer, torchs):
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer.forward(torchs, x), torchs(x))
