import pytest
import torch
import torch.distributed as dist

from pygpt.integrations import aten


@pytest.fixture
def counts(monkeypatch):
    """What `pygpt.enable` counts from now on: the calls by the names of torch's functions."""
    monkeypatch.setattr(aten, "counts", aten.Counts())
    return aten.counts


@pytest.fixture(autouse=True)
def off_at_the_end():
    yield
    assert not aten._overrides, "a test has left functions on"


@pytest.fixture
def mesh(request):
    """A mesh on which this process is rank 0, and the others only pretend."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shape = getattr(request, "param", (1,))
    dist.init_process_group("fake", rank=0, world_size=torch.Size(shape).numel(), store=FakeStore())
    yield init_device_mesh("cpu", shape)
    dist.destroy_process_group()
