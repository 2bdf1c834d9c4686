# make demo | test | lint | bench | sanitize: each sets up .venv first, with nothing needed but Python 3.10 or later.
# make gpu-check runs with what is installed: PyTorch for CUDA, and pytest.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# More of pyproject.toml's optional dependencies, for tests that are skipped without: make test EXTRAS=,ray,dali-cuda13
EXTRAS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
CLIPS := $(wildcard examples/moving_shapes/clips/*.mp4)
MOVING := examples/moving_shapes/clips/red_square_moves_left.mp4
FORMATTED := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint bench sanitize gpu-check clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/mplug2-fast caption $(CLIPS)
	$(BIN)/mplug2-fast answer $(MOVING) --question "Which way does the square move?"
	$(BIN)/python bench/run.py --quick

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

bench: $(INSTALLED)
	$(BIN)/python bench/run.py

# The operators' tests with a native module that checks every address and every undefined operation. It replaces the
# one of a copy of the package.
SANITIZED := build/sanitize
sanitize: $(INSTALLED)
	rm -rf $(SANITIZED)/package && mkdir -p $(SANITIZED)/package
	cp -r mplug2_fast $(SANITIZED)/package && rm -f $(SANITIZED)/package/mplug2_fast/_C*.so
	$(BIN)/cmake -S . -B $(SANITIZED)/cmake -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DMPLUG2_SANITIZE=address,undefined \
		-DMPLUG2_CUDA=off
	$(BIN)/cmake --build $(SANITIZED)/cmake --parallel
	$(BIN)/cmake --install $(SANITIZED)/cmake --prefix $(SANITIZED)/package
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 MPLUG2_FAST_NATIVE=required \
		$(BIN)/python -m pytest --numprocesses auto --dist worksteal --override-ini "pythonpath=$(SANITIZED)/package ." tests/ops

gpu-check:
	$(PYTHON) bench/gpu_check.py

clean:
	rm -rf $(VENV) build

# The editable install is redone when its description or a native source changes. The package asks for any torch from
# its oldest on; here one version is pinned, so that runs can be compared.
$(INSTALLED): pyproject.toml setup.py CMakeLists.txt csrc/cuda/kernels.cmake $(FORMATTED)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, not " + sys.version)'
	$(PYTHON) -m venv $(VENV) || \
		{ echo "python3 -m venv does not work; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[test,dev$(EXTRAS)]' $(TORCH)
	touch $@
