# Every target does its own set-up in .venv: no root, and the network only through pip.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Arguments of pip for torch alone. On Linux PyPI has CUDA builds; a CPU build is enough and much smaller:
#   make test TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
PLATFORM := $(shell uname)
# Test processes: one per core, but one in all on a Mac, where they would share the GPU.
WORKERS ?= $(if $(filter Darwin,$(PLATFORM)),0,auto)
ARGS ?=

BIN := $(VENV)/bin
STAND_IN := PYTHONPATH=tests $(BIN)/python -m pytest -p driver.stand_in -n $(WORKERS) --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# pyproject.toml's build-system.requires, without torch; cmake and ninja may be missing on the machine. Linux needs a clang
# for the kernels, macOS metal-cpp.
BUILD_REQUIREMENTS := 'scikit-build-core>=1.1' 'nanobind>=3.1' 'nanobind-backend>=1.0' 'numpy>=2.2' cmake ninja \
	$(shell grep -o '$(if $(filter Darwin,$(PLATFORM)),mlx-metal,ziglang)==[0-9.]*' pyproject.toml)
# The environment of make itself shares pip's own build folder; each other one has its own.
BUILD := --no-build-isolation --no-deps $(if $(filter .venv,$(VENV)),,--config-settings=build-dir=$(VENV)/build)
NATIVE := CMakeLists.txt pyproject.toml $(shell find cmake csrc metal -type f -not -name '*.pyc')
STAMP := $(VENV)/stamp
TORCH_VERSIONS := $(shell cat tests/torch_versions.txt)
# Where a test meets more of torch than tensors: what kernels compute doesn't depend on its version.
TORCH_TESTS := $(patsubst %,tests/test_%.py,append append_ops block_attention block_mask checkpointing decode_ops diffusers \
	double_backward dropout errors fidelity_torch generation main masks merge mps_flash_attn_quantized ops plan public_reports sdpa \
	sdpa_nested sdpa_opinfo sdpa_policy sdpa_varlen simulator_snippets sizes_from_data torch_func torch_internals \
	training transformers transformers_kinds varlen_ops)
FORMATTED := $(shell find csrc metal -name '*.h' -o -name '*.cpp' -o -name '*.metal') $(wildcard tests/agx_check/*/*.[ch] tests/mac_unit/*.metal)

.PHONY: demo test test-main test-mps test-slow test-torch host-cost lint format build wheel mac mac-check gpu-check agx-check clean help

help:
	@echo "make demo            attention on the best device there is, compared with float64"
	@echo "make test [ARGS=..]  all tests but slow ones; ARGS go to pytest instead, for example ARGS='-k causal'"
	@echo "make test-slow       the others: the wheel, coverage and mutants of the backend, other packages on mfa, ..."
	@echo "make test-mps        on Linux: the tests marked mps but slow ones, on a stand-in mps device; part of make test"
	@echo "make test-torch      what meets torch's API, with the oldest and the newest torch, in build/torch-VERSION"
	@echo "make host-cost       on Linux: what a call costs the host, on the stand-in mps device"
	@echo "make lint            ruff, mypy, clang-format, the MSL lint"
	@echo "make format          ruff and clang-format, in place"
	@echo "make build           the package, editable, in .venv"
	@echo "make wheel           a wheel in dist/"
	@echo "make mac-check       on Linux: compile and link for macOS against real torch libraries"
	@echo "make gpu-check       on Linux with an NVIDIA GPU: the kernels in true parallel and at full size"
	@echo "make agx-check       on Linux: registers of every kernel, by Mesa's compiler for Apple's GPUs"
	@echo "make mac             on a Mac: all tests, validation layers, timings and registers, into mac-report.json"
	@echo "make clean           forget .venv, builds and caches"

build: $(STAMP)/build

demo: build
	$(BIN)/python -m mfa demo

# All parts, also when the first fails. With ARGS, only what they ask for.
test: build $(STAMP)/test
	@failed=; \
	for part in main $(if $(ARGS)$(filter Darwin,$(PLATFORM)),,mps); do \
		$(MAKE) test-$$part || failed="$$failed test-$$part"; \
	done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

test-main: build $(STAMP)/test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(or $(ARGS),-m "not slow")

test-slow: build $(STAMP)/test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow $(ARGS)
ifneq ($(PLATFORM),Darwin)
	$(STAND_IN) -m "mps and slow" $(ARGS)
endif

# In processes of its own: torch caches whether there is an mps device.
test-mps: build $(STAMP)/test
	$(STAND_IN) -m "mps and not slow" $(ARGS)

# A version is exact already: constraints in pip's configuration can only be in the way.
test-torch:
	@failed=; \
	for version in $(firstword $(TORCH_VERSIONS)) $(lastword $(TORCH_VERSIONS)); do \
		PIP_CONSTRAINT=/dev/null $(MAKE) test-main VENV=build/torch-$$version TORCH=torch==$$version \
			ARGS='-m "not slow" $(TORCH_TESTS)' || failed="$$failed $$version"; \
	done; \
	test -z "$$failed" || { echo "failed with torch$$failed"; exit 1; }

host-cost: build $(STAMP)/test
	PYTHONPATH=tests $(BIN)/python -m driver.host_cost

lint: build $(STAMP)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/python csrc/simulator/lint.py $(wildcard metal/*.h metal/*.metal)

format: $(STAMP)/dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

wheel: build
	$(PIP) wheel $(BUILD) --wheel-dir dist .

mac-check: build $(STAMP)/mac-check
	PYTHONPATH=tests $(BIN)/python -m mac_check $(ARGS)
	$(BIN)/python -m pytest -q tests/test_mac_check.py tests/test_mac_registers.py

# torch's CUDA build must be the one in .venv, as it is where TORCH_ARGS is empty.
gpu-check: build
ifneq ($(wildcard /dev/nvidiactl),)
	PYTHONPATH=tests $(BIN)/python -m gpu_check build
	PYTHONPATH=tests $(BIN)/python -m gpu_check run $(ARGS)
else
	@echo "skipped: no NVIDIA GPU here; tests/gpu_check/REPORT.md says what ran on one"
endif

# Mesa goes into build/agx: about ten minutes of two cores, once.
agx-check: build $(STAMP)/test $(STAMP)/agx-check
	PYTHONPATH=tests $(BIN)/python -m agx_check build
	PYTHONPATH=tests $(BIN)/python -m agx_check run
	$(BIN)/python tests/generated.py

mac: build $(STAMP)/mac-check
	$(BIN)/python tests/mac_report.py $(ARGS)

clean:
	rm -rf $(VENV) build dist wheelhouse .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(STAMP)/venv:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "mfa needs Python >= 3.10: set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=25.1'
	mkdir -p $(STAMP) && touch $@

# torch comes first and alone, so that no other requirement chooses its version or build.
$(STAMP)/torch: $(STAMP)/venv
	$(PIP) install $(TORCH_ARGS) '$(TORCH)'
	touch $@

$(STAMP)/requirements: $(STAMP)/torch pyproject.toml
	$(PIP) install $(BUILD_REQUIREMENTS)
	touch $@

$(STAMP)/build: $(STAMP)/requirements $(NATIVE)
	$(PIP) install $(BUILD) --editable .
	touch $@

$(STAMP)/test $(STAMP)/dev $(STAMP)/mac-check $(STAMP)/agx-check: $(STAMP)/%: $(STAMP)/torch pyproject.toml
	$(PIP) install --group $*
	touch $@
