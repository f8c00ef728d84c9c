"""What a run with compact storage holds, beside what it would hold with dense storage."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
from rich.console import Console

from sparse_jax import config as config_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.train import state as state_lib
from sparse_jax.train import storage
from sparse_jax.train.console import named_table
from sparse_jax.train.run import Run, create_experiment

PARTS = ('weights', 'gradients', 'optimizer', 'averages', 'masks or lists', 'scores')


def parts(experiment: state_lib.Experiment, groups: int = 1) -> dict[str, int]:
    """Bytes of each part of an experiment's state, as it begins, and of gradients and the most scores at a time."""
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    weights = _bytes(state.params)
    sizes = dict.fromkeys(PARTS, 0) | {'weights': weights, 'gradients': weights, 'averages': _bytes(state.average)}
    if storage.is_compact(state):
        own = state.opt_state
        updates = (step for step in range(1, experiment.total_steps + 1) if experiment.is_mask_update(step))
        before = lambda step: jax.eval_shape(functools.partial(experiment.before_step, step), state)
        scores = [_bytes(before(step).opt_state.scores) for step in itertools.islice(updates, groups)]
        return sizes | {
            'optimizer': _bytes(own.inner_state),
            'masks or lists': _bytes(own.layout),
            'scores': max(scores, default=0),
        }
    if not storage.has_masks(state):
        return sizes | {'optimizer': _bytes(state.opt_state)}
    own = masks_lib.find_state(state.opt_state)
    kept = own.masks, own.grown, own.method_state
    return sizes | {'optimizer': _bytes(own.inner_state), 'masks or lists': _bytes(kept)}


def print_table(run: Run) -> None:
    """Prints the bytes of both forms."""
    sparsity = dataclasses.replace(run.config.sparsity, storage='dense', groups=config_lib.Sparsity().groups)
    twin = create_experiment(dataclasses.replace(run.config, sparsity=sparsity), run.data)
    rows: dict[str, tuple[int, int]] = {}
    dense, compact = parts(twin), parts(run.experiment, run.config.sparsity.groups)
    for part in PARTS:
        if dense[part] or compact[part]:
            rows[part] = dense[part], compact[part]
    console = Console()
    table = named_table(
        'bytes of a training step, beside activations',
        ('', 'dense storage', 'compact', 'of dense'),
        [(name, *_cells(*row)) for name, row in rows.items()],
        width=console.width,
        total=('all', *_cells(sum(dense.values()), sum(compact.values()))),
    )
    console.print(table)


def _cells(dense: int, compact: int) -> tuple[str, str, str]:
    return f'{dense:,}', f'{compact:,}', f'{compact / dense:.1%}' if dense else ''


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
