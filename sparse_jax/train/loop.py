"""Trains an experiment in a workdir: begins or resumes, shows progress, saves checkpoints, and ends with result.json."""

import contextlib
import json
import logging
import math
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax import config as config_lib
from sparse_jax import data as data_lib
from sparse_jax import stats
from sparse_jax.runtime import checkpoint, hosts, workdir
from sparse_jax.train import kernel_choice, metrics
from sparse_jax.train import state as state_lib
from sparse_jax.train.evaluate import PARTS, evaluate_part
from sparse_jax.train.result import REPORT, finish
from sparse_jax.train.run import Run, check_identity, prepare

_LOG = logging.getLogger('sparse_jax')
_NOT_SHARED = 'is not the same folder on all hosts: give one on a file system that they share.'


class NonFiniteError(RuntimeError):
    """The loss or a parameter is NaN or infinite: the run cannot go on."""


def train(config: config_lib.Config, folder: pathlib.Path) -> dict[str, Any]:
    """Trains an experiment to its end, from its newest checkpoint if it has one.

    Args:
      config: the settings.
      folder: the workdir; made if need be.

    Returns:
      The content of ``result.json``. In a finished workdir nothing is done but to return it.

    Raises:
      ValueError: for anything wrong with the input, before a file is made.
      NonFiniteError: if the loss or a parameter stops being finite.
    """
    hosts.run_on_all_hosts(check_identity, config, folder)
    if hosts.broadcast_from_host0((folder / 'result.json').exists):
        return hosts.run_on_all_hosts(_read_result, folder)
    run = prepare(config, folder)
    if config.sparsity.kernels != 'auto':  # by which layers that the mesh cuts are dense
        hosts.run_on_all_hosts(kernel_choice.cut_by_mesh, config, run.experiment, run.devices)
    with _locked(run):
        return _train(run)


def _read_result(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / 'result.json'
    if not path.exists():
        raise ValueError(f'--workdir={folder} {_NOT_SHARED}')
    return json.loads(path.read_text())


@contextlib.contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Host 0 holds the workdir's lock, and all hosts have checked the workdir once more, now that nobody else can write there."""
    is_new = not run.folder.exists()
    with contextlib.ExitStack() as stack:
        hosts.run_on_host0(lambda: stack.enter_context(workdir.locked(run.folder)))
        holder = hosts.broadcast_from_host0(workdir.holder, run.folder)
        try:
            hosts.run_on_all_hosts(_check_locked, run, holder)
        except ValueError:
            if hosts.is_host0() and is_new:
                shutil.rmtree(run.folder)
            raise
        yield


def _check_locked(run: Run, holder: str) -> None:
    if workdir.holder(run.folder) != holder:
        raise ValueError(f'--workdir={run.folder} {_NOT_SHARED}')
    workdir.check(run.config, run.folder)


def _begin(run: Run) -> None:
    """The first files of a workdir; a report of a run that was finished before its files were deleted goes."""
    workdir.write_json(run.folder / 'config.json', config_lib.identity(run.config))
    if run.data.fingerprint:
        workdir.write_json(run.folder / 'data.json', {'fingerprint': run.data.fingerprint})
    (run.folder / REPORT).unlink(missing_ok=True)


def _train(run: Run) -> dict[str, Any]:
    """Trains in the workdir, from its newest checkpoint or from the start."""
    config, folder, experiment, devices = run.config, run.folder, run.experiment, run.devices
    hosts.run_on_host0(_begin, run)
    if hosts.is_host0():
        devices.print_table()
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=config.checkpoint.keep)
    init = devices.jit(experiment.init, devices.state_shardings)
    key = jax.random.key(config.seed)
    restored = checkpoints.restore_newest(devices.shapes, experiment.layer_codes)
    if hosts.is_host0() and config.sparsity.method != 'dense':
        _LOG.info(
            'sparse: %s; %s', ', '.join(layer.name for layer in experiment.layers), stats.dense_leaves(devices.shapes.opt_state)
        )
    start, state, seconds = restored or (0, init(key), 0.0)
    try:
        kernels = kernel_choice.LayerKernels(config, experiment, folder, start, devices)
        with hosts.Preemption() as preemption:
            state, seconds = _train_loop(run, checkpoints, kernels, state, start, seconds, preemption)
            checkpoints.close()
        return finish(run, state, seconds, start)
    except NonFiniteError as error:
        raise NonFiniteError(f'{error} {_saved(checkpoints)} The same command would end here again.') from None
    except ValueError as error:  # no longer the input's fault
        raise RuntimeError(f'the run failed: {error}') from error


def _saved(checkpoints: checkpoint.Checkpoints) -> str:
    """What a run that cannot go on leaves, in one sentence."""
    checkpoints.wait()
    step = checkpoints.latest_step()
    return 'Nothing had been saved.' if step is None else f'The checkpoint of step {step} is intact.'


