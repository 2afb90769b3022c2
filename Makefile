# make demo   trains the reference GPT for about two minutes on the C++ kernels and on PyTorch, and draws a chart.
#             Without a GPU it builds no CUDA kernels, and it installs only what it needs
# make test   the whole test suite          make test-all   with the heavier sweeps too
# make oldest-triton   the Triton kernels with the oldest Triton that they support and the newest NumPy: compiled, and
#             held to bench.compiled; interpreted, and held to their tests
# make bench  every op beside PyTorch       make dist       a wheel and an sdist in dist/
# make docs   this project's documentation as a site in build/docs; warnings are errors
# make instructions   counts what the CPU kernels execute (needs valgrind); a case above its figure fails
# make gpu    on a machine with a GPU, offline, with what PYTHON has: builds in place what is missing (7 minutes at
#             most), then checks, tests and benchmarks (13). Without a GPU, GPU_ARGS="--device cpu" is a rehearsal.
#
# make aarch64   cross-compiles the CPU kernels for 64-bit ARM and runs their checks under QEMU
#
# Everything else runs in .venv, made on first use from python3 (or make PYTHON=...). On Linux, plain torch
# brings the CUDA build; for the small one: make demo TORCH="torch==2.13.0 --index-url ADDRESS", with
# the address that pytorch.org gives for CPU wheels.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
OLDEST_TRITON := $(VENV)/triton-3.6.0
SOURCES := setup.py build_backend.py pyproject.toml $(shell find csrc -name "*.h" -o -name "*.cpp" -o -name "*.cu*")
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all oldest-triton bench instructions aarch64 docs gpu dist build clean
demo: $(VENV)/built-for-demo
	$(BIN)/pygpt demo

test: $(VENV)/built-for-test
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15 -m "not slow"

test-all: build $(OLDEST_TRITON)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

oldest-triton: $(VENV)/built-for-test $(OLDEST_TRITON)
	$(BIN)/python -m pytest -n 2 -m slow -k oldest_triton tests/kernels/test_triton_compiled.py
	PYTHONPATH=$(CURDIR)/$(OLDEST_TRITON) $(BIN)/python -m pytest -n 2 -m "not slow" -k "not opcheck" \
	  $(filter-out %_compiled.py,$(wildcard tests/kernels/test_triton*.py))

bench: build
	$(BIN)/python -m bench

instructions: build
	$(BIN)/python -m bench.instructions

aarch64: build
	$(BIN)/python -m tests.cross aarch64-linux-gnu

docs: $(VENV)/built-for-demo $(VENV)/docs-installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo build/docs/index.html

gpu:
	@$(PYTHON) -m bench.first_light --all --out build/gpu-$$(date +%Y%m%d-%H%M%S) $(GPU_ARGS)

dist: build
	$(BIN)/python -m build --no-isolation

build: $(VENV)/built

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@ $(VENV)/built-for-test $(VENV)/built-for-demo

# Without a GPU, compiling the CUDA kernels is only a check. `make test` compiles them for sm_90, `make test-all` for
# every architecture of a release.
$(VENV)/built-for-test: $(VENV)/installed $(SOURCES)
	command -v nvidia-smi >/dev/null || export PYGPT_CUDA_ARCHS=$${PYGPT_CUDA_ARCHS:-90}; \
	  $(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@ $(VENV)/built-for-demo

$(VENV)/built-for-demo: $(VENV)/ready $(SOURCES)
	command -v nvidia-smi >/dev/null || export PYGPT_BUILD_CUDA=$${PYGPT_BUILD_CUDA:-0}; \
	  $(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/installed: $(VENV)/ready requirements.txt
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pygpt needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	$(INSTALL) --constraint requirements.txt setuptools numpy safetensors rich matplotlib
	@touch $@

$(VENV)/docs-installed: docs/requirements.txt $(VENV)/ready
	$(INSTALL) -r docs/requirements.txt
	@touch $@

$(OLDEST_TRITON): $(VENV)/installed
	$(INSTALL) --no-deps --upgrade --target $@ "triton==3.6.0; sys_platform == 'linux'" numpy
	@mkdir -p $@ && touch $@

clean:
	rm -rf $(VENV) build dist out pygpt/*.so *.egg-info
