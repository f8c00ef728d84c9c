"""Runs an experiment in a workdir: trains or goes on, shows progress, saves, and ends with result.json and report.png."""

import datetime
import json
import math
import pathlib
import platform
import resource
import socket
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax as sj
from sparse_jax import config as config_lib
from sparse_jax import data as data_lib
from sparse_jax.train import checkpoint, layer_kernels, metrics, report, workdir
from sparse_jax.train import state as state_lib

PARTS = ('validation', 'test')


class NonFiniteError(RuntimeError):
    """The loss or a parameter is NaN or infinite: the run cannot go on."""


def load_data(config: config_lib.Config) -> data_lib.Dataset:
    """The data set that a config names."""
    d = config.data
    text: dict[str, Any] = dict(pattern=d.pattern, tokenizer=d.tokenizer, length=d.length)
    return data_lib.load(d.name, d.dir, download=d.download, validation=d.validation, augment=d.augment, **text)


def create_experiment(config: config_lib.Config, data: data_lib.Dataset) -> state_lib.Experiment:
    """The experiment that a config describes, on its data."""
    return state_lib.create(config, num_examples=len(data.train.labels), input_shape=data.input_shape, num_outputs=data.num_outputs)


def check(config: config_lib.Config, folder: pathlib.Path) -> None:
    """What can be told to be wrong without the data; ValueError."""
    config_lib.validate(config)
    state_lib.check_names(config)
    workdir.check(config, folder)
    layer_kernels.check(config)
    if config.log.tensorboard:
        metrics.check_tensorboard()


def _prepare(config: config_lib.Config, folder: pathlib.Path) -> tuple[data_lib.Dataset, state_lib.Experiment]:
    """Everything that can be wrong with the input is found here, before a file is made in the workdir."""
    check(config, folder)
    data = load_data(config)
    workdir.check_data(folder, data.fingerprint)
    return data, create_experiment(config, data)


def _evaluate(config: config_lib.Config, evaluate, state, data: data_lib.Dataset, part: str, patterns=None) -> dict[str, float]:
    """Mean loss and accuracy over a part of the data; of text per token, and in bits a byte."""
    split, size = getattr(data, part), config.data.eval_batch_size
    sums = []
    for i in range(0, len(split.labels), size):
        batch = {'input': data.prepare(split.inputs[i : i + size]), 'label': split.labels[i : i + size].astype(np.int32)}
        sums.append(evaluate(state, batch, patterns))
    sums = jax.device_get(sums)
    loss = float(sum(s['loss'] for s in sums)) / split.labels.size
    values = {'loss': loss, 'accuracy': int(sum(s['correct'] for s in sums)) / split.labels.size}
    if data.bytes_per_token is not None:
        values['bits_per_byte'] = loss / math.log(2) / data.bytes_per_token
    return values


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


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
    config_lib.validate(config)
    workdir.check(config, folder)
    if (folder / 'result.json').exists():
        result = json.loads((folder / 'result.json').read_text())
        layer_kernels.print_table(config, folder)
        report.print_table(result)
        return result
    data, experiment = _prepare(config, folder)
    with workdir.locked(folder):
        workdir.check(config, folder)  # once more, now that nobody else can write there
        return _train_or_go_on(config, folder, data, experiment)


def _train_or_go_on(config, folder, data, experiment) -> dict[str, Any]:
    workdir.write_json(folder / 'config.json', config_lib.identity(config))
    if data.fingerprint:
        workdir.write_json(folder / 'data.json', {'fingerprint': data.fingerprint})

    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=config.checkpoint.keep)
    init = jax.jit(experiment.init)
    key = jax.random.key(config.seed)
    start = checkpoints.latest_step() or 0
    if start:
        state, seconds = checkpoints.restore(start, jax.eval_shape(init, key))
    else:
        state, seconds = init(key), 0.0
    try:
        kernels = layer_kernels.LayerKernels(config, experiment, folder, start)
        state, seconds = _train_loop(config, folder, data, experiment, checkpoints, kernels, state, start, seconds)
        checkpoints.close()
        return _finish(config, folder, data, experiment, state, seconds, start)
    except ValueError as error:  # no longer the input's fault
        raise RuntimeError(f'the run failed: {error}') from error


