PYTHON ?= python3
PY := .venv/bin/python

.PHONY: setup train test test-all lint mutate
setup: .venv/ready
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch .venv/ready

train: .venv/ready
	$(PY) train.py

test: .venv/ready
	$(PY) -m pytest

test-all: .venv/ready
	$(PY) -m pytest -m ''

lint: .venv/ready
	$(PY) -m ruff check .

mutate: .venv/ready
	$(PY) tests/mutate.py

.PHONY: figures reproduce
figures: .venv/ready
	$(PY) figures/learning_curves.py

reproduce: .venv/ready
	$(PY) figures/learning_curves.py --run
