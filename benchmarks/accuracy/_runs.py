"""Trains many runs of launch.py, a few at a time, each on one core; finished runs are kept, so that a benchmark can be resumed."""

import json
import pathlib
from typing import Any

from sparse_jax.train import sweep

# The methods as published: dense gradients in every step and no clipping. Masked dense products give the same bits on every machine.
AS_PUBLISHED = [
    '--config.sparsity.dense_gradient_window=None',
    '--config.sparsity.kernels=dense',
    '--config.optimizer.clip_norm=0.0',
]


def train_all(runs: dict[pathlib.Path, list[str]], jobs: int) -> None:
    """Trains the runs that are not finished yet.

    Args:
      runs: mapping from workdir to the flags of launch.py, --config first.
      jobs: number of runs at a time.
    """
    tasks = {path: ['launch.py', *flags, '--config.checkpoint.keep=1', f'--workdir={path}'] for path, flags in runs.items()}
    if not tasks:
        return
    failed = sweep.run_all(tasks, jobs, next(iter(tasks)).parent / 'logs')['failed']
    if failed:
        raise RuntimeError('\n'.join(failed))


def result(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the result of a finished run."""
    return json.loads((folder / 'result.json').read_text())
