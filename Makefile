# `make pong-quick` and `make pong` train, `make test` checks in minutes, `make test-all` checks all. They make .venv
# first, once; `make install` does only that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: pong pong-quick test test-slow test-all quick-1 quick-2 slow-edits slow-ranks slow-1 slow-2 slow-3 types install clean

pong: $(INSTALLED)
	$(BIN)/python train_ppo.py $(ARGS)

pong-quick: $(INSTALLED)
	$(BIN)/python train_ppo.py @recipes/ppo-pong-quick.args $(ARGS)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(SIDE_BY_SIDE) quick-1 quick-2 types

test-slow: $(INSTALLED)
	@$(SIDE_BY_SIDE) slow-edits slow-ranks slow-1 slow-2 slow-3

test-all: test test-slow

# Two at a time, and so with one thread each; what each says comes in one piece where `make` can do that.
SIDE_BY_SIDE = OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs 2 $(if $(filter output-sync,$(.FEATURES)),-O)
PYTEST = $(BIN)/python -m pytest $(ARGS)

quick-1:
	$(PYTEST) -m "not slow" $(filter-out %_peculiar_envs.py,$(wildcard tests/test_[a-p]*.py))

quick-2:
	$(PYTEST) -m "not slow" tests/test_peculiar_envs.py tests/test_[q-z]*.py

slow-edits:
	$(PYTEST) -m slow tests/test_edits.py

slow-ranks:
	$(PYTEST) -m slow tests/test_distributed.py

slow-1:
	$(PYTEST) -m slow $(filter-out %_edits.py %_distributed.py,$(wildcard tests/test_[a-o]*.py))

slow-2:
	$(PYTEST) -m slow tests/test_[p-r]*.py

slow-3:
	$(PYTEST) -m slow tests/test_[s-z]*.py

types:
	$(BIN)/mypy

install: $(INSTALLED)

# Made anew only when a requirement changes; the file is written last, so a broken install is tried again.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: minirl needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --editable '.[plot,test,bench,mujoco]'
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV)
