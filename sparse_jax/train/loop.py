"""Trains an experiment in a workdir: begins or resumes, shows progress, saves checkpoints, and ends with result.json."""

import contextlib
import functools
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import config as config_lib
from sparse_jax import data as data_lib
from sparse_jax import stats
from sparse_jax.runtime import checkpoint, hosts, memory, records, workdir
from sparse_jax.train import exporting, initial, kernel_choice, memory_table, storage, stored
from sparse_jax.train import programs as programs_lib
from sparse_jax.train import state as state_lib
from sparse_jax.train.evaluate import PARTS, evaluate_part
from sparse_jax.train.log import Log
from sparse_jax.train.result import REPORT, finish
from sparse_jax.train.run import Run, check_identity, prepare

_LOG = logging.getLogger('sparse_jax')
_NOT_SHARED = 'is not the same folder on all hosts: give one on a file system that they share.'


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
    if hosts.broadcast_from_host0(_has_result, config, folder):
        return hosts.run_on_all_hosts(_read_result, folder)
    run = begin_from(prepare(config, folder))
    if config.sparsity.kernels != 'auto':  # by which layers that the mesh cuts are dense
        hosts.run_on_all_hosts(kernel_choice.cut_by_mesh, config, run.experiment, run.devices)
    with _locked(run) as is_held:
        return _train(run, is_held)


def begin_from(run: Run) -> Run:
    """The run with the network that it starts with, where it is to start with one and has no checkpoint."""
    source = run.config.train.init_from
    if not source or any((run.folder / 'checkpoints').glob('[0-9]*')):
        return run
    return run._replace(initial=hosts.run_on_all_hosts(_network_of, run, pathlib.Path(source)))


def _network_of(run: Run, source: pathlib.Path) -> initial.Network:
    if not source.exists():
        raise ValueError(f'--init_from={source} is not there: give the workdir of a run, or an exported file.')
    if source.is_dir():
        if not (source / 'checkpoints').is_dir():
            raise ValueError(
                f'--init_from={source} is a folder without a checkpoint: give the workdir of a run, or an exported file.'
            )
        params, masks, _ = exporting.network(stored.get_config(str(source)), source)
        found = initial.of_trees(params, masks)
    else:
        found = initial.of_file(source)
    initial.check(found, run.config, run.experiment, run.devices.shapes)
    return found


def _first_network(run: Run) -> initial.Network | None:
    """The network whose masks a method chooses by the first batch, the same on all hosts; None where the first masks are drawn."""
    if run.experiment.first_network is None:
        return None
    batch = data_lib.batches(run.data, batch_size=run.config.data.batch_size, seed=run.config.seed, num_batches=1)[0]
    params, model_state, masks = run.experiment.first_network(jax.random.key(run.config.seed), batch)
    _LOG.info('%s: the first masks are chosen by the weights and the first batch.', run.config.sparsity.method)
    return initial.of_trees(*jax.device_get(exporting.with_state(params, masks, model_state)))


def _has_result(config: config_lib.Config, folder: pathlib.Path) -> bool:
    """Whether the run is finished, and not given more steps. A result that cannot be read is none where there is a checkpoint to make it anew from."""
    path = folder / records.RESULT
    if not os.path.lexists(path):
        return False
    try:
        steps = records.read(path)['steps']
    except records.UnreadableError:
        if any((folder / 'checkpoints').glob('[0-9]*')):
            return False
        raise
    if 0 < config.train.steps < steps:
        raise workdir.fewer_steps(folder, steps, config.train.steps)
    return config.train.steps <= steps


