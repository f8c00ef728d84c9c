"""What weights are worth when they come and go: new ones start at 0 or at a value, and values off the masks may be kept beside the params.

Params hold what the forward pass uses. Where a method trains more than that, the values of all other weights are in ``method_state['stored']``,
and which of them are trained in ``method_state['backward']``.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.core.mask_update import Moved
from sparse_jax.core.masks import SparsifyState
from sparse_jax.core.rule import Rule


def whole(params: Any, state: SparsifyState) -> Any:
    """The values of all weights, in the forward pass or not."""
    if 'stored' not in state.method_state:
        return params
    fill = lambda mask, p, s: p if mask.ndim == 0 else jnp.where(mask, p, s)
    return jax.tree.map(fill, state.masks, params, state.method_state['stored'])


def stored(masks: Any, updates: Any, params: Any) -> Any:
    """What is kept of the new values off the new masks: zeros on them, and one zero for a dense leaf."""

    def keep(mask, u, p):
        return jnp.zeros((), p.dtype) if mask.ndim == 0 else jnp.where(mask, jnp.zeros((), p.dtype), (p + u).astype(p.dtype))

    return jax.tree.map(keep, masks, updates, params)


def updates(rule: Rule, state: SparsifyState, moved: Moved, is_update: Any, inner_updates: Any, params: Any) -> Any:
    """Updates after which params are exactly zero off the masks, and new weights have the value that they are to start at."""

    def from_zero(mask, new, u, p):  # a weight that is new in this update starts at 0, a regrown one keeps its value
        return u if mask.ndim == 0 else jnp.where(mask & ~(new & is_update), u, -p)

    def at_value(mask, u, p):  # p is 0 where the weight is new
        return u if mask.ndim == 0 else jnp.where(mask, u, -p)

    def from_store(mask, before, u, p, s):
        return u if mask.ndim == 0 else jnp.where(mask, jnp.where(before, u, s + u), -p).astype(p.dtype)

    if 'stored' in state.method_state:
        return jax.tree.map(from_store, moved.masks, state.masks, inner_updates, params, state.method_state['stored'])
    if rule.enters_with == 'value':
        return jax.tree.map(at_value, moved.masks, inner_updates, params)
    return jax.tree.map(from_zero, moved.masks, moved.grown, inner_updates, params)
