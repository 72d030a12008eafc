# Needs make, a POSIX shell and Python 3.11 or later; everything else goes into .venv. Up to Python 3.12 that includes
# Bytewax, and with it dataflows; on later versions the tests of the parts that don't need it run.

VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
DEMO    := $(VENV)/.ready-for-demo
SECONDS := 15
JOBS    := 2
ARGS    :=

.DEFAULT_GOAL := help
.PHONY: help test quick demo lint types bench lock clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

test: $(READY)  ## Run the tests on real PostgreSQL servers of every supported major; ARGS= goes to pytest
# Files in their order. Otherwise files with few but long tests come last, and one process waits for the other.
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

quick: $(READY)  ## Run the fast tests on the newest PostgreSQL alone, in less than a minute
	@$(BIN)/python -m pytest --quick --numprocesses $(JOBS) --dist loadfile $(ARGS)

demo: $(DEMO)  ## Run a shop, capture its changes to Parquet for SECONDS=15, and verify every row
	@$(BIN)/python -m pgoutput_source demo --seconds $(SECONDS) $(ARGS)

lint: $(READY)  ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)  ## Check types
	@$(BIN)/mypy

bench: $(READY)  ## Measure throughput against pg_recvlogical
	@$(BIN)/python benchmarks/throughput.py $(ARGS)

lock: $(READY)  ## Resolve the dependencies again into requirements.lock and requirements-demo.lock
	@command -v $(BIN)/uv >/dev/null || $(BIN)/python -m pip install -q uv
	@$(COMPILE) --upgrade --extra dev -o requirements.lock
	@$(COMPILE) --extra demo -c requirements.lock -o requirements-demo.lock

clean:  ## Remove .venv and all caches; the data in .pgoutput and out stays
	@rm -rf $(VENV) .venv-* dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

COMPILE := $(BIN)/uv pip compile -q pyproject.toml --universal --generate-hashes \
    --no-annotate --no-header --no-emit-index-url --no-emit-find-links
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check

# A name on PATH may be a shim without a Python behind it, so each one must show that it runs.
define MAKE_VENV
	@fits='import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(BIN)/python -c "$$fits" 2>/dev/null; then \
	    for python in $(PYTHON) python3.12 python3.11 python3 python3.14 python3.13; do \
	        if $$python -c "$$fits" 2>/dev/null; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "Python 3.11 or later with its venv module is needed; name it with: make PYTHON=/path/to/python" >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$($$found --version)"; \
	    $$found -m venv --clear $(VENV); \
	fi
endef

$(DEMO): requirements-demo.lock
	$(MAKE_VENV)
	@echo "Installing requirements-demo.lock into $(VENV)"
	@$(INSTALL) --no-compile --require-hashes -r requirements-demo.lock
	@touch $@

$(READY): requirements.lock pyproject.toml
	$(MAKE_VENV)
	@echo "Installing requirements.lock into $(VENV)"
	@$(INSTALL) --no-compile --require-hashes -r requirements.lock
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@
