# make train   trains LeNet-300-100 at 5% of its weights on real handwritten digits, into runs/mnist_lenet300
# make test    runs the tests but the slow ones
# make test-slow runs those that start many processes, compile C++ variants or train whole networks
# make fuzz    tries random arguments, damaged workdirs and extreme kernel shapes for ten minutes; FLAGS='--minutes=60 --seed=7'
# make lint    checks style and types
# make reliability measures how reliable runs are: kills, signals, damaged files (forty minutes); FLAGS=--reduced: seven
# make test-gpu-aot, make test-tpu-aot   compile the kernels for a GPU and a TPU that need not be there, and run them in the interpreter
# make check-gpu  checks and times everything on a GPU, in twelve minutes; FLAGS=--minutes=4: the most telling; FLAGS=--dry_run: without a GPU
# The first call makes a virtual environment in .venv and installs what requirements.txt pins. PYTHON=python3.12 picks another one.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: train test test-slow test-core test-gpu-aot test-tpu-aot check-gpu fuzz lint reliability clean

train: $(VENV)/installed
	$(RUN) launch.py --config=configs/mnist_lenet300.py:offline --workdir=runs/mnist_lenet300

# Without most of XLA's optimisations programs compile in two thirds of the time. test-core keeps them.
test: $(VENV)/installed
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_PLATFORMS=cpu $(RUN) -m pytest -n 2 --dist worksteal -m 'not slow'

test-slow: $(VENV)/installed
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_PLATFORMS=cpu $(RUN) -m pytest -n 2 --dist worksteal -m slow

test-core: $(VENV)/installed
	JAX_PLATFORMS=cpu $(RUN) -m pytest -n 2 --dist worksteal -m 'core and not slow'

# Environments of their own, with what compiles for devices that are not there. PYTHON=python3.12: the newest jax.
AOT = .venv-aot-$(notdir $(PYTHON))

test-gpu-aot: $(AOT)/gpu-installed
	AOT=1 JAX_PLATFORMS=cpu $(AOT)/bin/python -m pytest -n 2 tests/kernels/test_gpu_kernels.py tests/aot/test_gpu.py

test-tpu-aot: $(AOT)/tpu-installed
	AOT=1 JAX_PLATFORMS=cpu $(AOT)/bin/python -m pytest -n 2 --dist worksteal tests/kernels/test_tpu_kernels.py tests/aot/test_tpu.py

# On the machine with the GPU: by the Python that has jax for it, else, for a dry run, by the one that make installs.
NEEDED = import absl, flax, grain, jax, ml_collections, mlxtend, optax, orbax.checkpoint, rich
check-gpu:
	@if $(PYTHON) -c '$(NEEDED)' 2> /dev/null; then $(PYTHON) -m benchmarks.gpu.check_device $(FLAGS); \
	else $(MAKE) $(VENV)/installed && $(RUN) -m benchmarks.gpu.check_device $(FLAGS); fi

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright

fuzz: $(VENV)/installed
	$(RUN) -m tests.fuzz $(FLAGS)

reliability: $(VENV)/installed
	JAX_PLATFORMS=cpu $(RUN) -m benchmarks.reliability $(FLAGS)

clean:
	rm -rf $(VENV) .venv-aot-* runs build *.egg-info

$(AOT)/%-installed: requirements-%-aot.txt
	$(MAKE) VENV=$(AOT) PYTHON=$(PYTHON) $(AOT)/installed
	$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: sparse_jax needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
