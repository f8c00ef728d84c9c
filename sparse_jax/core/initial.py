"""A new state: first masks, the optimizer's own state for sparse params, and what the rule's criteria keep beside it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_jax.core import inner as inner_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import mask_update, numerics, values
from sparse_jax.core import masks as masks_lib
from sparse_jax.core import momentum as momentum_lib
from sparse_jax.core.granularity import FanIn
from sparse_jax.core.layers import Layer
from sparse_jax.core.masks import SparsifyState, UpdateStats
from sparse_jax.core.rule import Rule


@numerics.lenient
def initial_state(inner: optax.GradientTransformationExtraArgs, rule: Rule, params: Any) -> SparsifyState:
    """The state of an optimizer and a rule for params: what ``init`` returns."""
    key, layers = rule.first_key(), rule.sparse_layers(params)
    inner_lib.check(inner, params, layers=() if rule.is_fixed else layers)
    rule = resolved(inner, rule, params)
    masks = mask_update.first_masks(rule, layers, params, key)
    inner_state = inner.init(params if rule.backward_density else masks_lib.apply_masks(params, masks))
    like_masks = lambda dtype: jax.tree.map(
        lambda m, p: jnp.zeros((), dtype) if m.ndim == 0 else numerics.placed_like(p, jnp.zeros(m.shape, dtype)), masks, params
    )
    zeros = functools.partial(like_masks, jnp.float32)
    make = {'ever_active': lambda: jax.tree.map(jnp.copy, masks), 'gradient_average': zeros, 'accumulated_gradient': zeros}
    make |= {'stored': lambda: values.stored(masks, jax.tree.map(jnp.zeros_like, params), params)}
    of_layers = {layer.leaf: layer.depth for layer in layers}
    make |= {'budget': lambda: masks_lib.budgets(masks, _zero_counts(params, of_layers))}
    make |= {'backward': lambda: _backward(rule, layers, params, masks)}
    method_state = {name: make[name]() for name in kept(rule, inner_state, params)}
    num_layers = layers[-1].stop if layers else 0
    stats = UpdateStats(*(jnp.zeros(num_layers, dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32, jnp.int32)))
    own = SparsifyState(
        count=jnp.zeros([], jnp.int32),
        rng_key=jax.random.key_data(key),
        masks=masks,
        grown=like_masks(jnp.bool_),
        layers=jnp.asarray(layers_lib.encode(len(jax.tree.leaves(params)), layers, rule.granularity)),
        inner_state=None,
        stats=stats,
        method_state=method_state,
    )
    return numerics.replicated_over(params, own)._replace(inner_state=inner_state)


def _zero_counts(params: Any, depths: dict[int, int | None]) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    shape = lambda i: () if depths.get(i) is None else (depths[i],)
    return jax.tree.unflatten(treedef, [jnp.zeros(shape(i), jnp.int32) for i in range(len(leaves))])


def _backward(rule: Rule, layers: list[Layer], params: Any, masks: Any) -> Any:
    leaves, treedef = jax.tree.flatten(masks)
    weights = jax.tree.leaves(params)
    of = lambda tree: [tree[layer.leaf] for layer in layers]
    for layer, wider in zip(layers, mask_update.backward_masks(rule, layers, of(weights), of(leaves)), strict=True):
        leaves[layer.leaf] = wider
    return jax.tree.unflatten(treedef, leaves)


def resolved(inner: optax.GradientTransformationExtraArgs, rule: Rule, params: Any) -> Rule:
    """The rule, saying where this optimizer keeps its momentum."""
    option = inner_lib.facts(inner, params).momentum if rule.momentum is None else rule.momentum
    return rule if option is rule.momentum else dataclasses.replace(rule, momentum=option)


def kept(rule: Rule, inner_state: Any, params: Any) -> list[str]:
    """What the state keeps for the rule's criteria, beside the masks."""
    no_momentum = not momentum_lib.is_found(inner_state, jax.tree.structure(params), rule.momentum)
    needed = {
        'gradient_average': rule.needs.momentum and no_momentum,
        'ever_active': rule.needs.ever_active or rule.track_exploration,
        'accumulated_gradient': rule.needs.accumulated_gradient,
        'budget': isinstance(rule.granularity, FanIn) and not rule.is_fixed,
        'stored': rule.backward_density is not None,
        'backward': rule.backward_density is not None,
    }
    return [name for name, is_needed in needed.items() if is_needed]
