# Each target sets up what it needs. PYTHON may name another interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One place for pip's choices: constraints.txt pins torch, so that no CUDA build is pulled by accident.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Other trainers are timed too where their scripts and environments are (docs/benchmarks.md).
PEERS := $(if $(wildcard .peers/*/bin/python),$(if $(wildcard ../shared/peers/common.py),--peers ../shared/peers))

.PHONY: help setup demo test test-fast bench lint format clean

help:
	@echo "make demo       set up, run all three stages on both engines, compare them (about ten minutes)"
	@echo "make test       set up, run every test (about 30 minutes on two cores)"
	@echo "make test-fast  the tests without the slow ones"
	@echo "make bench      set up, time both engines on the CPU workloads, write docs/benchmarks.md (about a quarter of an hour)"
	@echo "make lint       ruff, pyright, import laws"
	@echo "make format     let ruff rewrite"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing both engines into $(VENV) (two to four minutes the first time) ..."
	$(PIP) "torch==2.13.0"
	$(PIP) -e ".[all,dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow"

# OPT-125M's shape with every peer at once would not fit 24 GiB: TRL alone.
bench: $(INSTALLED)
	$(BIN)/diptych bench tiny small medium --threads 1 $(PEERS) --output benchmarks/results
	$(BIN)/diptych bench opt-125m --threads 1 $(if $(PEERS),$(PEERS) --peer trl-ppo) --rounds 2 --output benchmarks/results
	$(BIN)/diptych bench tiny small --threads 2 $(PEERS) --output benchmarks/results
	$(BIN)/diptych bench --from benchmarks/results/*.json --markdown docs/benchmarks.md --html out/bench.html

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) out .pytest_cache .ruff_cache
