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

import sparse_jax as sj
from sparse_jax import config as config_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.core import target
from sparse_jax.kernels import measure, sharded
from sparse_jax.runtime import hosts, workdir
from sparse_jax.train import devices as devices_lib
from sparse_jax.train import state as state_lib
from sparse_jax.train.console import named_table

FILE = 'kernels.json'
_LOG = logging.getLogger('sparse_jax')
_MUCH = 1.5  # a density that has changed by this factor since a layer's choice is measured anew
_SPARSE = 0.9  # above this density no sparse kernel is tried


def block_of(config: config_lib.Config) -> tuple[int, int]:
    """The block of a config's units; (1, 1): single weights."""
    granularity = sj.granularity.get(config.sparsity.granularity)
    return (granularity.rows, granularity.columns) if isinstance(granularity, sj.granularity.Block) else (1, 1)


def check(config: config_lib.Config) -> None:
    """ValueError where sparsity.kernels asks for a backend that does not run here; compiles it if need be."""
    named = config.sparsity.kernels
    if named in sj.kernels.IMPLEMENTATIONS and config.sparsity.method != 'dense' and (reason := _unavailable(config, named)):
        raise ValueError(f"config.sparsity.kernels={named!r} does not run here: {reason}. Take 'auto', 'reference' or 'dense'.")


def _unavailable(config: config_lib.Config, name: str) -> str:
    """Why a backend cannot run this; empty where it can."""
    if name not in sj.kernels.IMPLEMENTATIONS:
        return f'there are none for {name}'
    return sj.kernels.unsupported(name, config.model.dtype, block_of(config))


