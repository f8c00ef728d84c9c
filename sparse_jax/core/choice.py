"""Which units a mask has, by keys, where a granularity asks for more than a number of units: n of every m inputs, or equal inputs.

Keys are those of :mod:`sparse_jax.core.selection`: unsigned integers ``[rows, taps..., inputs, outputs]``, the largest are chosen, ties go to
the lowest index, and key 0 is never chosen. As there, nothing but elementwise operations, comparisons and counts of integers is used.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.core import numerics, selection
from sparse_jax.core.granularity import FanIn, Granularity, NOfM


def choose(granularity: Granularity, keys: Sequence[jax.Array], counts: jax.Array) -> list[jax.Array]:
    """The units with the largest keys, as many as each layer has units of budget, int32[layers]; in groups always their n.

    >>> choose(NOfM(1, 2), [jnp.array([[[1], [2], [4], [3]]], jnp.uint32)], jnp.array([2]))[0].ravel().tolist()
    [False, True, True, False]
    """
    match granularity:
        case NOfM():
            return [in_groups(key, jnp.int32(granularity.n), granularity.m) for key in keys]
        case FanIn():
            ends = np.cumsum([len(key) for key in keys])
            rows = [counts[end - len(key) : end] for end, key in zip(ends, keys, strict=True)]
            return [
                selection.select_in_outputs(key, jnp.broadcast_to(k[:, None], (len(key), key.shape[-1])))
                for key, k in zip(keys, rows, strict=True)
            ]
        case _:
            return selection.select(keys, counts)


def in_groups(keys: jax.Array, k: jax.Array, m: int) -> jax.Array:
    """The k largest keys of each group of m inputs; k is one number, or one a group [rows, taps..., inputs / m, outputs]."""
    return selection.once(functools.partial(_in_groups, m), lambda keys, k: keys < keys, keys, k)


def _in_groups(m: int, keys: jax.Array, k: jax.Array) -> jax.Array:
    groups = keys.reshape(*keys.shape[:-2], keys.shape[-2] // m, m, keys.shape[-1])
    place = lax.broadcasted_iota(jnp.int32, groups.shape, groups.ndim - 2)
    ahead = jnp.zeros(groups.shape, jnp.int32)
    for j in range(m):
        other = groups[..., j : j + 1, :]
        ahead += (other > groups) | ((other == groups) & (j < place))
    chosen = (ahead < (k if k.ndim == 0 else k[..., None, :])) & (groups > 0)
    return chosen.reshape(keys.shape)


def _group_counts(mask: jax.Array, m: int) -> jax.Array:
    groups = mask.reshape(*mask.shape[:-2], mask.shape[-2] // m, m, mask.shape[-1])
    return jnp.sum(groups, axis=-2, dtype=jnp.int32)


def by_output(mask: jax.Array) -> jax.Array:
    """True entries of each output, int32[rows, outputs]."""
    return numerics.replicated(jnp.sum(mask, axis=tuple(range(1, mask.ndim - 1)), dtype=jnp.int32))


def fan_in(active: jax.Array) -> jax.Array:
    """Inputs of each output of the layers, int32[rows]: weights over outputs, rounded up where some outputs have fewer."""
    outputs = active.shape[-1]
    nonzeros = jax.vmap(numerics.count)(active)
    return nonzeros // outputs + (nonzeros % outputs > 0)


class Pruned(NamedTuple):
    """A leaf between pruning and growth, ``[rows, ...]``."""

    before: jax.Array  # bool, the active units before the pruning
    after: jax.Array  # and after it
    may_move: jax.Array  # bool, what is not fixed
    stay: jax.Array  # scores by which the smallest are pruned
    grow: jax.Array  # scores by which the largest are grown

    @property
    def grow_keys(self) -> jax.Array:
        """Keys of the units that may be grown."""
        return selection.keys(self.grow, ~self.after & self.may_move)


def regrown(granularity: Granularity, leaves: Sequence[Pruned], targets: jax.Array, inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """The units after the growth.

    Args:
      granularity: of the units.
      leaves: what is known of them.
      targets: int32[layers], units that each layer grows.
      inputs: with equal inputs: int32[rows, outputs] a leaf, how many inputs each output is to have.
    """
    match granularity:
        case NOfM():
            lost = [_group_counts(x.before, granularity.m) - _group_counts(x.after, granularity.m) for x in leaves]
            return [x.after | in_groups(x.grow_keys, k, granularity.m) for x, k in zip(leaves, lost, strict=True)]
        case FanIn():
            return [selection.select_in_outputs(_kept_first(x), k) for x, k in zip(leaves, inputs, strict=True)]
        case _:
            chosen = selection.select([x.grow_keys for x in leaves], targets)
            return [x.after | c for x, c in zip(leaves, chosen, strict=True)]


def _kept_first(leaf: Pruned) -> jax.Array:
    """Keys by which all that is active comes before all that is not, and what is fixed first."""
    stay, grow = selection.keys(leaf.stay, leaf.after & leaf.may_move), leaf.grow_keys
    dtype = jnp.result_type(stay, grow)
    top = dtype.type(1 << (8 * dtype.itemsize - 1))  # keys of scores have it clear
    kept = jnp.where(leaf.may_move, stay.astype(dtype) | top, ~dtype.type(0))
    return jnp.where(leaf.after, kept, grow.astype(dtype))


def surviving(salient: jax.Array, fewest: int, budget: jax.Array) -> jax.Array:
    """Which outputs stay, bool[rows, outputs]: those with enough salient weights, and always as many as the weights need.

    Args:
      salient: bool ``[rows, taps..., inputs, outputs]``.
      fewest: salient weights that an output needs.
      budget: int32[rows], weights that the layer is to have.
    """
    counts = by_output(salient)
    size = int(np.prod(salient.shape[1:-1]))
    needed = budget // size + (budget % size > 0)
    first = selection.select([(counts + 1).astype(jnp.uint32)], needed)[0]
    return (counts >= fewest) | first
