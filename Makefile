# Needs Python 3.10 or newer and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

N ?= 50
JOBS ?= 3
.PHONY: demo test test-slow lint bench chaos docs clean

demo: .venv/installed
	$(BIN)/python experiments/run.py --logger csv

test: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow -n $(JOBS)

bench: .venv/installed-test
	for family in vit simple_vit deit swin convnext; do for precision in float32 bf16; do \
		$(BIN)/python experiments/benchmark.py step --family $$family --precision $$precision; done; done

chaos: .venv/installed-test
	$(BIN)/python tests/faults/chaos.py $(N)

docs: .venv/installed
	$(BIN)/python docs/tables.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) -e '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
