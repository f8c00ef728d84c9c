"""A training step measured on the device that is here: by the host's clock, by the device's for each part, and its memory."""

import collections
import functools
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import trace
from benchmarks.gpu import parts
from sparse_jax import config as config_lib
from sparse_jax.train import devices as devices_lib
from sparse_jax.train import kernel_choice
from sparse_jax.train import run as run_lib

IDLE, OTHER = 'nothing runs', 'not in the program'  # rows beside the program's parts


def no_gpu() -> str:
    """Why nothing can be measured here; empty where jax sees a GPU. Asked in a process of its own, as one that asks takes its memory."""
    command = [sys.executable, '-c', 'import jax; print(jax.default_backend())']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seen = (done.stdout.strip() or done.stderr.strip() or 'nothing').splitlines()[-1]
    return '' if seen == 'gpu' else f'{sys.executable} sees no GPU by jax, but {seen}'


class Measured(NamedTuple):
    """A measured step. Times are seconds a step."""

    counted: parts.Step  # what its program moves, and the predicted times
    host: float  # by the host's clock, steps queued
    by_part: dict[str, float]  # by the device's clock; IDLE: between the first kernel and the last one
    memory: int | None  # bytes at the peak, by the device's own account; None: it keeps none
    compile_seconds: float
    loss: float  # after all steps


class _Program(NamedTuple):
    step: Any  # compiled
    state: Any
    batch: Any
    patterns: Any


def measure(config: config_lib.Config, *, rounds: int = 5, queued: int = 5) -> Measured:
    """Times a config's ordinary step, which has no mask update; where gradients are dense in a window, one outside of it.

    Args:
      config: the settings; every layer of a sparse run takes the kernels that they name.
      rounds: of which the median counts.
      queued: steps of a round, which the host hands over without waiting.
    """
    begin = time.perf_counter()
    program = _compiled(config)
    compile_seconds = time.perf_counter() - begin
    state, seconds = program.state, []
    for i in range(1 + rounds):
        begin = time.perf_counter()
        for _ in range(queued):
            state, values = program.step(state, program.batch, program.patterns)
        jax.block_until_ready((state, values))
        seconds += [(time.perf_counter() - begin) / queued] * (i > 0)  # the first round warms up
    is_dense = config.sparsity.method == 'dense'
    block = 0 if is_dense else int(config.sparsity.granularity.rpartition('x')[2])
    counted = parts.count(program.step.as_text() or '', 1.0 if is_dense else config.sparsity.density, block)
    by_part = _by_part(program._replace(state=state), counted)
    memory = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
    return Measured(counted, statistics.median(seconds), by_part, memory, compile_seconds, float(values['loss']))


def _compiled(config: config_lib.Config) -> _Program:
    run_lib.check_settings(config)
    experiment = run_lib.create_experiment(config, run_lib.load_data(config))
    devices = devices_lib.Devices(config, experiment)
    state = devices.first(experiment.init, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        patterns = kernel_choice.LayerKernels(config, experiment, pathlib.Path(folder), 0, devices).patterns(0, state)
    example, random, size = experiment.example, np.random.default_rng(0), config.data.batch_size
    if example.dtype == jnp.int32:
        x = random.integers(0, 256, (size, *example.shape[1:]), np.int32)
        batch = {'input': x, 'label': x}
    else:
        x = random.standard_normal((size, *example.shape[1:])).astype(example.dtype)
        batch = {'input': x, 'label': random.integers(0, 10, size, np.int32)}
    batch = jax.device_put(batch)
    step = functools.partial(experiment.train_step, mask_update=False)
    jitted = devices.jit(step, donate_argnums=0, static_argnames='dense_gradients')
    compiled = jitted.lower(state, batch, patterns, dense_gradients=experiment.dense_gradient_steps is None).compile()
    return _Program(compiled, state, batch, patterns)


def _by_part(program: _Program, counted: parts.Step, steps: int = 3) -> dict[str, float]:
    """One trace per step, so that the time between two steps counts for neither."""
    seconds: dict[str, float] = collections.defaultdict(float)
    state = program.state
    for _ in range(steps):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state, values = program.step(state, program.batch, program.patterns)
                jax.block_until_ready((state, values))
            for name, total in trace.shares(trace.events(pathlib.Path(folder), 'jit_train_step')).items():
                seconds[IDLE if name == IDLE else counted.part_of.get(name, OTHER)] += total / steps
    return dict(seconds)
