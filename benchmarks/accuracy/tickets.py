"""One sparse training against prune-and-retrain cycles: accuracy and total cost of all that a method trains, paired by seed.

    python -m benchmarks.accuracy.tickets
    python -m benchmarks.accuracy.tickets --models=lenet5

On the offline digits, with 5 seeds: dense; sparse momentum, RigL and static; masks from a batch (SNIP, GraSP, SynFlow); equal inputs for every
output; one-shot pruning of the trained dense network, trained again by the whole schedule; and lottery tickets in one chain of 8 rounds,
rewound to step 0 and to a tenth of the training. LeNet-300-100 at 20, 5, 2 and 1%, LeNet-5 at 5 and 1% with a third of the steps; 2 of 4 and
1 of 4 inputs beside single weights at the same 50 and 25%. Gradients of missing weights are computed in the steps that need them only, for
sparse momentum the last 22 before each update. Operations and seconds are of everything that was trained for a row: one-shot and
tickets pay for the dense network, and a ticket for all rounds before it. Runs are kept in runs/tickets and go on where they were stopped.

Cost on two CPU cores: an hour and a half for LeNet-300-100, three hours for LeNet-5.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

import sparse_jax as sj
from benchmarks.accuracy import _runs
from sparse_jax import config as config_lib
from sparse_jax.export import files
from sparse_jax.train import exporting, lottery, sweep

DENSITIES = {'lenet300': (0.2, 0.05, 0.02, 0.01), 'lenet5': (0.05, 0.01)}
STEPS = {'lenet300': 4000, 'lenet5': 1320}
ROUNDS = (0.55, 0.33, 0.2, 0.1, 0.05, 0.032, 0.02, 0.01)
GROUPS = {'n_of_m:2:4': 0.5, 'n_of_m:1:4': 0.25}
METHODS = {
    'sparse momentum': ['--config.sparsity.method=sparse_momentum'],
    'RigL': ['--config.sparsity.method=rigl'],
    'static': ['--config.sparsity.method=static'],
    'SNIP': ['--config.sparsity.method=snip'],
    'GraSP': ['--config.sparsity.method=grasp'],
    'SynFlow': ['--config.sparsity.method=synflow'],
    'sparse momentum, equal inputs': ['--config.sparsity.granularity=fan_in'],
}
ONE_SHOT = 'one-shot, trained again'


class Cell(NamedTuple):
    """What one row comes to, an entry a seed."""

    accuracy: np.ndarray
    operations: np.ndarray
    seconds: np.ndarray


def _base(model: str, seed: int) -> list[str]:
    steps = [f'--config.train.steps={STEPS[model]}', f'--config.train.eval_every={STEPS[model]}']
    same = ['--config.sparsity.kernels=dense', '--config.optimizer.clip_norm=0.0']  # the same bits on every machine; as published
    return [f'--config=configs/mnist_{model}.py:offline', *same, *steps, f'--config.seed={seed}']


def _folder(root: pathlib.Path, model: str, row: str, density: float, seed: int) -> pathlib.Path:
    return root / f'{model}-{row.replace(" ", "_").replace(",", "").replace(":", "_")}-{density}-{seed}'


def _dense_layers(model: str, row: str) -> list[str]:
    """LeNet-5's first convolution has one input channel: it is in no group, and stays dense in the rows beside them too."""
    return ['--config.sparsity.dense=conv1/*'] if model == 'lenet5' and (row in GROUPS or row == 'single weights') else []


def _plain_runs(root: pathlib.Path, model: str, seeds: int) -> dict[pathlib.Path, list[str]]:
    """All trainings that stand alone."""
    runs = {}
    for seed in range(seeds):
        flags = _base(model, seed)
        runs[_folder(root, model, 'dense', 1, seed)] = [*flags, '--config.sparsity.method=dense']
        for row, own in METHODS.items():
            for density in DENSITIES[model]:
                runs[_folder(root, model, row, density, seed)] = [*flags, f'--config.sparsity.density={density}', *own]
        for row, density in GROUPS.items():
            for name, own in ((row, [f'--config.sparsity.granularity={row}']), ('single weights', [])):
                settings = [f'--config.sparsity.density={density}', *own, *_dense_layers(model, name)]
                runs[_folder(root, model, name, density, seed)] = [*flags, *settings]
    return runs


def _prune_once(root: pathlib.Path, model: str, density: float, seed: int) -> pathlib.Path:
    """The file of the trained dense network, pruned by one threshold over all layers."""
    path = root / f'{model}-pruned-{density}-{seed}.npz'
    if not path.exists():
        tree, _, _ = exporting.network(_config(model, seed), _folder(root, model, 'dense', 1, seed))
        pruned, masks = jax.device_get(sj.prune(tree, density, prune_scope='global'))
        files.save(path, pruned, masks, {'density': density})
    return path


def _config(model: str, seed: int) -> config_lib.Config:
    """The settings of the dense network."""
    first, *flags = [*_base(model, seed), '--config.sparsity.method=dense']
    config = importlib.import_module(f'configs.mnist_{model}').get_config(first.rpartition(':')[2])
    for flag in flags:
        name, _, value = flag.removeprefix('--config.').partition('=')
        config_lib.override(config, name, value)
    return config


