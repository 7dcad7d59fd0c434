# Two commands do everything on a machine with python3 (3.11 or later, with venv) and make: `make demo` and `make test`.
# Both build .venv themselves, with the versions of constraints.txt, and do so again only when it or pyproject.toml changes.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo-report
JOBS   ?= 2

BIN := $(VENV)/bin
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-fast lint bench crash fuzz soak clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make demo       build .venv, compare three methods on generated choices, write $(OUT)/report.html (under 5 minutes)"
	@echo "make test       build .venv with every extra, then ruff, mypy and pytest (what continuous integration runs)"
	@echo "make test-fast  pytest without the slow tests, stopping at the first failure (the inner loop)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the speed figures, into bench-report/"
	@echo "make crash      kill encoders, stores and servers at hundreds of random moments: is everything still there, once? (an hour)"
	@echo "make fuzz       requests that the service's own description allows and forbids, by the thousand (half an hour)"
	@echo "make soak       an hour of requests to the service: does its memory stay flat?"
	@echo "make clean      remove .venv, caches and reports"

$(BIN)/python:
	@$(PYTHON) -c 'import sys, venv; sys.exit(None if sys.version_info >= (3, 11) else "Palate needs Python 3.11 or later; \
	$(PYTHON) is %d.%d. Name another one: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras; the key in its name is the content of the two files, so a checkout that touches them costs nothing.
$(VENV)/.demo-$(KEY): | $(BIN)/python
	$(PIP) --editable '.[report,style]'
	@touch $@

$(VENV)/.test-$(KEY): | $(BIN)/python
	$(PIP) --editable '.[all,dev]'
	@touch $@ $(VENV)/.demo-$(KEY)

demo: $(VENV)/.demo-$(KEY)
	$(BIN)/palate demo --out $(OUT)

lint: $(VENV)/.test-$(KEY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: torch gains little from a second thread on tests this small. A file is one process's, for its fixtures.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-fast: $(VENV)/.test-$(KEY)
	$(BIN)/python -m pytest -x -q -m "not slow"

bench: $(VENV)/.test-$(KEY)
	$(BIN)/python -m benchmarks --out bench-report

crash: $(VENV)/.test-$(KEY)
	$(BIN)/python -m benchmarks.kill_encoder
	$(BIN)/python -m benchmarks.kill_store --trials 200
	$(BIN)/python -m benchmarks.kill_store --database postgres --trials 50
	$(BIN)/python -m benchmarks.kill_server --trials 200

fuzz: $(VENV)/.test-$(KEY)
	$(BIN)/python -m benchmarks.fuzz_server

soak: $(VENV)/.test-$(KEY)
	$(BIN)/python -m benchmarks.serving --soak 60

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-report bench-report
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