def _train_loop(
    run: Run,
    checkpoints: checkpoint.Checkpoints,
    kernels: kernel_choice.LayerKernels,
    state: state_lib.TrainState,
    start: int,
    seconds: float,
    preemption: hosts.Preemption,
) -> tuple[state_lib.TrainState, float]:
    """Trains from the step after `start` to the last one; returns the state and the seconds spent on it since step 0."""
    config, experiment, devices = run.config, run.experiment, run.devices
    size, last = config.data.batch_size, experiment.total_steps
    out = devices.replicated if devices.mesh is None else (devices.state_shardings, devices.replicated)
    train_step = devices.jit(experiment.train_step, out, donate_argnums=0, static_argnames='dense_gradients')
    evaluate, all_finite = devices.jit(experiment.evaluate), devices.jit(_all_finite)
    part = next(part for part in PARTS if len(getattr(run.data, part).labels))
    eval_every = config.train.eval_every or experiment.steps_per_epoch
    batches = _batches(run, start)
    log = _Log(run, state, start)
    patterns = kernels.patterns(start, state)
    begin = time.perf_counter()
    log.begin()
    try:
        for step in range(start + 1, last + 1):
            dense = experiment.needs_dense_gradient(step)
            state, values = train_step(state, devices.batch(next(batches), size), patterns, dense_gradients=dense)
            log.step(step, values)
            checkpoints.check()
            if experiment.is_mask_update(step):
                patterns = kernels.patterns(step, state)
                log.mask_update(step, state)
            if step % config.log.every == 0 or step == last:
                log.means(step)
            if step % eval_every == 0 or step == last:
                log.evaluation(step, part, evaluate_part(run, evaluate, state, part, patterns))
            stopping = preemption.reached(step) and step < last
            if stopping or step % config.checkpoint.every == 0 or step == last:
                if not all_finite(state.params):
                    raise NonFiniteError(f'a parameter is not finite after step {step}: lower optimizer.learning_rate.')
                checkpoints.save(step, state, seconds + time.perf_counter() - begin)
            if stopping:
                checkpoints.close()
                by = preemption.signal
                raise hosts.Preempted(f'stopped by {by} after step {step}, which is saved: the same command goes on from there.')
    finally:
        log.close()
    return state, seconds + time.perf_counter() - begin


def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def _batches(run: Run, start: int) -> Iterator[dict[str, Any]]:
    """This process's rows of each batch, from the one after `start` on."""
    size, seed = run.config.data.batch_size, run.config.seed
    first, stop = run.devices.rows(size)
    share: dict[str, int] = dict(process_index=first // (stop - first), process_count=size // (stop - first))
    batches = data_lib.batches(run.data, batch_size=size, seed=seed, num_batches=run.experiment.total_steps, **share)
    return data_lib.stream(batches, start, run.config.data.prefetch)


class _Log:
    """Where a run's numbers go while it trains: metrics.jsonl and the progress shown on host 0, nowhere on the others."""

    def __init__(self, run: Run, state: state_lib.TrainState, start: int):
        self._experiment = experiment = run.experiment
        self._layers = state_lib.sizes(experiment, state).layers
        self._writer = self._progress = metrics.Silent()
        if hosts.is_host0():
            self._writer = metrics.Writer(run.folder, step=start, tensorboard=run.config.log.tensorboard)
            self._progress = metrics.Progress(experiment.total_steps, start)
        self._step_metrics = _StepMetrics()
        self._shown: dict[str, float] = {}
        self._last_step, self._last_time = start, 0.0
        if start == 0 and run.config.sparsity.method != 'dense':
            self._density(0, state, {})

    def begin(self) -> None:
        """Starts the clock."""
        self._last_time = time.perf_counter()

    def step(self, step: int, values: dict[str, jax.Array]) -> None:
        """Metrics of a step."""
        self._step_metrics.add(step, values)

    def mask_update(self, step: int, state: state_lib.TrainState) -> None:
        """What an update of the masks did."""
        updates = jax.device_get(state.opt_state.stats)
        by_layer = {
            name: dict(zip(self._layers, getattr(updates, name).tolist(), strict=True)) for name in ('share', 'pruned', 'grown')
        }
        explored = stats.exploration_rate(state.opt_state)
        self._density(step, state, {**by_layer, 'flips': int(updates.flipped.sum()), 'exploration_rate': explored})

    def _density(self, step: int, state: state_lib.TrainState, values: dict[str, Any]) -> None:
        layers = state_lib.sizes(self._experiment, state).layers
        self._writer.write(step, {'density': {name: count / size for name, (count, size) in layers.items()}, **values})

    def means(self, step: int) -> None:
        """Means of the steps since the last call, and the rates of now."""
        experiment, means = self._experiment, self._step_metrics.means()
        now = time.perf_counter()
        numbers = {**means, 'learning_rate': _number(experiment.learning_rate(step - 1))}
        if experiment.prune_rate is not None:
            numbers['prune_rate'] = _number(experiment.prune_rate(step))
        self._writer.write(step, {**numbers, 'steps_per_second': (step - self._last_step) / (now - self._last_time)})
        self._last_step, self._last_time = step, now
        self._shown |= means
        self._progress.show(step, self._shown)

    def evaluation(self, step: int, part: str, values: dict[str, float]) -> None:
        """Loss and accuracy of a part of the data."""
        named = {f'{part}_{name}': value for name, value in values.items()}
        self._writer.write(step, named)
        self._shown |= {f'{part}_accuracy': named[f'{part}_accuracy']}

    def close(self) -> None:
        self._progress.close()
        self._writer.close()


def _number(x: Any) -> float:
    return float(x)


class _StepMetrics:
    """Collects each step's metrics, fetched after the next step has been dispatched, so that fetching never stalls the device."""

    def __init__(self):
        self._pending = None
        self._collected: list[dict[str, float]] = []

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        self._fetch()
        self._pending = step, values

    def _fetch(self) -> None:
        if self._pending is not None:
            step, values = self._pending
            self._pending = None
            fetched = {k: float(v) for k, v in jax.device_get(values).items()}
            if not math.isfinite(fetched['loss']):
                raise NonFiniteError(f'the loss is {fetched["loss"]} at step {step}: lower optimizer.learning_rate.')
            self._collected.append(fetched)

    def means(self) -> dict[str, float]:
        """Means since the last call."""
        self._fetch()
        rows, self._collected = self._collected, []
        return {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}
