# make quickstart   raw text to a pretrained model that writes, in a few minutes on a CPU
# make test         every test but the slow ones; `make test-slow` runs those
# make lint         ruff, check and format
#
# Each makes .venv and installs what it needs. With another interpreter: rm -rf .venv; make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow lint

quickstart: .venv/.run
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/quickstart.sh

test: .venv/.dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pip is the last that venv makes: a half-made .venv has a python, but no pip
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is not Python 3.11 or newer: name one, make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }

.venv/.run: requirements.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.dev: .venv/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
