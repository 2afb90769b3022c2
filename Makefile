# make demo   trains the reference GPT for about two minutes on the C++ kernels and on PyTorch
# make test   the whole test suite          make test-all   with the heavier sweeps too
# make oldest-triton   the Triton kernels with the oldest Triton that they support and the newest NumPy: compiled, and
#             held to bench.static; interpreted, and held to their tests
# make bench  every op beside PyTorch       make dist       a wheel and an sdist in dist/
# make instructions   counts what the CPU kernels execute (needs valgrind); a case above its figure fails
# make gpu    on a machine with a GPU, offline, with what PYTHON has: builds in place what is missing (7 minutes at
#             most), then checks, tests and benchmarks (13). Without a GPU, GPU_ARGS="--device cpu" is a rehearsal.
#
# Everything else runs in .venv, made on first use from python3 (or make PYTHON=...). On Linux, plain torch
# brings the CUDA build; for the small one: make demo TORCH="torch==2.13.0 --index-url ADDRESS", with
# the address that pytorch.org gives for CPU wheels.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
OLDEST_TRITON := $(VENV)/triton-3.6.0
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/bind/*.h csrc/bind/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.cuh csrc/cuda/*.cu)

.PHONY: demo test test-all oldest-triton bench instructions gpu dist build clean
demo: build
	$(BIN)/pygpt demo

test: build
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: build $(OLDEST_TRITON)
	$(BIN)/python -m pytest -n 2

oldest-triton: build $(OLDEST_TRITON)
	$(BIN)/python -m pytest -n 2 -m slow -k oldest_triton tests/test_triton.py
	PYTHONPATH=$(CURDIR)/$(OLDEST_TRITON) $(BIN)/python -m pytest -n 2 -m "not slow" -k "not compile and not opcheck" \
	  tests/test_triton.py

bench: build
	$(BIN)/python -m bench

instructions: build
	$(BIN)/python -m bench.instructions

gpu:
	@$(PYTHON) -m bench.first_light --all --out build/gpu-$$(date +%Y%m%d-%H%M%S) $(GPU_ARGS)

dist: build
	$(BIN)/python -m build --no-isolation

build: $(VENV)/built

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pygpt needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

$(OLDEST_TRITON): $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ "triton==3.6.0; sys_platform == 'linux'" numpy
	@mkdir -p $@ && touch $@

clean:
	rm -rf $(VENV) build dist out pygpt/*.so *.egg-info
