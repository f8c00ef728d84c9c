"""Units on the move: whether there is room for a plan, more room, and the plan carried out on values and whatever stands beside them."""

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparse_jax.compact import tree as tree_lib
from sparse_jax.compact.plan import Plan
from sparse_jax.kernels.layout import is_layout

_LOG = logging.getLogger('sparse_jax')


def fits(plan: Plan, layout: Any) -> bool:
    """Whether there is room for what a plan wants; on the host.

    Args:
      plan: from :func:`plan`, concrete.
      layout: the layout that it was made with.

    Returns:
      False: then the plan moves nothing. :func:`reserve` makes room, and the plan is made anew from the same scores.

    Raises:
      ValueError: if layout has no compact leaf.

    Example: see :func:`reserve`.
    """
    compact = tree_lib.compact_leaves(layout)
    units = jax.device_get(jax.tree.leaves(plan.units))
    return all(int(np.max(u)) <= layout.capacity for u, layout in zip(units, compact.layouts, strict=True))


def reserve(tree: Any, layout: Any, plan: Plan, *, capacity_factor: float = tree_lib.CAPACITY_FACTOR) -> tuple[Any, Any]:
    """Larger capacities, of all leaves at once, so that what is compiled for their shapes is compiled anew as seldom as can be.

    Args:
      tree: values, states of optimizers, averages: anything in whose leaves units may move.
      layout: the layout.
      plan: that does not fit.
      capacity_factor: capacity against the units that each leaf's fullest layer has now, or is to have.

    Returns:
      The tree and the layout with larger arrays; what is in them stays.

    Raises:
      ValueError: if a leaf seems to be of units and belongs to none.

    Example:
      >>> import jax.numpy as jnp, sparse_jax as sj
      >>> eye = jnp.eye(4, dtype=bool)
      >>> values, layout = sj.compact.compress({'w': jnp.eye(4)}, {'w': eye}, capacity_factor=1)
      >>> wanted = sj.compact.Plan(layout, None, {'w': jnp.array(8)}, None)
      >>> values, layout = reserve(values, layout, wanted)
      >>> sj.compact.fits(wanted, layout), values['w'].shape
      (True, (10,))
    """
    compact = tree_lib.compact_leaves(layout)
    wanted = [int(np.max(u)) for u in jax.device_get(jax.tree.leaves(plan.units))]
    present = [int(np.max(jax.device_get(x.pointers)[..., -1])) for x in compact.layouts]
    capacities = {
        path: max(x.capacity, tree_lib.capacity_for(max(pair), math.prod(x.units), capacity_factor))
        for (path, x), *pair in zip(compact.named, wanted, present, strict=True)
    }
    larger = [f'{path} {x.capacity:,} -> {capacities[path]:,}' for path, x in compact.named if capacities[path] > x.capacity]
    _LOG.info('compact: larger capacities, of all leaves at once: %s.', ', '.join(larger))
    return with_capacities(tree, layout, capacities)


def with_capacities(tree: Any, layout: Any, capacities: dict[str, int]) -> tuple[Any, Any]:
    """The tree and the layout with these capacities by leaf, none smaller than it is; runs under jit."""
    layout = tree_lib.bare(layout)
    compact = tree_lib.compact_leaves(layout)
    numbers = tree_lib.owners(tree, compact)

    def wider(x: jax.Array, number: int) -> jax.Array:
        old = compact.layouts[number]
        axis = 1 if tree_lib.is_stacked(old) else 0
        return jnp.pad(x, [(0, capacities[compact.paths[number]] - old.capacity if i == axis else 0) for i in range(x.ndim)])

    leaves = [x if i is None else wider(x, i) for x, i in zip(jax.tree.leaves(tree), numbers, strict=True)]
    order = iter(range(len(compact.layouts)))
    larger = lambda x: dataclasses.replace(x, indices=wider(x.indices, next(order))) if is_layout(x) else x
    return jax.tree.unflatten(jax.tree.structure(tree), leaves), jax.tree.map(larger, layout, is_leaf=is_layout)


def move(tree: Any, plan: Plan) -> Any:
    """Carries out a plan: units that stay keep what belongs to them, new ones start at zero. Runs under jit; donate the tree.

    Args:
      tree: values, states of optimizers, averages, or a tree of them; each leaf that belongs to a compact one is moved.
      plan: that fits.

    Returns:
      The tree; its layout is ``plan.layout`` from now on.

    Raises:
      ValueError: if a leaf seems to be of units and belongs to none, or a concrete plan does not fit.

    Example: see :mod:`sparse_jax.compact`.
    """
    compact = tree_lib.compact_leaves(plan.layout)
    numbers = tree_lib.owners(tree, compact)
    if not isinstance(jax.tree.leaves(plan.units)[0], Tracer) and not fits(plan, plan.layout):
        raise ValueError(
            'move: there is no room for this plan, and it moves nothing: make room with sj.compact.reserve, then plan again.'
        )
    sources = jax.tree.leaves(plan.sources)

    def one(x: jax.Array, number: int) -> jax.Array:
        def row(x: jax.Array, source: jax.Array) -> jax.Array:
            taken = x.at[jnp.maximum(source, 0)].get(mode='clip')
            known = (source >= 0).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(known, taken, jnp.zeros((), x.dtype))

        return tree_lib.per_row(row, compact.layouts[number])(x, sources[number])

    leaves = [x if i is None else one(x, i) for x, i in zip(jax.tree.leaves(tree), numbers, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
