"""Both LeNets on the offline digits: several densities against the dense twin, paired by seed.

    python -m benchmarks.accuracy.lenets

It trains 2 networks x 6 densities x 5 seeds with launch.py, two at a time, into runs/lenets (finished runs are kept, so that it can be
resumed), and prints a Markdown table. Cost: about an hour on two CPU cores; --models=lenet300: six minutes.
"""

import argparse
import os
import pathlib

import numpy as np
from scipy import stats

from benchmarks.accuracy import _runs

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 1.0)  # 1.0: the dense twin


def workdir(root: pathlib.Path, model: str, density: float, seed: int) -> pathlib.Path:
    return root / f'{model}-{"dense" if density == 1 else density}-{seed}'


def table(root: pathlib.Path, models: list[str], seeds: int) -> str:
    """Formats a Markdown table: mean test accuracy with standard error, and the difference to dense with 95% interval (Student's t)."""
    lines = [
        '| network | density | nonzeros | test accuracy % (standard error) | dense minus this, points (95% interval) |',
        '|---|---|---|---|---|',
    ]
    for model in models:
        accuracy, nonzeros = {}, {}
        for density in DENSITIES:
            results = [_runs.result(workdir(root, model, density, s)) for s in range(seeds)]
            accuracy[density] = 100 * np.array([r['test_accuracy'] for r in results])
            nonzeros[density] = {r['nonzeros'] for r in results}
        for density in DENSITIES:
            mean, error = accuracy[density].mean(), stats.sem(accuracy[density])
            difference = accuracy[1.0] - accuracy[density]
            half = stats.t.ppf(0.975, seeds - 1) * stats.sem(difference)
            versus = (
                ''
                if density == 1
                else f'{difference.mean():.2f} ({difference.mean() - half:.2f} to {difference.mean() + half:.2f})'
            )
            name = 'dense' if density == 1 else f'{density:.0%}'
            count = ', '.join(f'{n:,}' for n in nonzeros[density])
            lines.append(f'| {model} | {name} | {count} | {mean:.2f} ({error:.2f}) | {versus} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', type=pathlib.Path, default=pathlib.Path('runs/lenets'))
    parser.add_argument('--models', default='lenet300,lenet5', help='which networks, separated by commas')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--jobs', type=int, default=min(2, os.cpu_count() or 1), help='runs at a time, each on one core')
    parser.add_argument('extra', nargs='*', help='further flags of launch.py, after --')
    args = parser.parse_args()
    models = args.models.split(',')
    _runs.train_all(
        {
            workdir(args.root, model, density, seed): [
                f'--config=configs/mnist_{model}.py:offline',
                '--config.sparsity.method=dense' if density == 1 else f'--config.sparsity.density={density}',
                f'--config.seed={seed}',
                *_runs.AS_PUBLISHED,
                *args.extra,
            ]
            for model in models
            for density in DENSITIES
            for seed in range(args.seeds)
        },
        args.jobs,
    )
    print(table(args.root, models, args.seeds))


if __name__ == '__main__':
    main()
