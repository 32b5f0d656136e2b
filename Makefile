# Every target sets up what it needs: a virtual environment of the project's own in .venv.
PYTHON ?= python3.11
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
LOCK   := requirements/cpu.txt
# A part of uv's command line, the same for every lock file; the wheels are for CPython 3.11 on Linux.
COMPILE = $(BIN)/uv pip compile pyproject.toml --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
          --custom-compile-command "make lock"

.PHONY: help demo test test-long check audit serve lock clean setup browser redis

help:
	@echo "make demo       set up, then the whole way on MovieLens-100k: prepare, train, evaluate, promote, serve"
	@echo "make serve      set up, then leave the demo's champion running on port 3000"
	@echo "make test       set up, then run the tests, those marked long left out"
	@echo "make test-long  set up, then run the tests marked long, about 50 minutes"
	@echo "make check      set up, then formatting, lint and types"
	@echo "make audit      set up, then look the locked versions up among known vulnerabilities"
	@echo "make lock       rewrite requirements/*.txt from pyproject.toml"
	@echo "make clean      remove what the targets above made, .venv and runs included"

demo: setup
	@$(BIN)/masknet demo

serve: setup
	@$(BIN)/masknet serve models:/movielens-ranker@champion

test: setup
	$(BIN)/python -m pytest -m "not long"

test-long: setup browser redis
	$(BIN)/python -m pytest -m long

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: .venv/ready

# torch comes last and unhashed: the package index may offer its CPU or its CUDA build of this very version, and either
# works. Everything else is locked, with fbgemm-gpu-cpu in place of the CUDA build that torchrec asks for.
.venv/ready: $(LOCK) requirements/data.txt pyproject.toml Makefile
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(LOCK)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/data.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-warn-conflicts $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Reports are tested in Debian's Chromium; without it those tests are skipped, and say why.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	  && apt-get install -qq -y --no-install-recommends chromium >/dev/null; } \
	  || echo "chromium is missing and cannot be installed here: tests of reports in a browser are skipped" >&2

# The feature store is tested against a real Redis; without one those tests are skipped, and say why.
redis:
	@command -v redis-server >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	  && apt-get install -qq -y --no-install-recommends redis-server >/dev/null; } \
	  || echo "redis-server is missing and cannot be installed here: tests of the feature store with it are skipped" >&2

# Strict: a version that could not be looked up does not count as one without vulnerabilities.
audit: setup
	@for lock in requirements/cpu.txt requirements/gpu.txt; do \
	  $(BIN)/pip-audit --strict --disable-pip --require-hashes --progress-spinner off -r $$lock \
	  || { echo "$$lock: a version is vulnerable, or could not be looked up: pip-audit needs PyPI's JSON API" >&2; exit 1; }; \
	done

lock:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv
	$(COMPILE) --extra cpu --extra ray --extra redis --extra otlp --extra dev --override requirements/cpu-overrides.txt --no-emit-package torch --output-file requirements/cpu.txt
	$(COMPILE) --extra cpu --extra redis --extra otlp --constraint requirements/cpu.txt --override requirements/cpu-overrides.txt --no-emit-package torch --output-file requirements/serve.txt
	$(COMPILE) --extra gpu --extra ray --extra redis --extra otlp --extra dev --output-file requirements/gpu.txt
	echo "recbole==1.2.1" | $(COMPILE:pyproject.toml=-) --no-deps --output-file requirements/data.txt

clean:
	rm -rf .venv build runs mlruns mlartifacts mlflow.db *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
