"""Masks as lists of units by input, and back, inside of jit: cumulative sums over words of 32 units, no sort."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core.granularity import Granularity, Unstructured
from sparse_jax.kernels.layout import ByOutput, Layout

_BITS = 32


def units_of(mask: jax.Array, granularity: Granularity) -> jax.Array:
    """Which units of a layer's mask exist, in the order in which a layout by input lists them: bool[inputs, outputs, taps]."""
    if not isinstance(granularity, Unstructured):
        mask = granularity_lib.active(granularity_lib.at_each_tap(granularity), mask)
    return jnp.moveaxis(mask.reshape(-1, *mask.shape[-2:]), 0, -1)


def positions(chosen: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The places of the True entries of a vector in their order, int32[capacity], and how many there are.

    The k-th of them is in the last word that begins with at most k before it. Words that begin with as many before them are empty but the
    last, so that a maximum over the numbers of words, each put where it begins, finds it: a cumulative maximum fills the gaps. Within the
    word it is found by halving.

    >>> positions(jnp.array([False, True, True, False, True]), 4)
    (Array([1, 2, 4, 0], dtype=int32), Array(3, dtype=int32))
    """
    size = chosen.size
    words = -(-size // _BITS)
    bits = jnp.pad(chosen, (0, words * _BITS - size)).reshape(words, _BITS)
    word = jnp.sum(bits.astype(jnp.uint32) << jnp.arange(_BITS, dtype=jnp.uint32), axis=1, dtype=jnp.uint32)
    each = lax.population_count(word).astype(jnp.int32)
    upto = jnp.cumsum(each, dtype=jnp.int32)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    first = jnp.zeros(capacity, jnp.int32).at[upto - each].max(jnp.arange(words, dtype=jnp.int32), mode='drop')
    which = lax.cummax(first)
    rest, rank, place = word[which], slot - (upto - each)[which], which * _BITS
    for width in (16, 8, 4, 2, 1):
        low = rest & jnp.uint32((1 << width) - 1)
        before = lax.population_count(low).astype(jnp.int32)
        above = rank >= before
        rank, place = jnp.where(above, rank - before, rank), jnp.where(above, place + width, place)
        rest = jnp.where(above, rest >> jnp.uint32(width), low)
    return jnp.where(slot < upto[-1], place, 0), upto[-1]


def lists_of(units: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The indices and pointers of a layout by input; of more units than there is room for the last are missing.

    >>> lists_of(jnp.array([[[True], [False]], [[True], [True]]]), 4)
    (Array([0, 0, 1, 0], dtype=int32), Array([0, 1, 3], dtype=int32))
    """
    inputs, *others = units.shape
    flat, _ = positions(units.reshape(-1), capacity)
    per_input = jnp.sum(units.reshape(inputs, -1), axis=1, dtype=jnp.int32)
    pointers = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(per_input, dtype=jnp.int32)])
    return flat % math.prod(others), pointers


def by_output(layout: Layout) -> ByOutput:
    """The units of one layer's layout by output; of entries that are not used the numbers are no unit's.

    A grid of all units holds the number of each, and is read column by column: it is small, as this is for blocks.
    """
    tap, source, output = layout.places()
    *taps, inputs, outputs = layout.units
    each = inputs * math.prod(taps)
    used = jnp.arange(layout.capacity) < layout.pointers[-1]
    place = jnp.where(used, output * each + source * math.prod(taps) + tap, outputs * each)
    grid = jnp.full(outputs * each, -1, jnp.int32).at[place].set(jnp.arange(layout.capacity, dtype=jnp.int32), mode='drop')
    there = grid >= 0
    flat, _ = positions(there, layout.capacity)
    counts = jnp.sum(there.reshape(outputs, each), axis=1, dtype=jnp.int32)
    pointers = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    return ByOutput(flat % each, pointers, jnp.where(used, grid[flat], 0))


def flat_of(layout: Layout) -> tuple[jax.Array, jax.Array]:
    """The place of each unit of one layer in the flattened array of :func:`units_of`, int32[capacity], and whether it is used."""
    tap, source, output = layout.places()
    *taps, _, outputs = layout.units
    used = jnp.arange(layout.capacity) < layout.pointers[-1]
    return jnp.where(used, (source * outputs + output) * math.prod(taps) + tap, 0), used


def mask_of(layout: Layout) -> jax.Array:
    """The mask of one layer: bool of the weight's shape."""
    *taps, inputs, outputs = layout.units
    flat, used = flat_of(layout)
    size = inputs * outputs * math.prod(taps)
    units = jnp.zeros(size, bool).at[jnp.where(used, flat, size)].set(True, mode='drop')
    units = jnp.moveaxis(units.reshape(inputs, outputs, math.prod(taps)), -1, 0).reshape(*taps, inputs, outputs)
    if isinstance(layout.granularity, Unstructured):
        return units
    return granularity_lib.at_each_tap(layout.granularity).expand(units, layout.shape)


def sources(before: Layout, after: Layout, units: jax.Array) -> jax.Array:
    """Where each unit of one layer's new list is in the old one, int32[capacity]; -1: it is new, or not used.

    Both lists have the units in one order: the j-th of the new one that is old is the j-th of the old one that stays.

    Args:
      before: the old layout.
      after: the new one.
      units: of the new one, as :func:`units_of` gives them.
    """
    old, old_used = flat_of(before)
    new, new_used = flat_of(after)
    stays = old_used & units.reshape(-1)[old]
    was = jnp.zeros(units.size, bool).at[jnp.where(old_used, old, units.size)].set(True, mode='drop')
    known = new_used & was[new]
    kept, _ = positions(stays, after.capacity)
    return jnp.where(known, kept[jnp.maximum(jnp.cumsum(known, dtype=jnp.int32) - 1, 0)], -1)
