"""Means of floats that do not depend on the order of summation, and so not on the mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.core import allocation, selection

Collapse = Callable[..., jax.Array]  # (array, initial value, lax operation): reduced


def mean_magnitude(values: jax.Array, where: jax.Array, collapse: Collapse, spread: Callable, size: int) -> jax.Array:
    r"""Mean \|value\| over groups of entries, as exact as 24 bits below the group's largest are.

    Each \|value\| becomes an integer of at most 24 bits: its significand, shifted to the exponent of the group's largest and
    rounded (halves up). The integers are summed in limbs so narrow that no 32-bit sum overflows, and the limbs' sums are put
    together by products with powers of two, which are exact, so that a contraction to a fused multiply-add changes nothing.

    Args:
      values: floats; those that are not finite count as 0.
      where: bool of that shape; entries that count.
      collapse: reduces an array to one value a group.
      spread: gives each entry its group's value.
      size: entries in the largest group.

    Returns:
      float32, one a group; 0 for a group without entries that count.
    """
    bits = jnp.where(where, selection.score_bits(values.astype(jnp.float32)), jnp.uint32(0))
    exponent = bits >> 23
    significand = (bits & 0x7FFFFF) | (jnp.minimum(exponent, 1) << 23)
    exponent = jnp.maximum(exponent, 1)  # denormals have the exponent of the smallest normal
    largest = collapse(exponent, 1, lax.max)
    shift = jnp.minimum(spread(largest) - exponent, 25)  # from 25 on nothing is left
    value = (significand + ((jnp.uint32(1) << shift) >> 1)) >> shift
    width = min(12, 32 - size.bit_length())
    total = jnp.zeros(largest.shape, jnp.float32)
    for low in range(0, 24, width):
        limb = collapse((value >> low) & (2**width - 1), 0, lax.add)
        total = total + limb.astype(jnp.float32) * 2.0**low
    number = jnp.maximum(collapse(where.astype(jnp.int32), 0, lax.add), 1).astype(jnp.float32)
    # value = |v| * 2^(150 - largest); 2^(largest - 150) is a denormal for small exponents, so two normal factors
    scale = lax.bitcast_convert_type(largest << 23, jnp.float32)  # 2^(largest - 127)
    return allocation.divide(total, number) * 2.0**-23 * scale
