# make train   trains LeNet-300-100 at 5% of its weights on real handwritten digits, into runs/mnist_lenet300
# make test    runs all tests
# make lint    checks style and types
# make figures measures how reliable runs are: kills, signals, damaged files (forty minutes); FLAGS=--reduced: seven
# The first call makes a virtual environment in .venv and installs what requirements.txt pins. PYTHON=python3.12 picks another one.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: train test test-core lint figures clean

train: $(VENV)/installed
	$(RUN) launch.py --config=configs/mnist_lenet300.py:offline --workdir=runs/mnist_lenet300

test: $(VENV)/installed
	JAX_PLATFORMS=cpu $(RUN) -m pytest -n 2 --dist loadfile

test-core: $(VENV)/installed
	JAX_PLATFORMS=cpu $(RUN) -m pytest -n 2 --dist loadfile -m core

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright

figures: $(VENV)/installed
	JAX_PLATFORMS=cpu $(RUN) -m benchmarks.reliability $(FLAGS)

clean:
	rm -rf $(VENV) runs build *.egg-info

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: sparse_jax needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
