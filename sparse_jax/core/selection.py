"""Exact selection of the k largest or smallest scores, k traced, ties by the lowest flat index.

The bits of a non-negative float, read as an unsigned integer, order as the float does. So the k-th largest score is the largest
integer t with count(key >= t) >= k, and it is found from the top bit down with one comparison and one count a bit. The ties at t
are then settled the same way over the flat index. There are elementwise operations and small reductions only: a sharded array is
never gathered (a sort would gather it), and since the counts are integers the result has the same bits on every mesh.

Keys: unsigned integers, one array ``[depth, ...]`` a leaf, each of its ``depth`` rows a layer with a k of its own. Key 0 is never
selected. All leaves that are given together share one loop, and so one reduction a round.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.core import allocation, numerics
from sparse_jax.core.numerics import score_bits


def keys(scores: jax.Array, where: jax.Array, *, smallest: bool = False) -> jax.Array:
    """Selection keys of scores: larger for larger (or smaller) scores, positive where an entry may be selected, else 0.

    >>> keys(jnp.array([0.0, 1.0, 1.0], jnp.bfloat16), jnp.array([True, True, False])).tolist()
    [1, 16257, 0]
    """
    bits = score_bits(scores)
    top = 2 ** (bits.dtype.itemsize * 8 - 1)
    bits = bits if bits.dtype.itemsize >= 4 else bits.astype(jnp.uint32)
    key = bits.dtype.type(top) - bits if smallest else bits + bits.dtype.type(1)
    # For criteria, which run under vmap, where a condition is no branch (see once): a barrier keeps most programs from computing keys twice.
    return lax.optimization_barrier(jnp.where(where, key, bits.dtype.type(0)))


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
    # From iotas and not by a reshape: reshaping an array sharded along two axes would gather it.
    index, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(jnp.int32, shape, axis) * stride
        stride *= shape[axis]
    return index


class _Rows:
    """The layers as rows of their leaves: the form for accelerators and for sharded leaves, which must keep their shape."""

    def __init__(self, leaves: Sequence[jax.Array]):
        self.parts = list(leaves)
        self.layer_size = max(math.prod(leaf.shape[1:]) for leaf in leaves)
        self._ends = [sum(len(leaf) for leaf in leaves[: i + 1]) for i in range(len(leaves))]

    def split(self, per_layer: jax.Array) -> list[jax.Array]:
        """A vector over all layers, in parts that broadcast against the parts of the keys."""
        cut = [per_layer[end - len(part) : end] for part, end in zip(self.parts, self._ends, strict=True)]
        return [c.reshape(len(part), *[1] * (part.ndim - 1)) for c, part in zip(cut, self.parts, strict=True)]

    def count(self, masks: Sequence[jax.Array]) -> jax.Array:
        """Number of True entries a layer, int32[layers]."""
        return jnp.concatenate([jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32) for mask in masks])

    def index(self) -> list[jax.Array]:
        """The flat index of each entry within its layer."""
        return [_flat_index(part.shape[1:])[None] for part in self.parts]

    def join(self, masks: Sequence[jax.Array]) -> list[jax.Array]:
        """Masks of the parts as masks of the leaves."""
        return list(masks)


class _Chunks:
    """All layers one after the other in one array of chunks of 32 x 32 entries, each of one layer: the form for one CPU device.

    A round is then one pass, whatever the number of layers, and little to compile; and a count by chunks needs no memory
    (:func:`sparse_jax.core.numerics.count` says why).
    """

    def __init__(self, leaves: Sequence[jax.Array]):
        self._shapes = [leaf.shape for leaf in leaves]
        self.layer_size = max(math.prod(shape[1:]) for shape in self._shapes)
        self._chunks = [-(-math.prod(shape[1:]) // numerics.GROUP**2) for shape in self._shapes]  # of each layer of a leaf
        self.parts = [jnp.concatenate([self._cut(leaf, chunks) for leaf, chunks in zip(leaves, self._chunks, strict=True)])]
        lengths = [chunks for shape, chunks in zip(self._shapes, self._chunks, strict=True) for _ in range(shape[0])]
        self._layer = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self._chunk_of_layer = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        self._num_layers = len(lengths)

    def _cut(self, leaf: jax.Array, chunks: int) -> jax.Array:
        flat = leaf.reshape(len(leaf), -1)
        flat = lax.pad(flat, jnp.zeros((), leaf.dtype), [(0, 0, 0), (0, chunks * numerics.GROUP**2 - flat.shape[1], 0)])
        return flat.reshape(-1, numerics.GROUP, numerics.GROUP)

    def split(self, per_layer: jax.Array) -> list[jax.Array]:
        return [per_layer[self._layer][:, None, None]]

    def count(self, masks: Sequence[jax.Array]) -> jax.Array:
        of_chunks = jnp.sum(numerics.count_groups(masks[0]), axis=1, dtype=jnp.int32)
        return jax.ops.segment_sum(of_chunks, jnp.asarray(self._layer), self._num_layers, indices_are_sorted=True)

    def index(self) -> list[jax.Array]:
        within = _flat_index((numerics.GROUP, numerics.GROUP))
        return [jnp.asarray(self._chunk_of_layer)[:, None, None] * numerics.GROUP**2 + within]

    def join(self, masks: Sequence[jax.Array]) -> list[jax.Array]:
        leaves, start = [], 0
        for shape, chunks in zip(self._shapes, self._chunks, strict=True):
            stop = start + shape[0] * chunks
            flat = masks[0][start:stop].reshape(shape[0], -1)
            leaves.append(flat[:, : math.prod(shape[1:])].reshape(shape))
            start = stop
        return leaves


class _Outputs:
    """Each output of each row of one leaf ``[rows, ..., outputs]`` by itself, with a k of its own: vectors are int32[rows, outputs]."""

    def __init__(self, leaf: jax.Array):
        self.parts = [leaf]
        self.layer_size = math.prod(leaf.shape[1:-1])

    def split(self, per_output: jax.Array) -> list[jax.Array]:
        axes = tuple(range(1, self.parts[0].ndim - 1))
        return [lax.expand_dims(per_output, axes)]

    def count(self, masks: Sequence[jax.Array]) -> jax.Array:
        return numerics.replicated(jnp.sum(masks[0], axis=tuple(range(1, masks[0].ndim - 1)), dtype=jnp.int32))

    def index(self) -> list[jax.Array]:
        shape = self.parts[0].shape[1:-1]
        return [lax.expand_dims(_flat_index(shape), (0, len(shape) + 1))]


def select_in_outputs(leaf: jax.Array, k: jax.Array) -> jax.Array:
    """As :func:`select`, the k largest keys of each output of each row of one leaf ``[rows, ..., outputs]``; k is int32[rows, outputs]."""
    rows = _Outputs(leaf)
    nothing = lambda parts, k: [part < part for part in parts]
    return once(functools.partial(_select, rows), nothing, rows.parts, jnp.maximum(k, 0))[0]


def _arrange(leaves: Sequence[jax.Array]) -> _Rows | _Chunks:
    return _Chunks(leaves) if numerics.one_cpu_device() else _Rows(leaves)


def _search(num_bits: jax.typing.ArrayLike, dtype, shape, enough, *, stop: jax.Array | None = None):
    """The largest integers t with enough counted at t, and those counts (-1 where t is 0), by one round a bit from the top.

    ``enough(t)`` gives, for t of the shape, whether the count suffices, and the count. With ``stop`` the search ends as soon as
    all counts equal it. The number of bits may be traced.
    """
    one = dtype.type(1)

    def round_(i, t, number):
        candidate = t | (one << jnp.asarray(i, dtype))
        suffices, counted = enough(candidate)
        return jnp.where(suffices, candidate, t), jnp.where(suffices, counted, number)

    start = jnp.zeros(shape, dtype), jnp.full(shape, -1, jnp.int32)
    if stop is None and isinstance(num_bits, int):  # a fixed number of rounds spares an accelerator to ask after each
        return lax.fori_loop(0, num_bits, lambda i, state: round_(num_bits - 1 - i, *state), start)

    def unfinished(state):
        return (state[0] >= 0) & (True if stop is None else jnp.any(state[2] != stop))

    def body(state):
        i, t, number = state
        return i - 1, *round_(i, t, number)

    return lax.while_loop(unfinished, body, (jnp.asarray(num_bits, jnp.int32) - 1, *start))[1:]


def select(leaves: Sequence[jax.Array], k: jax.Array) -> list[jax.Array]:
    """Masks of the k largest keys of each layer; of equal keys those with the lowest flat index within the layer.

    Args:
      leaves: keys of each leaf, ``[depth, ...]``, fewer than 2^31 entries each.
      k: int32[layers], the layers being the leaves' rows in order; may be traced. No more are selected than have a positive key.

    Returns:
      bool arrays of the leaves' shapes.
    """
    for leaf in leaves:
        _check_size(leaf.size)
    dtype = jnp.result_type(*leaves)
    rows = _arrange([leaf.astype(dtype) for leaf in leaves])
    nothing = lambda parts, k: [part < part for part in parts]
    return rows.join(once(functools.partial(_select, rows), nothing, rows.parts, jnp.maximum(k, 0)))


def _check_size(size: int) -> None:
    if size >= 2**31:
        raise ValueError(f'keys has {size} entries; counts are int32, so a selection takes fewer than 2^31 = {2**31}.')


def once(function: Callable, nothing: Callable, keys: Any, k: jax.Array) -> Any:
    """``function(keys, k)`` where something is to be selected, of keys that are computed once.

    XLA fuses what keys are computed of into each of their uses, a barrier or not, and rounds it differently here and there (it contracts to
    fused multiply-adds): the key at the threshold would then miss it, and the count would no longer be exact. What the branch of a condition
    is given is in memory.
    """
    return lax.cond(jnp.any(k > 0), function, nothing, keys, k)


def _select(rows: '_Rows | _Chunks | _Outputs', parts: list[jax.Array], k: jax.Array) -> list[jax.Array]:
    """:func:`select` of leaves that are arranged, by parts in memory."""
    dtype = parts[0].dtype

    def count_where(predicate, *per_layer):
        return rows.count([predicate(*part) for part in zip(parts, *map(rows.split, per_layer), strict=True)])

    def enough(candidate):
        counted = count_where(lambda key, t: key >= t, candidate)
        return counted >= k, counted

    # The cache of a CPU makes a round cheap against asking whether it was the last one worthwhile.
    threshold, number = _search(dtype.itemsize * 8, dtype, k.shape, enough, stop=k if isinstance(rows, _Chunks) else None)

    # Where the count is k to the weight, all ties are selected and no search is needed. Else it is for the last tie selected: the
    # largest bound with fewer than the needed ties below it.
    layer_size = rows.layer_size
    num_index_bits = jnp.where(jnp.all(number == k), 0, max(1, (layer_size - 1).bit_length()))
    needed = lax.cond(
        num_index_bits > 0,
        lambda: k - count_where(lambda key, t: key > t, threshold),
        lambda: jnp.zeros_like(k),
    )

    def too_few(bound):
        ties = zip(parts, rows.split(threshold), rows.index(), rows.split(bound), strict=True)
        below = rows.count([(key == t) & (index < b) for key, t, index, b in ties])
        return below < needed, below

    bound, _ = _search(num_index_bits, jnp.dtype(jnp.int32), k.shape, too_few)
    last = jnp.where(num_index_bits == 0, layer_size, jnp.where(needed > 0, bound, -1))
    last = jnp.where(k > 0, last, -1)
    return [
        (key > 0) & ((key > t) | ((key == t) & (index <= b)))
        for key, t, index, b in zip(parts, rows.split(threshold), rows.index(), rows.split(last), strict=True)
    ]


def joint_counts(leaves: Sequence[jax.Array], amount: tuple[jax.Array, jax.Array], most: jax.Array) -> jax.Array:
    """How many of the largest keys over all layers together lie in each layer, by one threshold for all.

    Args:
      leaves: keys of each leaf, ``[depth, ...]``, on a common scale.
      amount: how many in all, as a pair (see :mod:`sparse_jax.redistribution`).
      most: int32[layers], no more than so many in a layer; at most the number of its positive keys.

    Returns:
      int32[layers]; ties at the threshold are counted in the lowest layers first.
    """
    rows = _arrange(leaves)
    counts = functools.partial(_joint_counts, rows, amount)
    return once(counts, lambda parts, most: jnp.zeros_like(most), rows.parts, most)


def _joint_counts(
    rows: '_Rows | _Chunks', amount: tuple[jax.Array, jax.Array], parts: list[jax.Array], most: jax.Array
) -> jax.Array:
    dtype = parts[0].dtype

    def counted(t):  # with the bound inside, the sum still falls as t rises
        return jnp.minimum(rows.count([(key >= t) & (key > 0) for key in parts]), most)

    def enough(candidate):
        return numerics.at_most(amount, numerics.total(counted(candidate))), jnp.int32(0)

    threshold, _ = _search(dtype.itemsize * 8, dtype, (), enough)
    at_least = counted(threshold)
    above = jnp.where(threshold == ~dtype.type(0), 0, counted(threshold + dtype.type(1)))
    needed = numerics.subtract(amount, numerics.total(above))
    return above + allocation.first_come(needed, at_least - above)


def _select_one(scores: jax.Array, k: jax.typing.ArrayLike, where: jax.Array, *, smallest: bool) -> jax.Array:
    rows = _arrange([keys(scores, where, smallest=smallest)[None]])
    _check_size(rows.layer_size)
    return rows.join(_select(rows, rows.parts, jnp.maximum(jnp.asarray(k, jnp.int32)[None], 0)))[0][0]


def select_largest(scores: jax.Array, k: jax.typing.ArrayLike, where: jax.Array) -> jax.Array:
    """Mask of the k entries with the largest scores; of equal scores those with the lowest flat index.

    Args:
      scores: non-negative numbers of any shape, fewer than 2^31 of them; those that are not finite count as 0.
      k: how many to select; an int32 scalar, may be traced. At most ``count(where)`` are selected, none if k is not positive.
      where: bool array of the scores' shape; entries that may be selected.

    Returns:
      bool array of the scores' shape with exactly ``clip(k, 0, count(where))`` entries set.

    Example:
      >>> select_largest(jnp.array([2.0, 5.0, 2.0, 2.0]), 2, jnp.ones(4, bool)).tolist()
      [True, True, False, False]
    """
    return _select_one(scores, k, where, smallest=False)


def select_smallest(scores: jax.Array, k: jax.typing.ArrayLike, where: jax.Array) -> jax.Array:
    """As :func:`select_largest`, but the k entries with the smallest scores.

    >>> select_smallest(jnp.array([2.0, 5.0, 2.0]), 1, jnp.ones(3, bool)).tolist()
    [True, False, False]
    """
    return _select_one(scores, k, where, smallest=True)