def _one_shot_runs(root: pathlib.Path, model: str, seeds: int) -> dict[pathlib.Path, list[str]]:
    runs = {}
    for seed in range(seeds):
        for density in DENSITIES[model]:
            start = f'--init_from={_prune_once(root, model, density, seed)}'
            settings = ['--config.sparsity.method=static', f'--config.sparsity.density={_kept(root, model, density, seed)!r}']
            runs[_folder(root, model, ONE_SHOT, density, seed)] = [*_base(model, seed), *settings, start]
    return runs


def _kept(root: pathlib.Path, model: str, density: float, seed: int) -> float:
    """The density of the pruned network to the weight."""
    _, masks, _ = files.load(_prune_once(root, model, density, seed))
    sizes = [(int(m.sum()), m.size) for m in jax.tree.leaves(masks) if np.ndim(m)]
    return sum(n for n, _ in sizes) / sum(size for _, size in sizes)


def _tickets(root: pathlib.Path, model: str, rewind_step: int, seed: int) -> pathlib.Path:
    return root / f'{model}-tickets-{rewind_step}-{seed}'


def _ticket_runs(root: pathlib.Path, model: str, seeds: int) -> dict[pathlib.Path, list[str]]:
    rounds = ','.join(map(str, ROUNDS))
    mode = ['--mode=lottery', f'--rounds={rounds}', f'--config.sparsity.density={ROUNDS[-1]}']
    return {
        _tickets(root, model, step, seed): [*_base(model, seed), *mode, f'--rewind_step={step}']
        for seed in range(seeds)
        for step in (0, STEPS[model] // 10)
    }


def train(root: pathlib.Path, model: str, seeds: int, jobs: int) -> None:
    """Trains what is not there yet."""
    _runs.train_all(_plain_runs(root, model, seeds), jobs)
    _runs.train_all(_one_shot_runs(root, model, seeds), jobs)
    chains = {
        path: ['launch.py', *flags, '--config.checkpoint.keep=1', f'--workdir={path}']
        for path, flags in _ticket_runs(root, model, seeds).items()
    }
    if failed := sweep.run_all(chains, jobs, root / 'logs', lottery.TABLE)['failed']:
        raise RuntimeError('\n'.join(failed))


def _cell(results: list[dict[str, Any]], before: Cell | None = None) -> Cell:
    column = lambda key: np.array([result[key] for result in results], float)
    cell = Cell(column('test_accuracy'), column('operations_training'), column('seconds'))
    return cell if before is None else Cell(cell.accuracy, cell.operations + before.operations, cell.seconds + before.seconds)


def cells(root: pathlib.Path, model: str, seeds: int) -> dict[tuple[str, float], Cell]:
    """Every row at every density."""
    read = lambda row, density: [_runs.result(_folder(root, model, row, density, seed)) for seed in range(seeds)]
    dense = _cell(read('dense', 1))
    table = {('dense', 1.0): dense}
    for density in DENSITIES[model]:
        table |= {(row, density): _cell(read(row, density)) for row in METHODS}
        table[ONE_SHOT, density] = _cell(read(ONE_SHOT, density), dense)
        for step in (0, STEPS[model] // 10):
            chains = [
                json.loads((_tickets(root, model, step, seed) / lottery.TABLE).read_text())['rounds'] for seed in range(seeds)
            ]
            rounds = [next(r for r in chain if abs(r['density'] - density) < 1e-3) for chain in chains]
            of = lambda key, rounds=rounds: np.array([r[key] for r in rounds])
            name = f'lottery tickets, rewound to step {step}'
            table[name, density] = Cell(of('score'), of('operations'), of('seconds'))
    for row, density in GROUPS.items():
        table |= {(name, density): _cell(read(name, density)) for name in ('single weights', row)}
    return table


def markdown(table: dict[tuple[str, float], Cell]) -> str:
    """The table: accuracy, the paired difference to dense, and the whole cost."""
    dense = table['dense', 1.0]
    lines = [
        '| density | method | test accuracy % (standard error) | minus dense, points (95% interval) | operations of all trainings, dense = 1 '
        '| seconds of all trainings |',
        '|---|---|---|---|---|---|',
    ]
    for (row, density), cell in table.items():
        difference = 100 * (cell.accuracy - dense.accuracy)
        half = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
        versus = (
            '' if row == 'dense' else f'{difference.mean():+.2f} ({difference.mean() - half:.2f} to {difference.mean() + half:.2f})'
        )
        accuracy = f'{100 * cell.accuracy.mean():.2f} ({100 * stats.sem(cell.accuracy):.2f})'
        cost = f'{(cell.operations / dense.operations).mean():.2f} | {cell.seconds.mean():.0f}'
        lines.append(f'| {density:.0%} | {row} | {accuracy} | {versus} | {cost} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', type=pathlib.Path, default=pathlib.Path('runs/tickets'))
    parser.add_argument('--models', default='lenet300', help='lenet300, lenet5 or both, separated by commas')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--jobs', type=int, default=min(2, os.cpu_count() or 1), help='runs at a time, each on one core')
    args = parser.parse_args()
    for model in args.models.split(','):
        if model not in DENSITIES:
            sys.exit(f'--models={model}: must be lenet300 or lenet5.')
        train(args.root, model, args.seeds, args.jobs)
        print(f'\n{model}\n\n{markdown(cells(args.root, model, args.seeds))}')


if __name__ == '__main__':
    main()
