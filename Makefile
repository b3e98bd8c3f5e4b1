# `make pong` trains, `make test` checks in minutes, `make test-all` checks all. They make .venv first, once;
# `make install` does only that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: pong test types quick test-slow test-all install clean

pong: $(INSTALLED)
	$(BIN)/python train_ppo.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory --jobs 2 types quick

# Side by side, and so with one thread each.
types:
	$(BIN)/mypy

quick:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-all: test test-slow

install: $(INSTALLED)

# Made anew only when a requirement changes; the file is written last, so a broken install is tried again.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: minirl needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --editable '.[plot,test,bench]'
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV)
