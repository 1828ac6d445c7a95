# Each target makes .venv and installs what it needs, so each works first on a fresh machine.
PYTHON ?= python3
# Installed before everything that depends on it; TORCH="torch" takes the newest build, with CUDA on Linux.
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all lint docs clean

demo: .venv/.core
	$(BIN)/mor demo

test: .venv/.dev
	$(BIN)/pytest -q -n 2 --dist worksteal tests

# Also cross products of what the other tests cover, and long runs.
test-all: .venv/.dev
	$(BIN)/pytest -q -n 2 --dist worksteal --slow tests

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site goes to build/site; a warning is an error. Tables are made anew first.
docs: .venv/.docs
	$(BIN)/python docs/scripts/refresh.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

clean:
	rm -rf .venv build

.venv/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(PIP) -e .
	touch $@

.venv/.dev: .venv/.core
	$(PIP) -e ".[dev]"
	touch $@

.venv/.docs: .venv/.core
	$(PIP) -e ".[docs]"
	touch $@
