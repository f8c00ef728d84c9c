"""What a run's weights and masks are, whichever way they are stored: dense arrays with exact zeros, or the units that exist."""

from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_jax import compact, stats
from sparse_jax.compact import tree
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.core.masks import UpdateStats
from sparse_jax.kernels import layout as layout_lib

STORAGES = ('dense', 'compact')


class CompactState(NamedTuple):
    """What compact storage keeps beside the values, in the place of an optimizer's state; arrays only."""

    layout: Any  # where the values belong
    inner_state: Any  # of the optimizer that trains the values
    scores: Any  # of units that the next mask update may grow, by leaf; None where no steps are scored
    stats: UpdateStats  # of the last mask update


def is_compact(state: Any) -> bool:
    """Whether a training state holds its weights in compact storage."""
    return isinstance(state.opt_state, CompactState)


def has_masks(state: Any) -> bool:
    """Whether a training is sparse."""
    is_state = lambda x: isinstance(x, masks_lib.SparsifyState)
    return is_compact(state) or any(is_state(x) for x in jax.tree.leaves(state.opt_state, is_leaf=is_state))


def masks(state: Any) -> Any:
    """The masks of a sparse training, concrete or as shapes; in compact storage made anew."""
    if not is_compact(state):
        return masks_lib.get_masks(state.opt_state)
    layout = state.opt_state.layout
    return compact.masks(layout) if _is_concrete(layout) else jax.eval_shape(compact.masks, layout)


def whole(state: Any, params: Any) -> Any:
    """Params as dense arrays, zero off the masks.

    Args:
      state: a sparse training, concrete or as shapes.
      params: its own, or averages of them.
    """
    if not is_compact(state):
        return params if not _is_concrete(params) else masks_lib.apply_masks(params, masks(state))
    layout = state.opt_state.layout
    return compact.expand(params, layout) if _is_concrete(layout) else jax.eval_shape(compact.expand, params, layout)


def shapes(state: Any) -> Any:
    """Shapes and dtypes of the whole params of any training."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    if not is_compact(state):
        return params
    layout = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.opt_state.layout)
    return jax.eval_shape(compact.expand, params, layout)


def layer_nonzeros(state: Any, layers: list[layers_lib.Layer]) -> list[int]:
    """Weights of each layer of a concrete sparse training; in compact storage by its lists."""
    if not is_compact(state):
        return stats.layer_nonzeros(masks_lib.get_masks(state.opt_state), layers)
    counts = jax.device_get([layout_lib.weights(x) for x in tree.compact_leaves(state.opt_state.layout).layouts])
    return [count for row in counts for count in np.atleast_1d(row).tolist()]


def exploration_rate(state: Any) -> float | None:
    """Share of the sparse layers' weights that have ever existed; None in compact storage, which keeps nothing of those that do not."""
    return None if is_compact(state) else stats.exploration_rate(state.opt_state)


def _is_concrete(tree: Any) -> bool:
    return not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))