def _read_result(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / records.RESULT
    if not path.exists():
        raise ValueError(f'--workdir={folder} {_NOT_SHARED}')
    return records.read(path)


@contextlib.contextmanager
def _locked(run: Run) -> Iterator[Callable[[], bool]]:
    """Host 0 holds the workdir's lock, and all hosts have checked the workdir once more, now that nobody else can write there.

    Gives a function that tells whether the workdir is still there; on other hosts it always says so.
    """
    is_new = not run.folder.exists()
    with contextlib.ExitStack() as stack:
        is_held = hosts.run_on_host0(lambda: stack.enter_context(workdir.locked(run.folder)))
        holder = hosts.broadcast_from_host0(workdir.holder, run.folder)
        try:
            hosts.run_on_all_hosts(_check_locked, run, holder)
        except ValueError:
            if hosts.is_host0() and is_new:
                shutil.rmtree(run.folder)
            raise
        yield is_held or (lambda: True)


def _check_locked(run: Run, holder: str) -> None:
    if workdir.holder(run.folder) != holder:
        raise ValueError(f'--workdir={run.folder} {_NOT_SHARED}')
    workdir.check(run.config, run.folder)


def _begin(run: Run) -> None:
    """The first files of a workdir; what is left of an earlier end of the run goes."""
    records.write(run.folder / records.CONFIG, config_lib.identity(run.config))
    records.write(run.folder / records.SETTINGS, config_lib.flatten(run.config))
    if run.data.fingerprint:
        records.write(run.folder / records.DATA, {'fingerprint': run.data.fingerprint})
    if os.path.lexists(
        path := run.folder / records.RESULT
    ):  # it cannot be read, or is of fewer steps; else the run would be finished
        try:
            path.rename(path.with_stem(f'{path.stem}_{records.read(path)["steps"]}'))
        except records.UnreadableError:
            _LOG.warning('%s cannot be read: it was put aside as %s, and is made anew.', path, records.put_aside(path))
    if run.experiment.total_steps > (began := run.config.train.schedule_steps or run.experiment.total_steps):
        _LOG.info(
            'schedules and mask updates keep the %d steps that they began with: after these the learning rate stays at %.3g, and masks rest.',
            began,
            float(np.asarray(run.experiment.learning_rate(began))),
        )
    if (report := run.folder / REPORT).is_file():
        report.unlink()


def _train(run: Run, is_held: Callable[[], bool]) -> dict[str, Any]:
    """Trains in the workdir, from its newest checkpoint or from the start."""
    config, folder, experiment, devices = run.config, run.folder, run.experiment, run.devices
    hosts.run_on_host0(_begin, run)
    if hosts.is_host0():
        devices.print_table()
        if config.sparsity.storage == 'compact':
            memory_table.print_table(run)
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=config.checkpoint.keep)
    restored = checkpoints.restore_newest(devices.shapes_after, experiment.layer_codes)
    if hosts.is_host0() and config.sparsity.method != 'dense':
        names = ', '.join(layer.name for layer in experiment.layers)
        _LOG.info('sparse: %s; %s', names, stats.dense_leaves(storage.masks(devices.shapes)))
    with _ended(config, checkpoints):
        make = lambda: devices.first(experiment.init, jax.random.key(config.seed))
        start, state, seconds = restored or (experiment.start_step, make(), 0.0)
        if restored is None and (network := run.initial or _first_network(run)) is not None:
            state = initial.begin(network, state, experiment, devices)
        sums = state_lib.NonzeroSums(state_lib.sizes(experiment, state), start, checkpoints.totals(start) if restored else None)
        if restored and start and hosts.is_host0():
            _LOG.info('resumed at step %d of %d.', start, experiment.total_steps)
        kernels = kernel_choice.LayerKernels(config, experiment, folder, start if restored else 0, devices)
        with hosts.Preemption() as preemption:
            state, seconds = _train_loop(
                run, checkpoints, kernels, state, start, seconds, sums, preemption, is_held, is_new=not restored
            )
            checkpoints.close()
        return finish(run, state, seconds, sums.mean_density(), start if restored else 0)


