"""Test accuracy against wall clock with all costs included: dense (ours and PyTorch's), masked sparse, and sparse on the kernels.

    python -m benchmarks.accuracy.time_to_accuracy --torch_python=PYTHON

It trains LeNet-5 and VGG-D on the offline digits, one run at a time on all cores. Each run is a separate process, whose whole life is
timed: imports, data, compilation, measuring kernels, evaluations and checkpoints count (PyTorch gets prepared arrays and parameters
and saves nothing). The table has the seconds until a test accuracy was first reached; the figure goes to runs/time_to_accuracy/. All
contenders have the same settings, and PyTorch starts from our initial parameters. Cost: ten minutes on two cores.
"""

import argparse
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from sparse_jax import config as config_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.launch import allocator
from sparse_jax.train import run as run_lib

NETWORKS: dict[str, dict[str, Any]] = {
    'vgg_d': dict(
        config='configs/cifar10_vgg_d.py:offline',
        settings={
            'data.batch_size': 64,
            'train.epochs': 6,
            'data.augment': False,
            'sparsity.update_every': 62,
            'train.eval_every': 31,
        },
        targets=(0.9, 0.95),
    ),
    'lenet5': dict(
        config='configs/mnist_lenet5.py:offline',
        settings={'train.steps': 2000, 'train.eval_every': 40},
        targets=(0.9, 0.95),
    ),
}
# settings of the run by contender; None: PyTorch
CONTENDERS = {
    'dense, PyTorch': None,
    'dense, ours': {'sparsity.method': 'dense'},
    'sparse at 5%, masked': {'sparsity.kernels': 'dense'},
    'sparse at 5%, kernels': {},
}


def _config(network: str, settings: dict[str, Any]) -> tuple[config_lib.Config, list[str]]:
    """Returns the config of a run, and the same as flags of launch.py."""
    row = NETWORKS[network]
    values = row['settings'] | settings | {'checkpoint.every': 10**6, 'checkpoint.keep': 1}
    path, variant = row['config'].split(':')
    config = importlib.import_module(path.removesuffix('.py').replace('/', '.')).get_config(variant)
    for key, value in values.items():
        section, field = key.split('.')
        setattr(getattr(config, section), field, value)
    flags = [f'--config={row["config"]}', *(f'--config.{key}={value}' for key, value in values.items())]
    return config, flags


def _prepare_torch(network: str, folder: pathlib.Path) -> None:
    """Writes the data, initial parameters and settings that torch_training.py reads."""
    config, _ = _config(network, {'sparsity.method': 'dense'})
    data = run_lib.load_data(config)
    experiment = run_lib.create_experiment(config, data)
    params = jax.device_get(jax.jit(experiment.init)(jax.random.key(config.seed)).params)
    np.savez(folder / 'params.npz', **dict(layers_lib.leaf_paths(params)))
    arrays = {
        'x': data.prepare(data.train.inputs),
        'y': data.train.labels,
        'test_x': data.prepare(data.test.inputs),
        'test_y': data.test.labels,
    }
    np.savez(folder / 'data.npz', **arrays)  # type: ignore[arg-type]
    keys = ('learning_rate', 'schedule', 'decay_every', 'decay_factor', 'momentum', 'weight_decay', 'clip_norm')
    settings: dict[str, Any] = {key: getattr(config.optimizer, key) for key in keys}
    settings |= {'model': network, 'steps': experiment.total_steps, 'eval_every': config.train.eval_every}
    settings |= {'batch_size': config.data.batch_size, 'seed': config.seed}
    (folder / 'settings.json').write_text(json.dumps(settings))


def run(network: str, contender: str, folder: pathlib.Path, torch_python: str) -> dict[str, Any]:
    """Runs one contender; returns its points (seconds since its process was started, test accuracy) and its total seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = CONTENDERS[contender]
    environment = dict(os.environ)
    if settings is None:
        folder.mkdir(parents=True)
        _prepare_torch(network, folder)
        command = [torch_python, '-m', 'benchmarks.accuracy.torch_training', str(folder)]
        environment['GLIBC_TUNABLES'] = allocator.MALLOC  # PyTorch is faster with it too
    else:
        command = [sys.executable, 'launch.py', *_config(network, settings)[1], f'--workdir={folder}']
    points, num_read, metrics = [], 0, folder / 'metrics.jsonl'
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while True:
        ended = process.poll() is not None
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        complete = [line for line in lines if line.endswith('\n')]
        for row in map(json.loads, complete[num_read:]):
            if 'test_accuracy' in row:
                points.append((time.perf_counter() - begin, row['test_accuracy']))
        num_read = len(complete)
        if ended:
            break
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f'error: {contender} of {network} failed:\n{process.stderr.read()}')  # type: ignore[union-attr]
    return {'network': network, 'contender': contender, 'seconds': time.perf_counter() - begin, 'points': points}


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as a Markdown table."""
    lines = ['| network | contender | best test accuracy | seconds to 90% | to 95% | to the end |', '|---|---|---:|---:|---:|---:|']
    for row in rows:
        cells = [row['network'], row['contender'], f'{100 * max(accuracy for _, accuracy in row["points"]):.1f}%']
        for target in NETWORKS[row['network']]['targets']:
            first = next((seconds for seconds, accuracy in row['points'] if accuracy >= target), None)
            cells.append('not reached' if first is None else f'{first:.1f}')
        lines.append('| ' + ' | '.join([*cells, f'{row["seconds"]:.1f}']) + ' |')
    return '\n'.join(lines)


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws accuracy against wall clock, with one line per contender."""
    networks = list(dict.fromkeys(row['network'] for row in rows))
    figure, axes = plt.subplots(1, len(networks), figsize=(5.6 * len(networks), 4.2), layout='constrained', squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        for row in rows:
            if row['network'] == network:
                seconds, accuracy = zip(*row['points'], strict=True)
                axis.plot(seconds, [100 * a for a in accuracy], marker='.', label=row['contender'])
        axis.set_title(network)
        axis.set_xlabel('seconds since the process was started')
        axis.set_ylabel('test accuracy, %')
        axis.set_ylim(50, 100)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(loc='lower right')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--networks', default=','.join(NETWORKS))
    parser.add_argument('--torch_python', default='', help='a Python with torch installed; by default PyTorch is left out')
    parser.add_argument('--root', type=pathlib.Path, default=pathlib.Path('runs/time_to_accuracy'))
    args = parser.parse_args()
    if unknown := set(args.networks.split(',')) - set(NETWORKS):
        parser.error(f'argument --networks: {", ".join(sorted(unknown))} is not one of {", ".join(NETWORKS)}')
    rows = []
    for network in args.networks.split(','):
        for contender, settings in CONTENDERS.items():
            if settings is None and not args.torch_python:
                continue
            folder = args.root / f'{network}-{contender.replace(",", "").replace(" ", "-").replace("%", "")}'
            rows.append(run(network, contender, folder, args.torch_python))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    (args.root / 'points.json').write_text(json.dumps(rows))
    draw(rows, args.root / 'time_to_accuracy.png')


if __name__ == '__main__':
    main()
