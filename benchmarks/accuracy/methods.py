"""All methods on LeNet-300-100 and the offline digits, and sparse momentum in blocks: accuracy and operations, paired by seed.

    python -m benchmarks.accuracy.methods

It trains dense, 9 methods x 3 densities and 4 block sizes x 3 densities with 5 seeds each (200 runs of launch.py, two at a time, into
runs/methods; finished runs are kept, so that it can be resumed), and prints two Markdown tables. Cost: about half an hour on two CPU
cores.
"""

import argparse
import os
import pathlib

import numpy as np
from scipy import stats

from benchmarks.accuracy import _runs

DENSITIES = (0.05, 0.02, 0.01)
# flags of launch.py by row of the table
METHODS = {
    'sparse momentum': ['--config.sparsity.method=sparse_momentum'],
    'SNFS with redistribution': ['--config.sparsity.method=snfs', '--config.sparsity.redistribute=mean_momentum'],
    'SNFS': ['--config.sparsity.method=snfs'],
    'RigL': ['--config.sparsity.method=rigl'],
    'SET': ['--config.sparsity.method=set'],
    'DSR': ['--config.sparsity.method=dsr'],
    'GraNet': ['--config.sparsity.method=granet'],
    'GMP': ['--config.sparsity.method=gmp'],
    'static': ['--config.sparsity.method=static'],
}
# The output layer, 100 x 10, is smaller than the largest block, so it is dense in all four rows.
BLOCKS = {
    size: [f'--config.sparsity.granularity=block:{size}', '--config.sparsity.dense=fc3/*']
    for size in ('1x1', '4x4', '8x8', '16x16')
}


def _folder(root: pathlib.Path, row: str, density: float, seed: int) -> pathlib.Path:
    return root / f'{row.replace(" ", "_")}-{density}-{seed}'


def _all_runs(root: pathlib.Path, seeds: int, extra: list[str]) -> dict[pathlib.Path, list[str]]:
    base = ['--config=configs/mnist_lenet300.py:offline', *_runs.AS_PUBLISHED, *extra]
    runs = {}
    for seed in range(seeds):
        flags = [*base, f'--config.seed={seed}']
        runs[_folder(root, 'dense', 1, seed)] = [*flags, '--config.sparsity.method=dense']
        for density in DENSITIES:
            for row, row_flags in {**METHODS, **BLOCKS}.items():
                runs[_folder(root, row, density, seed)] = [*flags, f'--config.sparsity.density={density}', *row_flags]
    return runs


def _column(root: pathlib.Path, row: str, density: float, seeds: int, key: str) -> np.ndarray:
    return np.array([_runs.result(_folder(root, row, density, seed))[key] for seed in range(seeds)])


def _difference(values: np.ndarray, reference: np.ndarray) -> str:
    """Formats the mean of the paired differences in percentage points with its 95% interval (Student's t)."""
    difference = 100 * (values - reference)
    half = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
    return f'{difference.mean():+.2f} ({difference.mean() - half:.2f} to {difference.mean() + half:.2f})'


def table(root: pathlib.Path, rows, reference: str, seeds: int, title: str) -> str:
    """Formats a Markdown table: test accuracy by density, its difference to the reference row, and the operations against dense."""
    dense = 100 * _column(root, 'dense', 1, seeds, 'test_accuracy')
    lines = [
        f'| {title} | density | nonzeros | test accuracy % (standard error) | minus {reference}, points (95% interval) '
        '| operations of training, inference against dense |',
        '|---|---|---|---|---|---|',
        f'| dense | 100% | | {dense.mean():.2f} ({stats.sem(dense):.2f}) | | 100%, 100% |',
    ]
    for density in DENSITIES:
        other = _column(root, reference, density, seeds, 'test_accuracy')
        for row in rows:
            accuracy = _column(root, row, density, seeds, 'test_accuracy')
            nonzeros = sorted(set(_column(root, row, density, seeds, 'nonzeros').tolist()))
            cost = [
                f'{100 * _column(root, row, density, seeds, f"operations_{part}_against_dense").mean():.1f}%'
                for part in ('training', 'inference')
            ]
            number = f'{nonzeros[0]:,}' if len(nonzeros) == 1 else f'{nonzeros[0]:,} to {nonzeros[-1]:,}'
            lines.append(
                f'| {row} | {density:.0%} | {number} | {100 * accuracy.mean():.2f} ({100 * stats.sem(accuracy):.2f}) '
                f'| {"" if row == reference else _difference(accuracy, other)} | {", ".join(cost)} |'
            )
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', type=pathlib.Path, default=pathlib.Path('runs/methods'))
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--jobs', type=int, default=min(2, os.cpu_count() or 1), help='runs at a time, each on one core')
    parser.add_argument('extra', nargs='*', help='further flags of launch.py, after --')
    args = parser.parse_args()
    _runs.train_all(_all_runs(args.root, args.seeds, args.extra), args.jobs)
    print(table(args.root, METHODS, 'static', args.seeds, 'method'))
    print()
    print(table(args.root, BLOCKS, '1x1', args.seeds, 'sparse momentum in blocks of'))


if __name__ == '__main__':
    main()
