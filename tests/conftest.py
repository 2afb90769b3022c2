"""What every test gets: its backends, a fresh seed, one thread.

PYGPT_TEST_BACKENDS (default "cpp,triton,cuda,torch") names the backends under test. One that is missing
fails its tests; none is skipped. PYGPT_TEST_SEED repeats a run whose output shows it.

Without a GPU the Triton kernels run in Triton's interpreter and the CUDA kernels in our emulator, tens of
milliseconds a call: they are tested in the modules that name them in GPU_SHARE = {backend: n}, there on one of
n cases of a test that has more than FEW (on all of them in `make test-all`). Where that would leave out every case of
an op, or every case that a planted fault (tests/mutants) names, the first of them runs. With a GPU, they run on it. A
test marked share(n) is treated alike, on every machine. Before n grows, run `python -m tests.mutate`: a fault may be
noticed by some of the cases that it names.
"""

import os
import signal
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from tests import interpreter, processes
from tests.mutants import MUTANTS
from tests.mutate import is_named

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's products are small; threads make them slower

# What nohup or a shell's "&" had ignored, the processes that tests start would ignore too, were it not handled here.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

pytest_plugins = ["tests.crash"]
BACKENDS = os.environ.get("PYGPT_TEST_BACKENDS", "cpp,triton,cuda,torch").split(",")
ON_GPU = ("triton", "cuda")
FEW = 8
LONGEST = ("tests.kernels.test_triton_compiled", "tests.kernels.test_instructions")


def pytest_generate_tests(metafunc):
    share = getattr(metafunc.module, "GPU_SHARE", {})
    names = [name for name in BACKENDS if name not in ON_GPU or name in share]
    for fixture, wanted in (("backend", names), ("compiled", [name for name in names if name != "torch"])):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, wanted, scope="session")


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        interpreter.remember_what_is_constant()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Drops what a backend does not serve, and marks as slow what slow backends leave to `make test-all`.

    It serves the dtypes of its row in the table, and of attention's optional features those that it announces there.
    A parameter's attribute ``features`` names what the case needs; so does the Spec of an op that is a parameter.
    """
    from pygpt.dispatch import TABLE

    kept, dropped, shared = [], [], {}
    for item in items:
        params = _params(item)
        name = params.get("backend") or params.get("compiled")
        if name in TABLE and not _serves(TABLE[name], params):
            dropped.append(item)
            continue
        kept.append(item)
        share = 1
        if name in ON_GPU and not torch.cuda.is_available():
            share = item.module.GPU_SHARE[name]
        elif marker := item.get_closest_marker("share"):
            (share,) = marker.args
        shared.setdefault((item.module, item.originalname, name, share), []).append(item)
    left_out = set()
    for (*_, n), cases in shared.items():
        # in each group of n another place, so that no parameter stays the same
        left = {item for i, item in enumerate(cases if len(cases) > FEW else ()) if i % n != i // n % n}
        by_op = {}
        for item in cases:
            by_op.setdefault(_params(item).get("op"), []).append(item)
        left_out |= left - {of_op[0] for of_op in by_op.values() if left.issuperset(of_op)}
    for item in left_out - set(_named_by_faults(kept, left_out)):
        item.add_marker("slow")
    functions = {(item.module, item.originalname) for item in kept}
    gone = [item.nodeid for item in dropped if (item.module, item.originalname) not in functions]
    if gone and "PYGPT_TEST_BACKENDS" not in os.environ and not any("::" in arg for arg in config.args):
        raise pytest.UsageError(f"no backend under test serves a case of this test: {gone[0]}")
    config.hook.pytest_deselected(items=dropped)
    # The longest tests come first. One that came last would keep a single process busy.
    items[:] = sorted(kept, key=lambda item: item.module.__name__ not in LONGEST)


def _params(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _named_by_faults(items, left_out):
    """For every planted fault whose tests would all be left out, the first of them."""
    by_file = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            by_file.setdefault(item.nodeid.partition("::")[0], []).append(item)
    for mutant in MUTANTS:
        named = [item for item in by_file.get(mutant.tests[0], ()) if is_named(item.nodeid, mutant.tests)]
        if left_out.issuperset(named):
            yield from named[:1]


def _serves(row, params) -> bool:
    from pygpt.dispatch import SPECS

    described = [*params.values(), SPECS.get(params.get("op"))]
    needed = {feature for value in described for feature in getattr(value, "features", ())}
    served = row.name == "torch" or needed <= set(row.features.get("attention", ()))
    dtype = params.get("dtype", torch.float32)
    return served and (dtype in row.dtypes or not getattr(dtype, "is_floating_point", False))


def under_test(request):
    """The test's backend, or None."""
    return next((request.getfixturevalue(n) for n in ("backend", "compiled") if n in request.fixturenames), None)


@pytest.fixture
def device(request):
    """Where the backend under test runs."""
    return "cuda" if under_test(request) in ON_GPU and torch.cuda.is_available() else "cpu"


@pytest.fixture
def emulated(monkeypatch):
    """Makes the emulator the backend "cuda", with the options of emulator.kernels, until the test ends."""
    from pygpt.dispatch import TABLE
    from tests import emulator

    def use(**options):
        kernels = emulator.kernels(**options)
        monkeypatch.setitem(TABLE, "cuda", replace(TABLE["cuda"], kernels=kernels, missing="", devices=("cpu",)))

    return use


@pytest.fixture(autouse=True)
def without_a_gpu(request):
    """The CUDA kernels come from the emulator."""
    if not torch.cuda.is_available() and under_test(request) == "cuda":
        request.getfixturevalue("emulated")()


@pytest.fixture(autouse=True)
def few_draws(request, monkeypatch):
    """In quick tests, and where kernels are interpreted or emulated, verify draws once if that passes."""
    from pygpt import verify

    interpreted = under_test(request) in ON_GPU and not torch.cuda.is_available()
    if interpreted or not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(verify, "ELEMENTS", 1)


@pytest.fixture(autouse=True)
def seed():
    """A fresh seed for every test, shown when it fails; one thread, where threads aren't the subject."""
    value = int(os.environ.get("PYGPT_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"PYGPT_TEST_SEED={value}")
    torch.manual_seed(value)
    torch.set_num_threads(1)
    return value


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poisoned_memory():
    """Fresh memory is NaN: torch.empty comes back full of it, and freed heap blocks hold it."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    assert torch.empty(3).isnan().all()
    heap = [torch.full((n,), torch.nan) for n in (64, 512, 4096, 20_000) for _ in range(8)]
    del heap
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels(backend):
    """The namespace of ``<op>_fwd`` and ``<op>_bwd`` that the backend under test is."""
    from pygpt.dispatch import named  # raises where the backend is missing

    return named(backend).kernels


@pytest.fixture
def kernels_of(compiled):
    """The kernels of the compiled backend under test."""
    from pygpt.dispatch import named

    return named(compiled).kernels


@pytest.fixture(scope="session")
def forks():
    server = processes.Forks()
    yield server
    server.close()


@pytest.fixture
def run_python(forks):
    """Runs Python source in a process that has imported torch, with the given arguments and environment variables."""

    def run(source: str, *args: str, **environment: str):
        return forks.run(source, args, {**os.environ, "PYTHONPATH": processes.search_path(), **environment})

    return run


@pytest.fixture
def run_new_python():
    """Likewise, in a process that has imported nothing."""

    def run(source: str, *args: str, **environment: str):
        return processes.run_new(source, args, {**os.environ, "PYTHONPATH": processes.search_path(), **environment})

    return run
