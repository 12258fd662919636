# `make train` and `make test` need Python >= 3.11, gcc, make and a package index; nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# An environment of its own, so that the tool is not among what it audits.
AUDITOR := $(VENV)/audit-2.10.1
# The tool that builds the documentation, which reads the sources and imports none of them.
SITE := $(VENV)/site-9.8.2
AUDIT_OPTIONS ?=
# Processes that run tests side by side.
TEST_WORKERS ?= 2
CONFIG ?= jobs/configs/digits.yaml
# Decompositions of small matrices lose time to threads that wait for each other.
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED = 1

CODE := platform tests .ci $(wildcard jobs benchmarks)

.DEFAULT_GOAL := help
.PHONY: help install train test test-fast lint test-trainers soak chaos lock docs studies bench bench-smoke verify-claims test-tools audit clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv and install the pinned versions (done by the others when needed)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
		{ echo "make: $(PYTHON) not found; install Python 3.11, 3.12 or 3.13, or run make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); run make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV) (once; about 6 GB and some minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

train: $(STAMP) ## The main job: K-FAC on digits, losing a node and getting it back (CONFIG=...)
	@$(BIN)/elastic-kfac train $(CONFIG) --resize-at 60:1 --resize-at 120:2

test: lint ## Linters, types and the whole test suite
	@$(BIN)/pytest -n $(TEST_WORKERS) -m "not soak and not tools"

test-fast: $(STAMP) ## Unit tests without Ray and without further processes (under 2 minutes)
	@$(BIN)/pytest -n $(TEST_WORKERS) -m "not soak and not tools and not slow" tests/unit

lint: $(STAMP) ## Formatting, lint rules and types only
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy

test-trainers: $(STAMP) ## docs/trainers.md with Accelerate, transformers and Lightning, which this installs
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,trainers]'
	@$(BIN)/pytest tests/distributed/test_trainers.py

soak: $(STAMP) ## The long-running tests that `make test` leaves out
	@$(BIN)/pytest -n $(TEST_WORKERS) -m soak --timeout 7200 || test $$? -eq 5

chaos: $(STAMP) ## A run with a fault every 30 s against the same run in peace: hash, samples, goodput
	@$(BIN)/python benchmarks/elastic/chaos.py

test-tools: $(STAMP) ## Checks that need promtool, kubectl and a browser (Debian: prometheus, kubectl, chromium)
	@$(BIN)/pytest -m tools

audit: $(AUDITOR)/bin/pip-audit ## Known vulnerabilities of the pinned versions (AUDIT_OPTIONS="--service osv")
	@$(AUDITOR)/bin/python .ci/audit_dependencies.py --tool $(AUDITOR)/bin/pip-audit $(AUDIT_OPTIONS)

$(AUDITOR)/bin/pip-audit:
	@$(PYTHON) -m venv $(AUDITOR)
	@$(AUDITOR)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1

lock: $(STAMP) ## Renew .ci/requirements.lock, the versions of constraints.txt with hashes (needs uv)
	@uv pip compile --quiet pyproject.toml --all-extras -c constraints.txt --generate-hashes --universal \
		--python-version 3.11 --no-header --no-annotate --no-emit-index-url -o .ci/requirements.lock

studies: $(STAMP) ## Run every study of benchmarks/studies (tables and reports in runs/)
	@for script in $(wildcard benchmarks/studies/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done
	@for study in $(wildcard benchmarks/studies/*.yaml); do echo "== $$study"; $(BIN)/elastic-kfac compare $$study || exit 1; done

docs: $(SITE)/bin/mkdocs ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet --strict -f .ci/mkdocs.yml
	@echo "site/index.html"

$(SITE)/bin/mkdocs:
	@$(PYTHON) -m venv $(SITE)
	@$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check \
		mkdocs-material==9.8.2 'mkdocstrings[python]==1.0.8'

bench-smoke: $(STAMP) ## Run every benchmark at a tiny size (under 10 minutes)
	@$(BIN)/python benchmarks/smoke.py

verify-claims: $(STAMP) ## Compare every measured number of README and docs with its file of results
	@$(BIN)/python benchmarks/claims.py

bench: $(STAMP) ## Run every benchmark of benchmarks/
	@for script in $(filter-out %/smoke.py %/claims.py,$(wildcard benchmarks/*.py benchmarks/data/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean: ## Remove caches and build outputs (keeps .venv, runs and data)
	@rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find platform tests -name __pycache__ -type d -prune -exec rm -rf {} +
