"""LeNet-5 at 5% on the sparse kernels that are measured fastest, against masked dense products: accuracy and time, paired by seed.

    python -m benchmarks.accuracy.kernels

It trains on the offline digits with launch.py, one run at a time on all cores, into runs/kernels (finished runs are kept): masked with
dense gradients in every step, masked with a window of 22 steps, and with that window on the fastest kernels. Cost: 25 minutes on two
CPU cores.
"""

import argparse
import json
import pathlib

import numpy as np
from scipy import stats

from benchmarks.accuracy import _runs

ROWS = {
    'masked, all gradients dense': ['--config.sparsity.dense_gradient_window=None', '--config.sparsity.kernels=dense'],
    'masked, window of 22': ['--config.sparsity.kernels=dense'],
    'kernels, window of 22': [],
}


def workdir(root: pathlib.Path, model: str, row: str, seed: int) -> pathlib.Path:
    return root / f'{model}-{row.replace(",", "").replace(" ", "-")}-{seed}'


def table(root: pathlib.Path, model: str, seeds: int) -> str:
    """Formats a Markdown table: accuracy with standard error, paired difference to the masked runs with 95% interval, and time."""
    lines = [
        '| run | test accuracy % (standard error) | minus masked with the window, points (95% interval) | training time |',
        '|---|---|---|---:|',
    ]
    results = {row: [_runs.result(workdir(root, model, row, seed)) for seed in range(seeds)] for row in ROWS}
    accuracy = {row: 100 * np.array([r['test_accuracy'] for r in rows]) for row, rows in results.items()}
    for row, rows in results.items():
        difference = accuracy[row] - accuracy['masked, window of 22']
        half = stats.t.ppf(0.975, seeds - 1) * stats.sem(difference) if seeds > 1 else float('nan')
        versus = f'{difference.mean():+.2f} ({difference.mean() - half:.2f} to {difference.mean() + half:.2f})'
        if row == 'masked, window of 22':
            versus = ''
        seconds = np.median([r['seconds'] for r in rows])
        lines.append(f'| {row} | {accuracy[row].mean():.2f} ({stats.sem(accuracy[row]):.2f}) | {versus} | {seconds:.0f} s |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', type=pathlib.Path, default=pathlib.Path('runs/kernels'))
    parser.add_argument('--model', default='lenet5', choices=('lenet5', 'lenet300'))
    parser.add_argument('--seeds', type=int, default=5)
    args = parser.parse_args()
    runs = {
        workdir(args.root, args.model, row, seed): [
            f'--config=configs/mnist_{args.model}.py:offline',
            f'--config.seed={seed}',
            *flags,
        ]
        for seed in range(args.seeds)
        for row, flags in ROWS.items()
    }
    _runs.train_all(runs, 1)
    print(table(args.root, args.model, args.seeds))
    chosen = json.loads((workdir(args.root, args.model, 'kernels, window of 22', 0) / 'kernels.json').read_text())
    print(json.dumps(chosen, indent=2))


if __name__ == '__main__':
    main()
