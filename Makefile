# Each target sets up what it needs: a virtual environment in .venv, from hash-pinned locks.
# Needs Python 3.11 or newer; name another one with `make PYTHON=python3.12 test`.
PYTHON ?= python3
BIN := .venv/bin
# As many as there are cores: with one more, tests that play whole shops and browsers have
# too little of the machine, and now and then fail.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')
RUN := .venv/.run-$(shell cat requirements/run.txt pyproject.toml | cksum | cut -d' ' -f1)
DEV := .venv/.dev-$(shell cat requirements/dev.txt pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: demo test simulate check format bench bench-quick bench-peers snippet snippet-package
.PHONY: snippet-table crash-matrix clean

demo: $(RUN)  ## the whole relay on this machine, with a fake Voucherify
	@$(BIN)/python -m relay demo

test: $(DEV)  ## every test that this machine has the programs for
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile $(ARGS)

simulate: $(DEV)  ## days of traffic in seconds, into docs/delivery.md; ARGS="--scenario sale"
	@$(BIN)/python -m simulation $(ARGS)

check: $(DEV)  ## format, lint, types; the documents are held by tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/pytest -q tests/test_docs.py tests/test_architecture.py

format: $(DEV)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(DEV) bench-peers  ## everything beside its floors and peers, into docs/performance.md: an hour
	@$(BIN)/python -m bench $(ARGS)

bench-quick: $(DEV) bench-peers  ## the same in some minutes, which checks the harness and writes nothing
	@$(BIN)/python -m bench --quick $(ARGS)

bench-peers: $(DEV)
	@bench/install
	@$(BIN)/python -m bench.peers

snippet:  ## build relay/static/relay.js from snippet/; needs Node 20
	@cd snippet && npm ci --silent && npm run --silent build && npm run --silent check && npm test --silent

snippet-package:  ## what npm gets, as a tarball in snippet/; needs Node 20
	@cd snippet && npm ci --silent && npm pack --ignore-scripts=false

snippet-table: $(DEV)  ## every way into a page with every way out, into docs/snippet.md
	@EVERY_CELL=1 $(BIN)/pytest -rP tests/browser/test_snippet_exits.py -k "table or arrives"

crash-matrix: $(DEV)  ## a death at every step of a delivery, into docs/delivery.md
	@EVERY_CELL=1 $(BIN)/pytest -rP tests/integration/test_crash_matrix.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf tests/*/node_modules tests/recipes/dist bench/peers/*/node_modules bench/results .cache/bench snippet/node_modules snippet/dist

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "relay needs Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -m venv .venv

# The project itself goes in last and without build isolation, so that nothing
# outside the lock is ever installed.
$(DEV): .venv/bin/python
	@echo "Installing what the tests need into .venv …"
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(DEV) $(RUN)

$(RUN): .venv/bin/python
	@echo "Installing relay into .venv …"
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/run.txt
	@touch $(RUN)
