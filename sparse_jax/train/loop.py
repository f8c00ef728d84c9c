"""Runs an experiment in a workdir: trains or goes on, shows progress, saves, and ends with result.json and report.png."""

import contextlib
import json
import math
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp

import sparse_jax as sj
from sparse_jax import config as config_lib
from sparse_jax import data as data_lib
from sparse_jax.report import run_report
from sparse_jax.runtime import checkpoint, hosts, workdir
from sparse_jax.train import kernel_choice, metrics, outcome
from sparse_jax.train import state as state_lib
from sparse_jax.train.run import Run, prepare

_NOT_SHARED = 'is not the same folder on all hosts: give one on a file system that they share.'


class NonFiniteError(RuntimeError):
    """The loss or a parameter is NaN or infinite: the run cannot go on."""


def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


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
                raise NonFiniteError(
                    f'the loss is {fetched["loss"]} at step {step}: lower optimizer.learning_rate. The last checkpoint is intact.'
                )
            self._collected.append(fetched)

    def means(self) -> dict[str, float]:
        """Means since the last call."""
        self._fetch()
        rows, self._collected = self._collected, []
        return {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}


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
    hosts.together(config_lib.validate, config)
    hosts.together(workdir.check, config, folder)
    if hosts.from_first((folder / 'result.json').exists):
        return hosts.together(_finished, config, folder)
    run = prepare(config, folder)
    hosts.together(kernel_choice.cut_by_mesh, config, run.experiment, run.devices)
    new = not folder.exists()
    with contextlib.ExitStack() as stack:
        hosts.first(lambda: stack.enter_context(workdir.locked(folder)))
        try:
            hosts.together(_shared, folder, hosts.from_first(workdir.holder, folder))
            hosts.together(workdir.check, config, folder)  # once more, now that nobody else can write there
        except ValueError:
            if hosts.is_first() and new:
                shutil.rmtree(folder)
            raise
        return _train_or_go_on(run)


def _finished(config: config_lib.Config, folder: pathlib.Path) -> dict[str, Any]:
    """The result of a run that has ended, shown once more."""
    if not (folder / 'result.json').exists():
        raise ValueError(f'--workdir={folder} {_NOT_SHARED}')
    result = json.loads((folder / 'result.json').read_text())
    if hosts.is_first():
        kernel_choice.print_table(config, folder)
        run_report.print_table(result)
    return result


def _begin(run: Run) -> None:
    workdir.write_json(run.folder / 'config.json', config_lib.identity(run.config))
    if run.data.fingerprint:
        workdir.write_json(run.folder / 'data.json', {'fingerprint': run.data.fingerprint})


def _shared(folder: pathlib.Path, holder: str) -> None:
    if workdir.holder(folder) != holder:
        raise ValueError(f'--workdir={folder} {_NOT_SHARED}')


def _train_or_go_on(run: Run) -> dict[str, Any]:
    config, folder, experiment, devices = run.config, run.folder, run.experiment, run.devices
    hosts.first(_begin, run)
    if hosts.is_first():
        devices.print_table()
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=config.checkpoint.keep)
    init = devices.jit(experiment.init, devices.state_shardings)
    key = jax.random.key(config.seed)
    found = checkpoints.restore_newest(devices.shapes)
    start, state, seconds = found or (0, init(key), 0.0)
    try:
        kernels = kernel_choice.LayerKernels(config, experiment, folder, start, devices)
        with hosts.Preemption() as preemption:
            state, seconds = _train_loop(run, checkpoints, kernels, state, start, seconds, preemption)
            checkpoints.close()
        return outcome.finish(run, state, seconds, start)
    except ValueError as error:  # no longer the input's fault
        raise RuntimeError(f'the run failed: {error}') from error


