# make demo: the whole job on text found on this machine; make test: the tests. Both set up .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_ARGS ?= -n auto --dist worksteal

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m evaluation study --gin_file=configs/quickstart.gin

# PyTorch, for the tests that compare with Hugging Face, is not installed here: they skip, saying so.
test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[evaluation]'
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf runs build dist *.egg-info
