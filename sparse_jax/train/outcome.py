"""What a run gives: loss and accuracy of a part of the data, and at its end result.json, run.json and report.png."""

import datetime
import json
import math
import platform
import resource
import socket
import sys
from typing import Any

import jax
import numpy as np

import sparse_jax as sj
from sparse_jax.report import run_report
from sparse_jax.runtime import hosts, workdir
from sparse_jax.train import kernel_choice, metrics
from sparse_jax.train import state as state_lib
from sparse_jax.train.run import Run

PARTS = ('validation', 'test')


def evaluate_part(run: Run, evaluate, state, part: str, patterns=None) -> dict[str, float]:
    """Mean loss and accuracy over a part of the data; of text per token, and in bits a byte."""
    data, devices, size = run.data, run.devices, run.devices.padded(run.config.data.eval_batch_size)
    split, sums = getattr(data, part), []
    for i in range(0, len(split.labels), size):
        filled = devices.padded(min(size, len(split.labels) - i))
        rows = slice(*(min(i + row, len(split.labels)) for row in devices.rows(filled)))
        batch = {'input': data.prepare(split.inputs[rows]), 'label': split.labels[rows].astype(np.int32)}
        start, stop = devices.rows(filled)
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


def results(run: Run, state) -> dict[str, float]:
    """Loss and accuracy of each part of the data that there is; of text also by the name eval_loss."""
    evaluate = run.devices.jit(run.experiment.evaluate)
    result = {}
    for part in PARTS:
        if len(getattr(run.data, part).labels):
            result |= {f'{part}_{k}': v for k, v in evaluate_part(run, evaluate, state, part).items()}
    if run.data.bytes_per_token is not None:
        result['eval_loss'] = result['validation_loss']
    return result


def finish(run: Run, state, seconds: float, start: int) -> dict[str, Any]:
    """Writes and prints what a run gives, on the first host; the content of result.json, on all."""
    config, folder, data, experiment = run[:4]
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
        **results(run, state),
    }
    rows = metrics.read(folder) if hosts.is_first() else []
    # on all hosts, since it counts sharded masks; what the others make of no rows is not used
    density = _mean_density(rows, experiment.total_steps) if rows else dict.fromkeys(sizes.layers, 1.0)
    masks = None if config.sparsity.method == 'dense' else run.devices.host(sj.get_masks(state.opt_state))
    result |= state_lib.operations(experiment, state, density, masks)
    if masks is not None:
        result['exploration_rate'] = sj.stats.exploration_rate(state.opt_state)
    result |= {'seconds': round(seconds, 3), 'steps_per_second': round(experiment.total_steps / max(seconds, 1e-9), 3)}
    hosts.first(_report, run, result, rows, _input_counts(run, state), start)
    return json.loads((folder / 'result.json').read_text())


def _report(run: Run, result, rows, input_counts, start) -> None:
    """Writes and prints what is left of a run."""
    config, folder, devices = run.config, run.folder, run.devices
    sparse_size = sum(size for _, size in result['layers'].values())
    run_report.draw(
        folder / 'report.png',
        rows,
        title=f'{config.model.name}, {config.sparsity.method}: {run_report.headline(result)} with {result["nonzeros"]:,} of '
        f'{sparse_size:,} weights',
        input_counts=input_counts,
    )
    workdir.write_json(
        folder / 'run.json',
        {
            'finished': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
            'resumed_at': start,
            'host': socket.gethostname(),
            'platform': platform.platform(),
            'device': jax.devices()[0].device_kind,
            'devices': jax.device_count() if devices.mesh else 1,
            'processes': jax.process_count(),
            'mesh': dict(devices.mesh.shape) if devices.mesh else None,
            'jax': jax.__version__,
            'python': sys.version.split()[0],
            'max_memory_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        },
    )
    workdir.write_json(folder / 'result.json', result)  # last: its presence says that the run is finished
    kernel_choice.print_table(config, folder)
    run_report.print_table(result)


def _mean_density(rows, total_steps: int) -> dict[str, float]:
    """Density of each layer on average over the steps, from the lines that say what it was from a step on."""
    at = [(row['step'], row['density']) for row in rows if 'density' in row]
    ends = [step for step, _ in at[1:]] + [total_steps]
    names = at[0][1] if at else {}
    return {name: sum(d[name] * (end - step) for (step, d), end in zip(at, ends, strict=True)) / total_steps for name in names}


def _input_counts(run: Run, state) -> np.ndarray | None:
    """Weights that each pixel of the image kept, where the first layer takes the image as a vector."""
    if run.config.model.name != 'lenet300' or run.config.sparsity.method == 'dense':
        return None
    mask = sj.get_masks(state.opt_state)['fc1']['kernel']
    if mask.ndim == 0:
        return None
    return run.devices.host(mask.sum(axis=1)).reshape(run.data.input_shape).sum(axis=-1)
