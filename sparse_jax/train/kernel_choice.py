"""Which layer of a run takes which kernel, and the patterns for them: chosen by measurement, and part of the run.

A choice decides the last bits of a layer's values. So it is written into the workdir before the first step that uses it, by the number
of steps done, and a resumed run reads it there instead of measuring again.
"""

import logging
import math
import pathlib
from typing import Any

import jax
import numpy as np
from rich.console import Console

from sparse_jax import config as config_lib
from sparse_jax import kernels
from sparse_jax.compact.prepare import lists_by_output
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.kernels import backend, measure, runner, sharded
from sparse_jax.runtime import hosts, records
from sparse_jax.train import devices as devices_lib
from sparse_jax.train import state as state_lib
from sparse_jax.train.console import named_table

_LOG = logging.getLogger('sparse_jax')
_MOVE_OFTEN, _FEWEST_STEPS = ('top_kast', 'truncation'), 10  # fewer steps between updates: lists made anew cost more than they save


def check(config: config_lib.Config) -> None:
    """ValueError where sparsity.kernels asks for a backend that does not run here; compiles it if need be."""
    named = config.sparsity.kernels
    if named in backend.IMPLEMENTATIONS and config.sparsity.method != 'dense' and (reason := _unsupported(config, named)):
        raise ValueError(f"config.sparsity.kernels={named!r} does not run here: {reason}. Take 'auto', 'reference' or 'dense'.")


def _unsupported(config: config_lib.Config, implementation: str) -> str:
    """Why a backend cannot run this; empty where it can."""
    return backend.unsupported(implementation, config.model.dtype, config.sparsity.granularity)


def cut_by_mesh(config: config_lib.Config, experiment: state_lib.Experiment, devices: devices_lib.Devices) -> list[str]:
    """Sparse layers that the mesh divides so that no kernel takes them, as where it cuts blocks; ValueError where kernels are named."""
    if devices.mesh is None or config.sparsity.method == 'dense' or config.sparsity.storage == 'compact':
        return []
    granularity, cut = granularity_lib.of_products(granularity_lib.get(config.sparsity.granularity)), []
    for path, mask in layers_lib.leaf_paths(masks_lib.get_masks(devices.shapes.opt_state)):
        axes = mask.ndim - (experiment.stacked is not None and mask.ndim > 0 and experiment.stacked(path, mask))
        if axes in (2, 4) and sharded.split_of(mask.sharding, mask.shape, granularity) is None:
            cut.append(path)
    if cut and config.sparsity.kernels not in ('auto', 'dense', 'reference'):
        raise ValueError(
            f'config.sparsity.kernels={config.sparsity.kernels!r}: over config.mesh.model={devices.mesh.shape["model"]} the parts of '
            f'{", ".join(cut)} are no whole {granularity}, or divide other axes than inputs and outputs. Take a smaller config.mesh.model '
            "or block, other config.mesh.rules, or 'auto', by which these layers are dense."
        )
    return cut


def _check_choices(path: pathlib.Path) -> None:
    """Puts the choices of a run that goes on aside where they cannot be read; without them all is measured anew."""
    anew = 'the kernels are chosen anew, and may round otherwise than before.'
    if not path.exists():
        _LOG.info('%s is not there: %s', path, anew)
        return
    try:
        records.read(path)
    except records.UnreadableError as error:
        _LOG.warning('%s: it was put aside as %s; %s', error, records.put_aside(path), anew)


