"""Loss and accuracy of a state on the parts of the data that are not trained on, and of a workdir's newest checkpoint."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparse_jax import config as config_lib
from sparse_jax.runtime import checkpoint, hosts, workdir
from sparse_jax.train import state as state_lib
from sparse_jax.train.run import Run, check_identity, prepare

PARTS = ('validation', 'test')


def evaluate_part(
    run: Run, evaluate: Callable[..., Any], state: state_lib.TrainState, part: str, patterns: Any = None
) -> dict[str, float]:
    """Mean loss and accuracy over a part of the data; of text per token, and in bits a byte.

    Args:
      run: whose data it is.
      evaluate: the experiment's, jitted.
      state: to evaluate.
      part: one of PARTS, which the data has.
      patterns: of the state's masks; None: all products are dense.

    Returns:
      ``loss``, ``accuracy``, and of text ``bits_per_byte``.
    """
    data, devices, size = run.data, run.devices, run.devices.padded(run.config.data.eval_batch_size)
    split, sums = getattr(data, part), []
    for i in range(0, len(split.labels), size):
        filled = devices.padded(min(size, len(split.labels) - i))
        start, stop = devices.rows(filled)
        rows = slice(*(min(i + row, len(split.labels)) for row in (start, stop)))
        batch = {'input': data.prepare(split.inputs[rows]), 'label': split.labels[rows].astype(np.int32)}
        if missing := stop - start - len(batch['label']):  # rows that fill up: with the label -1 they do not count
            ends = {'input': 0, 'label': -1}
            batch = {k: np.concatenate([x, np.full((missing, *x.shape[1:]), ends[k], x.dtype)]) for k, x in batch.items()}
        sums.append(evaluate(state, devices.batch(batch, filled), patterns))
    sums = jax.device_get(sums)
    loss = float(sum(s['loss'] for s in sums)) / split.labels.size
    values = {'loss': loss, 'accuracy': int(sum(s['correct'] for s in sums)) / split.labels.size}
    if data.bytes_per_token is not None:
        values['bits_per_byte'] = loss / math.log(2) / data.bytes_per_token
    return values


def results(run: Run, state: state_lib.TrainState) -> dict[str, float]:
    """Loss and accuracy of each part of the data that there is; of text also by the name eval_loss."""
    evaluate_batch = run.devices.jit(run.experiment.evaluate)
    values = {}
    for part in PARTS:
        if len(getattr(run.data, part).labels):
            values |= {f'{part}_{k}': v for k, v in evaluate_part(run, evaluate_batch, state, part).items()}
    if run.data.bytes_per_token is not None:
        values['eval_loss'] = values['validation_loss']
    return values


def evaluate(config: config_lib.Config, folder: pathlib.Path) -> dict[str, Any]:
    """Evaluates a workdir's newest checkpoint, and prints the result as JSON. Writes nothing.

    Args:
      config: the settings, the same as it was trained with.
      folder: the workdir.

    Returns:
      Loss and accuracy on the test examples (and on the validation examples, where there are any), the step and the sizes.

    Raises:
      ValueError: if there is no checkpoint, or it is damaged, or of another experiment.
    """
    run, step, state = restored(config, folder)
    sizes = state_lib.sizes(run.experiment, state)
    result = {'step': step, 'nonzeros': sizes.nonzeros, 'density': sizes.density, **results(run, state)}
    if hosts.is_host0():
        print(json.dumps(result, indent=2))
    return result


def restored(config: config_lib.Config, folder: pathlib.Path) -> tuple[Run, int, state_lib.TrainState]:
    """A workdir's run, and its newest checkpoint's step and state, of which nothing is changed. Raises as :func:`evaluate`."""
    workdir.check_name(folder)
    if not (folder / 'checkpoints').is_dir():
        raise ValueError(f'--workdir={folder} has no checkpoint: train first, with --mode=train.')
    hosts.run_on_all_hosts(check_identity, config, folder)
    run = prepare(config, folder)
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', read_only=True)
    step = checkpoints.latest_step()
    if step is None:
        raise ValueError(f'--workdir={folder} has no complete checkpoint: train first, with --mode=train.')
    state, _ = checkpoints.restore(step, run.devices.shapes_after, run.experiment.layer_codes)
    checkpoints.close()
    return run, step, state
