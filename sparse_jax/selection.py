"""Exact selection of the k largest or smallest scores, k traced, ties by the lowest flat index.

The bits of a non-negative float, read as an unsigned integer, order as the float does. So the k-th largest score is the largest
integer t with count(bits >= t) >= k, and it is found from the top bit down with one comparison and one count a bit. The ties at t
are then settled the same way over the flat index. There are elementwise operations and scalar reductions only: a sharded array is
never gathered (a sort would gather it), and since the counts are integers the result has the same bits on every mesh.
"""

import jax
import jax.numpy as jnp
from jax import lax


def score_bits(scores: jax.Array) -> jax.Array:
    """Non-negative scores as unsigned integers of the same order, shape and width.

    Zeros of both signs are equal, and scores that are not finite count as 0; bool and integer scores are taken as float32. No
    floating-point operation is involved, so denormal scores keep their order where the processor flushes denormals to zero.

    >>> score_bits(jnp.array([1.0, -0.0, jnp.nan])).tolist()
    [1065353216, 0, 0]
    """
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        scores = scores.astype(jnp.float32)
    finfo = jnp.finfo(scores.dtype)
    dtype = jnp.dtype(f'uint{finfo.bits}')
    bits = lax.bitcast_convert_type(scores, dtype) & dtype.type(2 ** (finfo.bits - 1) - 1)
    infinity = dtype.type((2**finfo.nexp - 1) << finfo.nmant)
    return jnp.where(bits < infinity, bits, dtype.type(0))


def count(mask: jax.Array) -> jax.Array:
    """Number of True entries as int32, exact below 2^31."""
    return jnp.sum(mask, dtype=jnp.int32)


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
    # From iotas and not by a reshape: reshaping an array sharded along two axes would gather it.
    index, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(jnp.int32, shape, axis) * stride
        stride *= shape[axis]
    return index


def select_largest(keys: jax.Array, k: jax.typing.ArrayLike, where: jax.Array) -> jax.Array:
    """Mask of the k entries with the largest keys; of equal keys those with the lowest flat index.

    Args:
      keys: unsigned integers of any shape, fewer than 2^31 of them (see :func:`score_bits`).
      k: how many to select; an int32 scalar, may be traced. At most ``count(where)`` are selected, none if k is not positive.
      where: bool array of the keys' shape; entries that may be selected.

    Returns:
      bool array of the keys' shape with exactly ``clip(k, 0, count(where))`` entries set.

    Example:
      >>> scores = jnp.array([2.0, 5.0, 2.0, 2.0])
      >>> select_largest(score_bits(scores), 2, jnp.ones(4, bool)).tolist()
      [True, True, False, False]
    """
    if keys.size >= 2**31:
        raise ValueError(f'keys has {keys.size} entries; counts are int32, so a selection takes fewer than 2^31 = {2**31}.')
    one = keys.dtype.type(1)
    num_bits = keys.dtype.itemsize * 8

    def key_bit(i, threshold):
        candidate = threshold | (one << (num_bits - 1 - i).astype(keys.dtype))
        return jnp.where(count(where & (keys >= candidate)) >= k, candidate, threshold)

    threshold = lax.fori_loop(0, num_bits, key_bit, jnp.zeros((), keys.dtype))
    above = where & (keys > threshold)
    ties = where & (keys == threshold)
    needed = k - count(above)
    index = _flat_index(keys.shape)
    num_index_bits = max(1, (keys.size - 1).bit_length())

    def index_bit(i, bound):  # the largest bound with fewer than `needed` ties below it
        candidate = bound | (1 << (num_index_bits - 1 - i))
        return jnp.where(count(ties & (index < candidate)) < needed, candidate, bound)

    last = lax.cond(
        needed < count(ties),
        lambda: lax.fori_loop(0, num_index_bits, index_bit, jnp.int32(0)),
        lambda: jnp.int32(keys.size),
    )
    return (above | (ties & (index <= last) & (needed > 0))) & (jnp.asarray(k) > 0)


def select_smallest(keys: jax.Array, k: jax.typing.ArrayLike, where: jax.Array) -> jax.Array:
    """As :func:`select_largest`, but the k entries with the smallest keys.

    >>> select_smallest(score_bits(jnp.array([2.0, 5.0, 2.0])), 1, jnp.ones(3, bool)).tolist()
    [True, False, False]
    """
    return select_largest(~keys, k, where)  # the complement reverses the order of keys and leaves that of indices