def _train_loop(config, folder, data, experiment, checkpoints, kernels, state, start, seconds):
    train_step = jax.jit(experiment.train_step, donate_argnums=0, static_argnames='dense_gradients')
    evaluate = jax.jit(experiment.evaluate)
    part = next(part for part in PARTS if len(getattr(data, part).labels))
    batches = data_lib.batches(data, batch_size=config.data.batch_size, seed=config.seed, num_batches=experiment.total_steps)
    drawn = data_lib.stream(batches, start, config.data.prefetch)
    eval_every = config.train.eval_every or experiment.steps_per_epoch
    layers = state_lib.sizes(experiment, state).layers
    writer = metrics.Writer(folder, step=start, tensorboard=config.log.tensorboard)
    progress = metrics.Progress(experiment.total_steps, start)
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
            state, values = train_step(state, next(drawn), patterns, dense_gradients=dense)
            step_metrics.add(step, values)
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
                numbers = {**means, 'learning_rate': float(experiment.learning_rate(step - 1))}
                if experiment.prune_rate is not None:
                    numbers['prune_rate'] = float(experiment.prune_rate(step))
                writer.write(step, {**numbers, 'steps_per_second': (step - last_step) / (now - last_time)})
                last_step, last_time = step, now
                shown |= means
                progress.show(step, shown)
            if step % eval_every == 0 or step == experiment.total_steps:
                values = {f'{part}_{k}': v for k, v in _evaluate(config, evaluate, state, data, part, patterns).items()}
                writer.write(step, values)
                shown |= {f'{part}_accuracy': values[f'{part}_accuracy']}
            if step % config.checkpoint.every == 0 or step == experiment.total_steps:
                if not _all_finite(state.params):
                    raise NonFiniteError(f'a parameter is not finite after step {step}: lower optimizer.learning_rate.')
                checkpoints.save(step, state, seconds + time.perf_counter() - begin)
    finally:
        progress.close()
        writer.close()
    return state, seconds + time.perf_counter() - begin


def _results(config, data, experiment, state) -> dict[str, float]:
    """Loss and accuracy of each part of the data that there is; of text also by the name eval_loss."""
    evaluate = jax.jit(experiment.evaluate)
    result = {}
    for part in PARTS:
        if len(getattr(data, part).labels):
            result |= {f'{part}_{k}': v for k, v in _evaluate(config, evaluate, state, data, part).items()}
    if data.bytes_per_token is not None:
        result['eval_loss'] = result['validation_loss']
    return result


def _finish(config, folder, data, experiment, state, seconds, start) -> dict[str, Any]:
    sizes = state_lib.sizes(experiment, state)
    result = {
        'model': config.model.name,
        'data': config.data.name,
        'method': config.sparsity.method,
        'steps': experiment.total_steps,
        'parameters': sizes.parameters,
        'nonzeros': sizes.nonzeros,
        'density': sizes.density,
        'layers': sizes.layers,
        **({'data_fingerprint': data.fingerprint} if data.fingerprint else {}),
        **_results(config, data, experiment, state),
    }
    rows = metrics.read(folder)
    result |= state_lib.operations(experiment, state, _mean_density(rows, experiment.total_steps))
    if config.sparsity.method != 'dense':
        result['exploration_rate'] = sj.stats.exploration_rate(state.opt_state)
    result |= {'seconds': round(seconds, 3), 'steps_per_second': round(experiment.total_steps / max(seconds, 1e-9), 3)}
    report.draw(
        folder / 'report.png',
        rows,
        title=f'{config.model.name}, {config.sparsity.method}: {report.headline(result)} with {sizes.nonzeros:,} of '
        f'{sizes.sparse_size:,} weights',
        input_counts=_input_counts(config, state, data.input_shape),
    )
    workdir.write_json(
        folder / 'run.json',
        {
            'finished': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
            'resumed_at': start,
            'host': socket.gethostname(),
            'platform': platform.platform(),
            'device': jax.devices()[0].device_kind,
            'jax': jax.__version__,
            'python': sys.version.split()[0],
            'max_memory_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        },
    )
    workdir.write_json(folder / 'result.json', result)  # last: its presence says that the run is finished
    layer_kernels.print_table(config, folder)
    report.print_table(result)
    return result


def _mean_density(rows, total_steps: int) -> dict[str, float]:
    """Density of each layer on average over the steps, from the lines that say what it was from a step on."""
    at = [(row['step'], row['density']) for row in rows if 'density' in row]
    ends = [step for step, _ in at[1:]] + [total_steps]
    names = at[0][1] if at else {}
    return {name: sum(d[name] * (end - step) for (step, d), end in zip(at, ends, strict=True)) / total_steps for name in names}


def _input_counts(config, state, image_shape) -> np.ndarray | None:
    """Weights that each pixel of the image kept, where the first layer takes the image as a vector."""
    if config.model.name != 'lenet300' or config.sparsity.method == 'dense':
        return None
    mask = np.asarray(sj.get_masks(state.opt_state)['fc1']['kernel'])
    if mask.ndim == 0:
        return None
    return mask.sum(axis=1).reshape(image_shape).sum(axis=-1)


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
    data, experiment = _prepare(config, folder)
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', read_only=True)
    step = checkpoints.latest_step()
    if step is None:
        raise ValueError(f'--workdir={folder} has no complete checkpoint: train first, with --mode=train.')
    state, _ = checkpoints.restore(step, jax.eval_shape(experiment.init, jax.random.key(config.seed)))
    checkpoints.close()
    sizes = state_lib.sizes(experiment, state)
    result = {'step': step, 'nonzeros': sizes.nonzeros, 'density': sizes.density, **_results(config, data, experiment, state)}
    print(json.dumps(result, indent=2))
    return result
