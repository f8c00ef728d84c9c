"""What decides which weights are pruned, which are grown, and how much each layer is worth.

A criterion is a plain function of one layer's :class:`LeafInfo`. Prune and grow criteria return non-negative scores of the layer's
shape: the smallest scores are pruned, the largest grown, and scores that are not finite count as 0. Redistribute criteria return
one number, the layer's share, on any scale that the layers have in common. Writing one takes a line::

    def magnitude_times_momentum(info):
        return jnp.abs(info.weight) * jnp.abs(info.momentum)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax import redistribution, selection


class LeafInfo(NamedTuple):
    """What a criterion sees of one layer. All arrays have the layer's shape; its last axis is its outputs."""

    weight: jax.Array  # after the inner optimizer's step: p + u, in p's dtype, on all positions
    mask: jax.Array  # bool, the active positions: before the pruning for prune and redistribute, after it for grow
    gradient: jax.Array  # as given to the optimizer
    momentum: jax.Array  # signed, dense: that of missing weights too
    key: jax.Array  # a typed random key of this layer and update


def magnitude(info: LeafInfo) -> jax.Array:
    """Prune by |weight|.

    >>> magnitude(LeafInfo(jnp.array([1.0, -2.0]), None, None, None, None)).tolist()
    [1.0, 2.0]
    """
    return jnp.abs(info.weight)


def momentum(info: LeafInfo) -> jax.Array:
    """Grow by |momentum|: the paper's rule (Dettmers and Zettlemoyer, https://arxiv.org/abs/1907.04840)."""
    return jnp.abs(info.momentum)


def gradient(info: LeafInfo) -> jax.Array:
    """Grow by |gradient| of the update's own step (RigL: Evci et al., https://arxiv.org/abs/1911.11134)."""
    return jnp.abs(info.gradient)


def random(info: LeafInfo) -> jax.Array:
    """Grow at random, by scores uniform in [0, 1) (SET: Mocanu et al., https://arxiv.org/abs/1707.04780)."""
    return jax.random.uniform(info.key, info.weight.shape)


def mean_momentum(info: LeafInfo) -> jax.Array:
    r"""Redistribute by the mean |momentum| of a layer's active weights: the paper's rule, summed exactly.

    A float sum depends on its order, and so on the mesh. Instead each \|m\| becomes an integer of at most 24 bits: its
    significand, shifted to the exponent of the layer's largest and rounded (halves up). The integers are summed in limbs so
    narrow that no 32-bit sum overflows, and the limbs' sums are put together by products with powers of two, which are exact, so
    that a contraction to a fused multiply-add changes nothing. Terms that are not finite count as 0.

    Args:
      info: the layer.

    Returns:
      float32 scalar; 0 for a layer without active weights.

    Example:
      >>> mask = jnp.array([True, True, False])
      >>> float(mean_momentum(LeafInfo(None, mask, None, jnp.array([1.0, -3.0, 9.0]), None)))
      2.0
    """
    bits = selection.score_bits(info.momentum.astype(jnp.float32))
    bits = jnp.where(info.mask, bits, jnp.uint32(0))
    exponent = bits >> 23
    significand = (bits & 0x7FFFFF) | (jnp.minimum(exponent, 1) << 23)
    exponent = jnp.maximum(exponent, 1)  # denormals have the exponent of the smallest normal
    largest = jnp.max(exponent, initial=1)
    shift = jnp.minimum(largest - exponent, 25)  # from 25 on nothing is left
    value = (significand + ((jnp.uint32(1) << shift) >> 1)) >> shift
    width = min(12, 32 - info.mask.size.bit_length())
    total = jnp.float32(0)
    for low in range(0, 24, width):
        limb = jnp.sum((value >> low) & (2**width - 1), dtype=jnp.uint32)
        total = total + limb.astype(jnp.float32) * 2.0**low
    active = jnp.maximum(selection.count(info.mask), 1).astype(jnp.float32)
    # value = |m| * 2^(150 - largest); 2^(largest - 150) is a denormal for small exponents, so two normal factors
    scale = lax.bitcast_convert_type(largest << 23, jnp.float32)  # 2^(largest - 127)
    return redistribution.divide(total, active) * 2.0**-23 * scale
