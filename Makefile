# Everything from a fresh clone: `make demo`, `make test`. Needs Python 3.10 or newer and make; tests, a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
# without setuptools' page of warning at every editable install
PIP_QUIET := PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q

.PHONY: demo test test-plain test-interpret check bench wheel clean

demo: $(VENV)/.installed
	$(BIN)/armhubert distill --out $(RUN) --force --steps 150 --batch-seconds 48 --learning-rate 2e-3 --validate-every 25
	$(BIN)/armhubert info $(RUN) --audio armhubert/assets/speech/test-mini/3664/178355/3664-178355-0010.opus
	@echo "Pictures: $(RUN)/loss.png and $(RUN)/layers.png"

test: test-plain test-interpret

test-plain: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# Triton picks interpreter or compiler when its kernels are defined, so the interpreted tests are a process of their own.
test-interpret: $(VENV)/.installed-dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels

# mypy cannot follow the package mapping of an editable install, so it reads an installed copy.
check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(BIN)/pip install -q --no-deps --target build/typed . && rm -rf build/lib build/bdist*
	cd build/typed && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p armhubert

bench: export OUT ?= bench/results/this-machine
bench: $(VENV)/.installed-dev
	KINETO_LOG_LEVEL=5 $(BIN)/python -m armhubert.bench cpu
	$(BIN)/python -m pytest bench/test_ops.py -q -o addopts= --import-mode=importlib --benchmark-only \
		--benchmark-columns=min,median,rounds --benchmark-sort=name
	$(BIN)/python -m armhubert.bench teacher_views
	$(BIN)/python -m armhubert.bench model
	$(BIN)/python -m armhubert.bench loader
	$(BIN)/python -m armhubert.bench start

wheel: $(VENV)/.installed-dev
	$(BIN)/pip wheel -q --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV): PyTorch alone takes a minute or two"
	$(BIN)/python -m pip install -q --upgrade pip
	$(PIP_QUIET) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --upgrade pip
	@echo "Installing into $(VENV), with what the tests need: a few minutes"
	$(PIP_QUIET) -e ".[dev]"
	touch $@ $(VENV)/.installed
