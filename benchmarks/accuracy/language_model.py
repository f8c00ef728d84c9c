"""A small Transformer on text at 10%: methods at their best learning rates, dense and small dense among them.

    python -m benchmarks.accuracy.language_model

configs/lm_tiny.py for 400 steps. Sparse momentum, RigL, SET, the dense twin and a dense network with as many weights as the sparse one has are
each trained with the same four learning rates and seed 0; the rate with the lowest validation loss is trained again with seeds 1 and 2, which
the table shows. Runs are kept in runs/language_model and go on where they were stopped. Cost on two CPU cores: two hours.
"""

import argparse
import os
import pathlib

import numpy as np

from benchmarks.accuracy import _runs

LEARNING_RATES = (7e-4, 2e-3, 6e-3, 1.8e-2)
METHODS = {
    'sparse momentum': ['--config=configs/lm_tiny.py'],
    'RigL': ['--config=configs/lm_tiny.py', '--config.sparsity.method=rigl'],
    'SET': ['--config=configs/lm_tiny.py', '--config.sparsity.method=set'],
    'dense': ['--config=configs/lm_tiny.py:dense'],
    'small dense': ['--config=configs/lm_tiny.py:small'],
}


def _folder(root: pathlib.Path, method: str, rate: float, seed: int) -> pathlib.Path:
    return root / f'{method.replace(" ", "_")}-{rate:g}-{seed}'


def _flags(method: str, rate: float, seed: int, steps: int) -> list[str]:
    shared = [f'--config.train.steps={steps}', f'--config.train.eval_every={steps}', f'--config.optimizer.learning_rate={rate}']
    sparse = [] if 'dense' in method else [f'--config.sparsity.stop_step={3 * steps // 4}', '--config.sparsity.kernels=dense']
    return [*METHODS[method], *shared, *sparse, f'--config.seed={seed}']


def _losses(root: pathlib.Path, method: str, seed: int) -> dict[float, float]:
    return {rate: _runs.result(_folder(root, method, rate, seed))['eval_loss'] for rate in LEARNING_RATES}


def best_rate(root: pathlib.Path, method: str) -> float:
    """The learning rate with the lowest validation loss of seed 0; a run that ended without a number has lost."""
    losses = {rate: loss if np.isfinite(loss) else np.inf for rate, loss in _losses(root, method, 0).items()}
    return min(losses, key=lambda rate: losses[rate])


def table(root: pathlib.Path) -> str:
    """Formats a Markdown table: the losses of the search, and those of the best rate's other seeds."""
    heads = ' | '.join(f'{rate:g}' for rate in LEARNING_RATES)
    lines = [
        f'| method | weights that exist | {heads} | at the best, seeds 1 and 2 | mean | operations of training, dense = 1 |',
        '|---|---:|' + '---:|' * len(LEARNING_RATES) + '---:|---:|---:|',
    ]
    dense = _runs.result(_folder(root, 'dense', best_rate(root, 'dense'), 1))['operations_training']
    for method in METHODS:
        rate, search = best_rate(root, method), _losses(root, method, 0)
        results = [_runs.result(_folder(root, method, rate, seed)) for seed in (1, 2)]
        losses = [result['eval_loss'] for result in results]
        cells = ' | '.join(f'**{search[r]:.3f}**' if r == rate else f'{search[r]:.3f}' for r in LEARNING_RATES)
        seeds = ', '.join(f'{loss:.3f}' for loss in losses)
        cost = results[0]['operations_training'] / dense
        lines.append(f'| {method} | {results[0]["nonzeros"]:,} | {cells} | {seeds} | {np.mean(losses):.3f} | {cost:.2f} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', type=pathlib.Path, default=pathlib.Path('runs/language_model'))
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--jobs', type=int, default=min(2, os.cpu_count() or 1), help='runs at a time, each on one core')
    args = parser.parse_args()
    search = [(method, rate, 0) for method in METHODS for rate in LEARNING_RATES]
    make = lambda runs: {_folder(args.root, *run): _flags(*run, steps=args.steps) for run in runs}
    _runs.train_all(make(search), args.jobs)
    _runs.train_all(make([(m, best_rate(args.root, m), seed) for m in METHODS for seed in (1, 2)]), args.jobs)
    print(table(args.root))


if __name__ == '__main__':
    main()
