# make demo, make test: on a fresh machine with Python 3.11 or newer and pip, nothing else. Both set up .venv first;
# a second run goes straight to work. Another interpreter: make test PYTHON=/path/to/python3.12

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
PY := $(VENV)/bin/python
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n auto --dist worksteal --benchmark-disable

.PHONY: help demo test fast lint type hooks clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   compare every format and recipe on a real model, then quantize, save and load it"
	@echo "make test   the whole test suite"
	@echo "make fast   the tests that are not marked slow"
	@echo "make lint   ruff check and ruff format --check        make type   mypy --strict on the package"
	@echo "make hooks  install the pre-commit hooks              make clean  remove .venv and what was built"

demo: $(VENV)/.demo
	$(PY) examples/demo.py

test: $(VENV)/.test
	$(PYTEST) $(ARGS)

fast: $(VENV)/.test
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

type: $(VENV)/.dev
	$(PY) -m mypy

hooks: $(VENV)/.dev
	$(PY) -m pre_commit install

# One stamp per extra, remade when a requirement or a pin changes. The extra test holds demo, and dev holds test.
STAMPS_dev := $(VENV)/.test $(VENV)/.demo
STAMPS_test := $(VENV)/.demo
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(PY) -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@ $(STAMPS_$*)

$(VENV)/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "error: microscale needs Python 3.11 or newer, and none is on PATH." >&2; \
		echo "  hint: name one, as in: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
		"error: microscale needs Python 3.11 or newer; $(PYTHON) is %d.%d" % (v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