def _train_loop(run: Run, checkpoints, kernels, state, start, seconds, preemption):
    config, folder, data, experiment, devices = run
    placed = devices.replicated if devices.mesh is None else (devices.state_shardings, devices.replicated)
    train_step = devices.jit(experiment.train_step, placed, donate_argnums=0, static_argnames='dense_gradients')
    evaluate, all_finite = devices.jit(experiment.evaluate), devices.jit(_all_finite)
    part = next(part for part in outcome.PARTS if len(getattr(data, part).labels))
    size = config.data.batch_size
    first, stop = devices.rows(size)
    own = dict(process_index=first // (stop - first), process_count=size // (stop - first))
    batches = data_lib.batches(data, batch_size=size, seed=config.seed, num_batches=experiment.total_steps, **own)
    drawn = data_lib.stream(batches, start, config.data.prefetch)
    eval_every = config.train.eval_every or experiment.steps_per_epoch
    layers = state_lib.sizes(experiment, state).layers
    silent = not hosts.is_first()
    writer = metrics.Silent() if silent else metrics.Writer(folder, step=start, tensorboard=config.log.tensorboard)
    progress = metrics.Silent() if silent else metrics.Progress(experiment.total_steps, start)
    step_metrics = _StepMetrics()
    shown: dict[str, float] = {}

    def write_density(step, extra):
        density = {name: count / size for name, (count, size) in state_lib.sizes(experiment, state).layers.items()}
        writer.write(step, {'density': density, **extra})

    if start == 0 and config.sparsity.method != 'dense':
        write_density(0, {})
    patterns = kernels.patterns(start, state)
    begin = last_time = time.perf_counter()
    last_step = start
    try:
        for step in range(start + 1, experiment.total_steps + 1):
            dense = experiment.needs_dense_gradient(step)
            state, values = train_step(state, devices.batch(next(drawn), size), patterns, dense_gradients=dense)
            step_metrics.add(step, values)
            checkpoints.check()
            if experiment.is_mask_update(step):
                patterns = kernels.patterns(step, state)
                stats = jax.device_get(state.opt_state.stats)
                extra = {
                    name: dict(zip(layers, getattr(stats, name).tolist(), strict=True)) for name in ('share', 'pruned', 'grown')
                }
                explored = sj.stats.exploration_rate(state.opt_state)
                write_density(step, {**extra, 'flips': int(stats.flipped.sum()), 'exploration_rate': explored})
            if step % config.log.every == 0 or step == experiment.total_steps:
                means = step_metrics.means()
                now = time.perf_counter()
                numbers = {**means, 'learning_rate': _number(experiment.learning_rate(step - 1))}
                if experiment.prune_rate is not None:
                    numbers['prune_rate'] = _number(experiment.prune_rate(step))
                writer.write(step, {**numbers, 'steps_per_second': (step - last_step) / (now - last_time)})
                last_step, last_time = step, now
                shown |= means
                progress.show(step, shown)
            if step % eval_every == 0 or step == experiment.total_steps:
                values = {f'{part}_{k}': v for k, v in outcome.evaluate_part(run, evaluate, state, part, patterns).items()}
                writer.write(step, values)
                shown |= {f'{part}_accuracy': values[f'{part}_accuracy']}
            stopping = preemption.reached(step) and step < experiment.total_steps
            if stopping or step % config.checkpoint.every == 0 or step == experiment.total_steps:
                if not all_finite(state.params):
                    raise NonFiniteError(f'a parameter is not finite after step {step}: lower optimizer.learning_rate.')
                checkpoints.save(step, state, seconds + time.perf_counter() - begin)
            if stopping:
                checkpoints.close()
                raise hosts.Preempted(f'stopped by SIGTERM after step {step}, which is saved: the same command goes on from there.')
    finally:
        progress.close()
        writer.close()
    return state, seconds + time.perf_counter() - begin


def evaluate(config: config_lib.Config, folder: pathlib.Path) -> dict[str, Any]:
    """Evaluates a workdir's newest checkpoint. Writes nothing.

    Args:
      config: the settings, the same as it was trained with.
      folder: the workdir.

    Returns:
      Loss and accuracy on the test examples (and on the validation examples, where there are any), the step and the sizes.

    Raises:
      ValueError: if there is no checkpoint, or it is damaged, or of another experiment.
    """
    if not (folder / 'checkpoints').is_dir():
        raise ValueError(f'--workdir={folder} has no checkpoint: train first, with --mode=train.')
    run = prepare(config, folder)
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', read_only=True)
    step = checkpoints.latest_step()
    if step is None:
        raise ValueError(f'--workdir={folder} has no complete checkpoint: train first, with --mode=train.')
    state, _ = checkpoints.restore(step, run.devices.shapes)
    checkpoints.close()
    sizes = state_lib.sizes(run.experiment, state)
    result = {'step': step, 'nonzeros': sizes.nonzeros, 'density': sizes.density, **outcome.results(run, state)}
    if hosts.is_first():
        print(json.dumps(result, indent=2))
    return result
