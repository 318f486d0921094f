# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-all coverage docs bench compare chaos gpu ui constraints

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
PORT ?= 5000
RUNS ?= runs
GIGABYTES ?= 5
SIZE ?= smoke
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

help:
	@echo "make demo         set up .venv, run the whole pipeline on the embedded data"
	@echo "make test         set up .venv, check formatting, lint and types, run the tests"
	@echo "make test-all     the same, and the tests that take longer than half a minute"
	@echo "make coverage     run the tests and say which lines they reach"
	@echo "make docs         build the documentation as a site, strictly: site/index.html"
	@echo "make ui           MLflow UI on 127.0.0.1:$(PORT) (PORT=..., RUNS=directory with mlflow.db)"
	@echo "make bench        measure the hot paths"
	@echo "make compare      train students in many ways, measure all alike: docs/results.md (SIZE=smoke, sweep, real or curve)"
	@echo "make gpu          correctness and speed on a GPU; needs torch, transformers and pydantic"
	@echo "make chaos        stop and damage every stage, and see it recover (an hour)"

demo: .venv/installed
	@$(IN_VENV) python -m infra.demo

test: .venv/installed
	@$(IN_VENV) ruff format --check .
	@$(IN_VENV) ruff check .
	@$(IN_VENV) mypy
	@$(IN_VENV) python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test-all: test
	@$(IN_VENV) python -m pytest -m slow --durations=10

coverage: .venv/installed
	@.venv/bin/pip install --quiet 'coverage==7.17.5'   # [tool.coverage] says what is measured
	@$(IN_VENV) coverage erase
	@$(IN_VENV) coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout 900
	@$(IN_VENV) coverage combine --quiet
	@$(IN_VENV) coverage report

# An environment of its own: the site needs none of the packages that the program needs.
docs: .venv-docs/installed
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

.venv-docs/installed: pyproject.toml docs/constraints.txt
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/pip install --quiet 'pip>=25.1'   # --group
	@.venv-docs/bin/pip install --quiet -c docs/constraints.txt --group docs
	@touch $@

bench: .venv/installed
	@$(IN_VENV) python -m tests.benchmarks

compare: .venv/installed
	@$(IN_VENV) python -m tests.benchmarks.compare --size $(SIZE)

chaos: .venv/installed
	@$(IN_VENV) python -m tests.chaos.forks
	@$(IN_VENV) python -m tests.chaos
	@$(IN_VENV) python -m tests.chaos.student
	@$(IN_VENV) python -m tests.chaos.object_store
	@$(IN_VENV) python -m tests.chaos.demo

ui: .venv/installed
	@test -f "$(RUNS)/mlflow.db" || { echo "error: $(RUNS)/mlflow.db: no such file; run make demo first, or name the directory with RUNS=..." >&2; exit 2; }
	@$(IN_VENV) python -c 'import socket; socket.socket().bind(("127.0.0.1", $(PORT)))' 2>/dev/null \
		|| { echo "error: port $(PORT) is in use; choose another with make ui PORT=..." >&2; exit 2; }
	@$(IN_VENV) mlflow ui --workers 1 --host 127.0.0.1 --port $(PORT) --backend-store-uri "sqlite:///$(RUNS)/mlflow.db"

# Exact pins of what is installed now; +cpu and the like stripped, so that they hold on every machine.
constraints: .venv/installed
	@.venv/bin/pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+[a-z0-9.]*$$//' > constraints.txt

# torch first: the wheel that pip's own configuration names (CPU or CUDA) is then what the others find.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed and was not found; install it, or name it with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
		|| { echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13" >&2; exit 2; }
	@command -v g++ >/dev/null \
		|| { echo "error: g++ is needed (three small C++ libraries are built) and was not found; install it, for example apt-get install g++" >&2; exit 2; }
	@(( $$(df --output=avail -BG . | tail -1 | tr -dc 0-9) >= $(GIGABYTES) )) \
		|| { echo "error: $(CURDIR) has less than $(GIGABYTES) GB free, which the packages need" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a virtual environment; install its venv module, for example apt-get install python3-venv" >&2; exit 2; }
	@.venv/bin/pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@.venv/bin/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(IN_VENV) python -m infra.cpu.native
	@touch $@

# No installation first: a machine with a GPU brings its own torch. GPU_PYTHON names another interpreter.
GPU_PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
gpu:
	@$(GPU_PYTHON) -m tests.gpu
