"""How a Triton kernel's configuration is chosen: what does not fit gives way, autotuning measures, a file remembers."""

import pytest
import torch
import triton

from pygpt.dispatch import TABLE

if TABLE["triton"].missing:
    pytest.fail(TABLE["triton"].missing, pytrace=False)
from pygpt.triton_kernels import common, mlp

DEVICE = TABLE["triton"].devices[0]


class Recorded:
    """Stands for a kernel; refuses the configurations it is told to."""

    __name__ = "recorded"

    def __init__(self, *refused):
        self.refused, self.calls = refused, []

    def __getitem__(self, grid):
        def run(*args, BLOCK, num_warps, num_stages, **constants):
            self.calls.append((grid, BLOCK))
            if BLOCK in self.refused:
                raise triton.runtime.errors.OutOfResources(BLOCK, 0, "shared memory")

        return run


def configurations():
    return common.Configs("test", tuple(common.Config({"BLOCK": block}) for block in (64, 32, 16)))


def start(kernel, configs, n=100):
    common.launch(kernel, lambda blocks: n // blocks["BLOCK"], torch.zeros(3, device=DEVICE), configs=configs)


def test_what_does_not_fit_gives_way_to_the_next(monkeypatch):
    kernel, configs = Recorded(64), configurations()
    start(kernel, configs)
    start(kernel, configs)
    assert kernel.calls == [((1,), 64), ((3,), 32), ((3,), 32)]  # the refused one is not tried again


def test_nothing_fits():
    with pytest.raises(RuntimeError, match="no configuration of recorded fits .*shared memory"):
        start(Recorded(64, 32, 16), configurations())


def test_an_empty_grid_starts_nothing():
    kernel = Recorded()
    start(kernel, configurations(), n=0)
    assert not kernel.calls


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"x": "y"}', "\0\xff", '{"KEY": 99}', '{"KEY": -1}'])
def test_autotuning_survives_any_cache(content, monkeypatch, tmp_path):
    """The fastest candidate is found and kept; what the file held before does not matter."""
    monkeypatch.setenv("PYGPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    times, measured = {64: 3.0, 32: 1.0, 16: 2.0}, []

    def do_bench(run):
        run()
        measured.append(kernel.calls[-1][1])
        return times[measured[-1]]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    kernel, configs = Recorded(), configurations()

    def tuned():
        arguments = (torch.zeros(3, device=DEVICE),)
        return common._tuned(kernel, lambda blocks: 1, arguments, {}, configs).blocks["BLOCK"]

    if content is not None:
        tuned()
        (key,) = common.read_cache()
        common.cache_file().write_text(content.replace("KEY", key), encoding="latin-1")
        measured.clear()
    assert tuned() == 32 and measured == [64, 32, 16]
    assert tuned() == 32 and measured == [64, 32, 16]  # from the file
    assert [f.name for f in common.cache_file().parent.iterdir()] == ["triton.json"]


def test_measuring_restores_what_a_kernel_overwrites(monkeypatch, tmp_path, generator):
    """A candidate runs more than once, but a gate that is not kept lies where the hidden layer is written."""
    shapes = (mlp.FEW_ROWS + 1, 24), (64, 24), (64,), (8, 32)
    x, fc, fc_bias, proj = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    want = mlp.mlp_fwd(x, fc, fc_bias, proj, None, "swiglu", "input")[0]
    measured = []

    def do_bench(run):
        run(), run()
        measured.append(run)
        return len(measured)

    monkeypatch.setenv("PYGPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(common, "AUTOTUNE", True)
    for configs in mlp.GEMM.values():
        monkeypatch.setattr(configs, "chosen", {})
    assert torch.equal(mlp.mlp_fwd(x, fc, fc_bias, proj, None, "swiglu", "input")[0], want) and measured


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYGPT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    common._write_cache("key", 1)
    assert common.read_cache() == {}