def cut_by_mesh(config: config_lib.Config, experiment: state_lib.Experiment, devices: devices_lib.Devices) -> list[str]:
    """Sparse layers that the mesh divides so that no kernel takes them, as where it cuts blocks; ValueError where kernels are named."""
    if devices.mesh is None or config.sparsity.method == 'dense':
        return []
    block, cut = block_of(config), []
    for path, mask in masks_lib.leaf_paths(sj.get_masks(devices.shapes.opt_state)):
        axes = mask.ndim - (experiment.stacked is not None and mask.ndim > 0 and experiment.stacked(path, mask))
        if axes in (2, 4) and sharded.split_of(mask.sharding, mask.shape, block) is None:
            cut.append(path)
    if cut and config.sparsity.kernels not in ('auto', 'dense', 'reference'):
        raise ValueError(
            f'config.sparsity.kernels={config.sparsity.kernels!r}: over config.mesh.model={devices.mesh.shape["model"]} the parts of '
            f'{", ".join(cut)} are no whole blocks of {block[0]}x{block[1]}, or divide other axes than inputs and outputs. Take a smaller config.mesh.model '
            "or block, other config.mesh.rules, or 'auto', by which these layers are dense."
        )
    return cut


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
        self._mode = 'dense' if config.sparsity.method == 'dense' else config.sparsity.kernels
        self._mesh = self._places = None
        if devices is not None and devices.mesh is not None:
            self._mesh, self._places = devices.mesh, devices.state_shardings.params
        block = block_of(config)
        self._block = None if block == (1, 1) else block
        reason = _unavailable(config, target.platform()) if self._mode == 'auto' else ''
        self._own = 'reference' if reason else target.platform()
        if reason and hosts.is_host0():
            _LOG.info('kernels: all products are dense, under masks: the kernels of this platform do not run here: %s.', reason)
        elif (
            self._mode == 'auto' and devices is not None and (cut := cut_by_mesh(config, experiment, devices)) and hosts.is_host0()
        ):
            _LOG.info(
                'kernels: the mesh cuts blocks of %s, or divides other axes: these layers are dense, under masks.', ', '.join(cut)
            )
        self._experiment = experiment
        self._examples = config.data.batch_size // config.train.accumulate
        self._path = folder / FILE
        self._patterns: Any = None
        self._calls: dict[str, measure.Call] | None = None
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
        for name in sorted({row['implementation'] for row in self._chosen.values()} - {'dense'}):
            if reason := _unavailable(config, name):
                _LOG.warning("kernels: %s says '%s', which does not run here (%s): the reference does.", self._path, name, reason)

    def patterns(self, step: int, state: state_lib.TrainState) -> Any:
        """The patterns of a state's masks, as ``train_step`` takes them; None where all layers are dense.

        Args:
          step: steps done; choices are made and kept by it.
          state: concrete.
        """
        if self._mode == 'dense':
            return None
        masks = sj.get_masks(state.opt_state)
        if self._mesh is None:
            masks = jax.device_get(masks)
        counted = {path: (mask.sum(dtype='int32'), mask.size) for path, mask in masks_lib.leaf_paths(masks) if np.ndim(mask)}
        densities = {path: int(count) / size for path, (count, size) in counted.items()}
        if self._mode == 'auto':
            self._choose(step, state, masks, densities)
            chosen = {path: row['implementation'] for path, row in self._chosen.items()}
        else:
            chosen = dict.fromkeys(densities, self._mode)
        if all(name == 'dense' for name in chosen.values()):
            return None
        options: dict[str, Any] = dict(block=self._block, stacked=self._experiment.stacked, implementations=chosen)
        self._patterns = sj.kernels.make_patterns(masks, **options, previous=self._patterns, shardings=self._places)
        return self._patterns if self._mesh is not None else jax.device_put(self._patterns)

    def _choose(self, step: int, state, masks, densities: dict[str, float]) -> None:
        stored = self._history.get(str(step), {})
        rows: dict[str, Any] = {}
        for path, density in densities.items():
            known = self._chosen.get(path)
            if known and 1 / _MUCH < density / known['density'] < _MUCH:
                continue
            if self._calls is None and path not in stored:
                self._calls = self._traced(state, masks)
            rows[path] = stored.get(path) or hosts.broadcast_from_host0(self._measured, path, density)
        if not rows:
            return
        self._chosen |= rows
        if stored != rows:
            self._history[str(step)] = rows
            if hosts.is_host0():
                workdir.write_json(self._path, self._history)

    def _measured(self, path: str, density: float) -> dict[str, Any]:
        assert self._calls is not None
        row: dict[str, Any] = {'density': density, 'implementation': 'dense', 'seconds': {}}
        if path in self._calls and density <= _SPARSE and len(measure.candidates(self._calls[path])) > 1:
            window, every = self._experiment.dense_gradient_steps, self._experiment.update_every
            share = 1.0 if window is None else min(1.0, window / every)
            row['seconds'] = measure.measured(self._calls[path], density, dense_share=share)
            row['implementation'] = measure.fastest(row['seconds'])
            times = ', '.join(f'{name} {1e3 * seconds:.2f} ms' for name, seconds in row['seconds'].items())
            _LOG.info('kernels: %s at %.2f%% takes %s (%s)', path, 100 * density, row['implementation'], times)
        return row

    def _traced(self, state, masks) -> dict[str, measure.Call]:
        """The products that a device makes in a step with each sparse leaf, by tracing one."""
        experiment = self._experiment
        leaves = {path for path, mask in masks_lib.leaf_paths(masks) if np.ndim(mask)}
        options: dict[str, Any] = dict(
            block=self._block, stacked=experiment.stacked, implementations=dict.fromkeys(leaves, self._own)
        )
        patterns = sj.kernels.make_patterns(masks, **options, shardings=self._places)
        x = jax.ShapeDtypeStruct((self._examples, *experiment.example.shape[1:]), experiment.example.dtype)
        with measure.recorded() as calls:
            # in training: an evaluation fills its batch up, and may lie by lanes where training does not
            jax.eval_shape(lambda p, s, x: experiment.apply(p, s, x, patterns, train=True), state.params, state.model_state, x)
        # the first layer's input is the network's, whose gradient nobody wants
        size = math.prod(x.shape) // (1 if self._mesh is None else self._mesh.shape['data'])
        first = [call._replace(input_gradient=False) if math.prod(call.x) == size else call for call in calls[:1]]
        return {call.name: call for call in (*first, *calls[1:])}


def print_table(folder: pathlib.Path) -> None:
    """Prints the choices of a workdir's run, each layer's last one with both times; nothing where none was made."""
    path = folder / FILE
    if not path.exists():
        return
    history, chosen, rows = json.loads(path.read_text()), {}, []
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
