"""Reductions of whole layers, in the form that each platform does quickly."""

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.core import target

GROUP = 32


def one_cpu_device() -> bool:
    """Whether everything runs on one CPU device, so that no array is sharded: which tracing cannot see, and decides on forms."""
    return target.platform() == 'cpu' and jax.device_count() == 1


def _groups(x: jax.Array, initial) -> jax.Array:
    """x as [groups, 32, 32], padded with the initial value."""
    flat = x.reshape(-1)
    missing = -flat.size % GROUP**2
    if missing:
        flat = lax.pad(flat, jnp.asarray(initial, x.dtype), [(0, missing, 0)])
    return flat.reshape(-1, GROUP, GROUP)


def reduce_all(x: jax.Array, initial, operation) -> jax.Array:
    """An array reduced to a scalar by an associative and commutative lax operation on integers, with its initial value.

    XLA on CPU writes the operand of a large reduction to memory, converted to the type of the sum, four bytes for a bool. A first
    stage of 32 entries it fuses instead, which takes almost no memory. The reshape would
    gather a sharded array, so it is for one device only.

    >>> int(reduce_all(jnp.arange(10), 0, lax.max))
    9
    """
    if one_cpu_device():
        x = lax.reduce(_groups(x, initial), jnp.asarray(initial, x.dtype), operation, (1,))
    return lax.reduce(x, jnp.asarray(initial, x.dtype), operation, tuple(range(x.ndim)))


def count_groups(mask: jax.Array) -> jax.Array:
    """True entries of a bool array [groups, 32, 32], counted over the second axis: uint8[groups, 32]."""
    return jnp.sum(mask.astype(jnp.uint8), axis=1, dtype=jnp.uint8)


def count(mask: jax.Array) -> jax.Array:
    """Number of True entries as int32, exact below 2^31.

    >>> int(count(jnp.array([True, False, True])))
    2
    """
    return jnp.sum(count_groups(_groups(mask, False)) if one_cpu_device() else mask, dtype=jnp.int32)
