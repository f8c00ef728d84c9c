"""Which layer of a run takes which kernel, and the patterns for them: chosen by measurement, and part of the run.

A choice decides the last bits of a layer's values. So it is written into the workdir before the first step that uses it, by the number
of steps done, and a resumed run reads it there instead of measuring again.
"""

import json
import logging
import math
import pathlib
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import sparse_jax as sj
from sparse_jax import config as config_lib
from sparse_jax import masks as masks_lib
from sparse_jax.kernels import choice, cpu
from sparse_jax.train import state as state_lib
from sparse_jax.train import workdir

FILE = 'kernels.json'
_LOG = logging.getLogger('sparse_jax')
_MUCH = 1.5  # a density that has changed by this factor since a layer's choice is measured anew
_SPARSE = 0.9  # above this density no sparse kernel is tried


def check(config: config_lib.Config) -> None:
    """ValueError where sparsity.kernels asks for a backend that does not run here; compiles it if need be."""
    if config.sparsity.kernels == 'cpu' and config.sparsity.method != 'dense' and (reason := _unavailable(config)):
        raise ValueError(f"config.sparsity.kernels='cpu' does not run here: {reason}. Take 'auto', 'reference' or 'dense'.")


def _unavailable(config: config_lib.Config) -> str:
    """Why the C++ kernels cannot run this; empty where they can."""
    if jax.default_backend() != 'cpu':
        return f'it runs on CPU, not on {jax.default_backend()}'
    return cpu.unsupported(config.model.dtype, config.model.dtype) or cpu.unavailable()


class LayerKernels:
    """The patterns of a run, kept up to date with its masks."""

    def __init__(self, config: config_lib.Config, experiment: state_lib.Experiment, folder: pathlib.Path, start: int):
        """Args: start: steps done already, 0 for a new run."""
        self._mode = 'dense' if config.sparsity.method == 'dense' else config.sparsity.kernels
        granularity = sj.granularity.get(config.sparsity.granularity)
        block = isinstance(granularity, sj.granularity.Block)
        self._block = (granularity.rows, granularity.columns) if block else None
        self._experiment = experiment
        self._examples = config.data.batch_size // config.train.accumulate
        self._path = folder / FILE
        self._patterns: Any = None
        self._calls: dict[str, choice.Call] | None = None
        self._history: dict[str, dict[str, Any]] = {}
        if self._mode == 'auto' and start and self._path.exists():
            try:
                self._history = json.loads(self._path.read_text())
            except ValueError as error:
                raise ValueError(f'{self._path} cannot be read ({error}): delete it, and the kernels are chosen anew.') from error
        before = sorted(int(step) for step in self._history if int(step) <= start)
        self._chosen: dict[str, Any] = {}
        for step in before:
            self._chosen |= self._history[str(step)]
        if any(row['implementation'] == 'cpu' for row in self._chosen.values()) and (reason := _unavailable(config)):
            _LOG.warning("kernels: %s says 'cpu', which does not run here (%s): the reference does.", self._path, reason)

    def patterns(self, step: int, state: state_lib.TrainState) -> Any:
        """The patterns of a state's masks, as ``train_step`` takes them; None where all layers are dense.

        Args:
          step: steps done; choices are made and kept by it.
          state: concrete.
        """
        if self._mode == 'dense':
            return None
        masks = jax.device_get(sj.get_masks(state.opt_state))
        densities = {path: float(np.mean(mask)) for path, mask in masks_lib.leaf_paths(masks) if np.ndim(mask)}
        if self._mode == 'auto':
            self._choose(step, state, masks, densities)
            chosen = {path: row['implementation'] for path, row in self._chosen.items()}
        else:
            chosen = dict.fromkeys(densities, self._mode)
        if all(name == 'dense' for name in chosen.values()):
            return None
        options: dict[str, Any] = dict(block=self._block, stacked=self._experiment.stacked, implementations=chosen)
        self._patterns = sj.kernels.make_patterns(masks, **options, previous=self._patterns)
        return jax.device_put(self._patterns)

    def _choose(self, step: int, state, masks, densities: dict[str, float]) -> None:
        stored = self._history.get(str(step), {})
        rows: dict[str, Any] = {}
        for path, density in densities.items():
            known = self._chosen.get(path)
            if known and 1 / _MUCH < density / known['density'] < _MUCH:
                continue
            rows[path] = stored.get(path) or self._measured(state, masks, path, density)
        if not rows:
            return
        self._chosen |= rows
        if stored != rows:
            self._history[str(step)] = rows
            workdir.write_json(self._path, self._history)

    def _measured(self, state, masks, path: str, density: float) -> dict[str, Any]:
        if self._calls is None:
            self._calls = _calls(self._experiment, state, masks, self._block, self._examples)
        row: dict[str, Any] = {'density': density, 'implementation': 'dense', 'seconds': {}}
        if path in self._calls and density <= _SPARSE and len(choice.candidates(self._calls[path])) > 1:
            window, every = self._experiment.dense_gradient_steps, self._experiment.update_every
            share = 1.0 if window is None else min(1.0, window / every)
            row['seconds'] = choice.measured(self._calls[path], density, dense_share=share)
            row['implementation'] = choice.fastest(row['seconds'])
            times = ', '.join(f'{name} {1e3 * seconds:.2f} ms' for name, seconds in row['seconds'].items())
            _LOG.info('kernels: %s at %.2f%% takes %s (%s)', path, 100 * density, row['implementation'], times)
        return row


def print_table(config: config_lib.Config, folder: pathlib.Path) -> None:
    """Prints the choices of a workdir's run, each layer's last one with both times; nothing where none was made."""
    path = folder / FILE
    if config.sparsity.kernels != 'auto' or not path.exists():
        return
    history, rows = json.loads(path.read_text()), {}
    for step in sorted(history, key=int):
        rows |= history[step]
    table = Table(title='kernels, chosen by measurement: a layer in an average step')
    for column in ('layer', 'density', 'dense', 'sparse', 'takes'):
        table.add_column(column, justify='left' if column in ('layer', 'takes') else 'right')
    for name, row in rows.items():
        times = [f'{1e3 * row["seconds"][key]:.2f} ms' if key in row['seconds'] else '' for key in ('dense', 'cpu')]
        table.add_row(name, f'{row["density"]:.2%}', *times, row['implementation'])
    Console().print(table)


def _calls(experiment, state, masks, block, examples: int) -> dict[str, choice.Call]:
    """The products that a step makes with each sparse leaf, by tracing one."""
    options: dict[str, Any] = dict(block=block, stacked=experiment.stacked)
    leaves = {path for path, mask in masks_lib.leaf_paths(masks) if np.ndim(mask)}
    patterns = sj.kernels.make_patterns(masks, **options, implementations=dict.fromkeys(leaves, 'cpu'))
    x = jax.ShapeDtypeStruct((examples, *experiment.example.shape[1:]), experiment.example.dtype)
    with choice.recorded() as calls:
        # in training: an evaluation fills its batch up, and may lie by lanes where training does not
        jax.eval_shape(lambda p, s, x: experiment.apply(p, s, x, patterns, train=True), state.params, state.model_state, x)
    # the first layer's input is the network's, whose gradient nobody wants
    first = [call._replace(input_gradient=False) if math.prod(call.x) == math.prod(x.shape) else call for call in calls[:1]]
    return {call.name: call for call in (*first, *calls[1:])}