@contextlib.contextmanager
def _ended(config: config_lib.Config, checkpoints: checkpoint.Checkpoints) -> Iterator[None]:
    """What ends a run, with what it leaves and what would help."""
    try:
        yield
    except state_lib.NonFiniteError as error:
        raise state_lib.NonFiniteError(f'{error} {_saved(checkpoints)} The same command would end here again.') from None
    except checkpoint.SaveError as error:
        raise checkpoint.SaveError(f'{error} {_saved(checkpoints)} Where that is mended, the same command goes on.') from error
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise RuntimeError(f'{memory.exhausted(config, error)} {_saved(checkpoints)}') from error
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
    sums: state_lib.NonzeroSums,
    preemption: hosts.Preemption,
    is_held: Callable[[], bool],
    *,
    is_new: bool,
) -> tuple[state_lib.TrainState, float]:
    """Trains from the step after `start` to the last one; returns the state and the seconds spent on it since step 0."""
    config, experiment, devices = run.config, run.experiment, run.devices
    last, on_accelerator = experiment.total_steps, jax.default_backend() != 'cpu'
    programs = programs_lib.Programs(devices, experiment)
    evaluate: Any = devices.jit(experiment.evaluate)
    all_finite = devices.jit(_all_finite)
    part = next(part for part in PARTS if len(getattr(run.data, part).labels))
    eval_every = config.train.eval_every or experiment.steps_per_epoch
    batches = _batches(run, start, on_accelerator)
    log, settling = Log(run, state, start, is_new=is_new), memory.Settling()
    patterns, shapes = kernels.patterns(start, state), jax.tree.map(np.shape, state.params)
    begin = time.perf_counter()
    log.begin()
    try:
        for step in range(start + 1, last + 1):
            kind, batch = programs_lib.kind_of(experiment, step), next(batches)
            if on_accelerator and step == start + 1:
                programs.compile(programs_lib.ahead(experiment, start), state, batch, patterns)
            settling.before(kind)
            state = experiment.before_step(step, state)
            state, values = programs(kind, state, batch, patterns)
            state = experiment.after_step(step, state)
            settling.after(kind)
            log.step(step, values)
            checkpoints.check()
            if experiment.is_mask_update(step):
                if (now := jax.tree.map(np.shape, state.params)) != shapes:  # compact storage has made room
                    shapes = now
                    programs.forget()
                    evaluate.clear_cache()
                patterns = kernels.patterns(step, state)
                sizes = state_lib.sizes(experiment, state)
                sums.update(step, sizes)
                log.mask_update(step, state, sizes)
            if step % config.log.every == 0 or step == last:
                log.means(step)
            if step % eval_every == 0 or step == last:
                settling.before('evaluation')
                log.evaluation(step, part, evaluate_part(run, evaluate, state, part, patterns))
                settling.after('evaluation')
            stopping = preemption.reached(step) and step < last
            if not is_held():
                raise RuntimeError(
                    f'--workdir={run.folder} was removed, renamed or replaced while the run was going: stopped at step {step}, of which '
                    'nothing is saved. Put it back, and the same command goes on from its last checkpoint.'
                )
            if stopping or step % config.checkpoint.every == 0 or step == last:
                if not all_finite(state.params):
                    raise state_lib.NonFiniteError(f'a parameter is not finite after step {step}: lower optimizer.learning_rate.')
                settling.before('save')
                checkpoints.save(step, state, seconds + time.perf_counter() - begin, sums.after(step))
                settling.after('save')
            if stopping:
                checkpoints.close()
                by = preemption.signal
                raise hosts.Preempted(f'stopped by {by} after step {step}, which is saved: the same command goes on from there.')
    except Exception:
        if jax.process_count() == 1:
            checkpoints.wait()  # a save that goes on would be cut off where the process ends at once
        raise
    finally:
        programs.close()
        log.close()
    return state, seconds + time.perf_counter() - begin


def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def _batches(run: Run, start: int, on_accelerator: bool) -> Iterator[dict[str, Any]]:
    """Each batch from the one after `start` on; on an accelerator's memory before it is asked for."""
    size, seed = run.config.data.batch_size, run.config.seed
    first, stop = run.devices.rows(size)
    share: dict[str, int] = dict(process_index=first // (stop - first), process_count=size // (stop - first))
    batches = data_lib.batches(run.data, batch_size=size, seed=seed, num_batches=run.experiment.total_steps, **share)
    place = functools.partial(run.devices.batch, size=size)
    if on_accelerator:
        return data_lib.stream(batches.map(lambda rows: jax.device_put(place(rows))), start, run.config.data.prefetch)
    return map(place, data_lib.stream(batches, start, run.config.data.prefetch))