class LayerKernels:
    """The patterns of a run, kept up to date with its masks."""

    def __init__(
        self,
        config: config_lib.Config,
        experiment: state_lib.Experiment,
        folder: pathlib.Path,
        start: int,
        devices: devices_lib.Devices | None = None,
    ):
        """Args: start: steps done already, 0 for a new run. devices: of the run; None: one."""
        self._is_compact = config.sparsity.storage == 'compact'
        self._mode = 'dense' if config.sparsity.method == 'dense' or self._is_compact else config.sparsity.kernels
        self._mesh = self._shardings = None
        if devices is not None and devices.mesh is not None:
            self._mesh, self._shardings = devices.mesh, devices.state_shardings.params
        self._granularity = granularity_lib.of_products(granularity_lib.get(config.sparsity.granularity))
        self._platform = backend.Choice('dense', '')
        # the masks of these methods may move in every step
        if self._mode == 'auto' and config.sparsity.method in _MOVE_OFTEN and experiment.update_every < _FEWEST_STEPS:
            self._mode = 'dense'
            if hosts.is_host0():
                _LOG.info(
                    'kernels: masks move every %d steps, too often for lists of units: all products are dense.',
                    experiment.update_every,
                )
        if self._mode == 'auto':
            self._platform = backend.of_platform(config.model.dtype, self._granularity)
            if hosts.is_host0():
                _log_dense_layers(config, experiment, devices, self._platform)
        self._experiment = experiment
        self._examples = config.data.batch_size // config.train.accumulate
        self._path = folder / records.KERNELS
        self._patterns: Any = None
        self._calls: dict[str, measure.Call] | None = None
        self._history: dict[str, dict[str, Any]] = {}
        if self._mode == 'auto' and start:
            hosts.run_on_host0(_check_choices, self._path)
            self._history = records.read(self._path) if self._path.exists() else {}
        before = sorted(int(step) for step in self._history if int(step) <= start)
        self._chosen: dict[str, Any] = {}
        for step in before:
            self._chosen |= self._history[str(step)]
        for name in sorted({row['implementation'] for row in self._chosen.values()} - {'dense'}):
            if reason := _unsupported(config, name):
                _LOG.warning("kernels: %s says '%s', which does not run here (%s): the reference does.", self._path, name, reason)

    def patterns(self, step: int, state: state_lib.TrainState) -> Any:
        """The patterns of a state's masks, as ``train_step`` takes them; None where all layers are dense, or lists suffice.

        Args:
          step: steps done; choices are made and kept by it.
          state: concrete.
        """
        if self._is_compact:
            return lists_by_output(state.opt_state.layout)
        if self._mode == 'dense':
            return None
        sparse = masks_lib.find_state(state.opt_state)
        if self._mesh is None:
            sparse = sparse._replace(masks=jax.device_get(sparse.masks))
        densities = runner.densities(sparse.masks)
        if self._mode == 'auto':
            self._choose(step, state, sparse, densities)
            chosen = {path: row['implementation'] for path, row in self._chosen.items()}
        else:
            chosen = dict.fromkeys(densities, self._mode)
        if all(name == 'dense' for name in chosen.values()):
            return None
        self._patterns = self._make_patterns(sparse, chosen, self._patterns)
        return self._patterns if self._mesh is not None else jax.device_put(self._patterns)

    def _make_patterns(self, sparse: masks_lib.SparsifyState, implementations: dict[str, str], previous: Any = None) -> Any:
        options: dict[str, Any] = dict(previous=previous, shardings=self._shardings)
        return kernels.make_patterns(sparse, implementations=implementations, **options)

    def _choose(self, step: int, state, sparse: masks_lib.SparsifyState, densities: dict[str, float]) -> None:
        stored = self._history.get(str(step), {})
        rows: dict[str, Any] = {}
        for path, density in densities.items():
            if runner.is_settled(self._chosen.get(path), density):
                continue
            if self._calls is None and path not in stored:
                self._calls = self._traced(state, sparse)
            rows[path] = stored.get(path) or hosts.broadcast_from_host0(self._measured, path, density)
        if not rows:
            return
        self._chosen |= rows
        if stored != rows:
            self._history[str(step)] = rows
            if hosts.is_host0():
                records.write(self._path, self._history)

    def _measured(self, path: str, density: float) -> dict[str, Any]:
        assert self._calls is not None
        window, every = self._experiment.dense_gradient_steps, self._experiment.update_every
        row = runner.choose(self._calls.get(path), density, 1.0 if window is None else min(1.0, window / every))
        if row['seconds']:
            _LOG.info('kernels: %s at %.2f%% takes %s (%s)', path, 100 * density, *backend.fastest(row['seconds']))
        return row

    def _traced(self, state, sparse: masks_lib.SparsifyState) -> dict[str, measure.Call]:
        """The products that a device makes in a step with each sparse leaf, by tracing one."""
        experiment = self._experiment
        leaves = [path for path, mask in layers_lib.leaf_paths(sparse.masks) if np.ndim(mask)]
        implementation = 'reference' if self._platform.implementation == 'dense' else self._platform.implementation
        patterns = self._make_patterns(sparse, dict.fromkeys(leaves, implementation))
        x = jax.ShapeDtypeStruct((self._examples, *experiment.example.shape[1:]), experiment.example.dtype)
        # in training: an evaluation fills its batch up, and may lie by lanes where training does not
        apply = lambda params, model_state, x, patterns: experiment.apply(params, model_state, x, patterns, train=True)
        images = math.prod(x.shape) // (1 if self._mesh is None else self._mesh.shape['data'])
        return runner.products(apply, (state.params, state.model_state, x), patterns, images)


def _log_dense_layers(
    config: config_lib.Config, experiment: state_lib.Experiment, devices: devices_lib.Devices | None, platform: backend.Choice
) -> None:
    """Says which layers cannot take the platform's kernels, and why."""
    if platform.reason:
        _LOG.info(
            'kernels: all products are dense, under masks: the kernels of this platform do not run here: %s.', platform.reason
        )
    elif devices is not None and (cut := cut_by_mesh(config, experiment, devices)):
        message = 'kernels: the mesh cuts blocks of %s, or divides other axes: these layers are dense, under masks.'
        _LOG.info(message, ', '.join(cut))


def print_table(folder: pathlib.Path) -> None:
    """Prints the choices of a workdir's run, each layer's last one with both times; nothing where none was made."""
    path = folder / records.KERNELS
    if not path.exists():
        return
    try:
        history = records.read(path)
    except records.UnreadableError as error:
        _LOG.warning('%s: the table of kernels is left out.', error)
        return
    chosen, rows = {}, []
    for step in sorted(history, key=int):
        chosen |= history[step]
    for name, row in chosen.items():
        dense = row['seconds'].get('dense')
        sparse = next((seconds for key, seconds in row['seconds'].items() if key != 'dense'), None)
        times = ['' if seconds is None else f'{1e3 * seconds:.2f} ms' for seconds in (dense, sparse)]
        rows.append((name, f'{row["density"]:.2%}', *times, row['implementation']))
    title, columns = 'kernels, chosen by measurement: a layer in an average step', ('layer', 'density', 'dense', 'sparse', 'takes')
    console = Console()
    console.print(named_table(title, columns, rows, width=console.width, left=('takes',)))
