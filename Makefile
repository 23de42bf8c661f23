# Each target sets itself up in a virtual environment of its own; nothing but Python 3.11+ is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per core that exists; a busy machine does better with OMP_NUM_THREADS=1.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check bench serve-check clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tables of docs/results.md that an hour or two make, and docs/report.html; what is interrupted goes on.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/sparse_kernels.py --write docs/results.md
	$(BIN)/python benchmarks/page.py
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/criteria_results.py --rows build/criteria_rows.jsonl

serve-check: $(VENV)/installed .venv-serve/installed
	$(BIN)/python benchmarks/serve_check.py --vllm-python .venv-serve/bin/python --write docs/serving.md

# vLLM brings a transformers of its own. The three packages that go do not match the CPU build of torch.
.venv-serve/installed: benchmarks/serve_requirements.txt
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install --quiet torch==2.13.0
	.venv-serve/bin/pip install --quiet -r $<
	.venv-serve/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# torch first and by exact version: a plain range would fetch the newest build with gigabytes of GPU libraries.
$(VENV)/torch:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed (make PYTHON=python3.11 ...)"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,eval,ray]'
	touch $@

clean:
	rm -rf $(VENV) .venv-serve build
