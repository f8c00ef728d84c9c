"""Who gets the pruned weights: a budget of T weights shared out over the layers, exact, in integers, under jit.

Every quantity is an integer below 2^31 except totals over the layers, which may be larger and are kept as a pair (high, low) that
means high * 2^16 + low. Floating point enters only as one correctly rounded division, so the result has the same bits whatever the
mesh, and a program in any other language can repeat it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Amount = tuple[jax.Array, jax.Array]  # uint32 scalars (high, low): high * 2^16 + low, the low below 2^16, the high below 2^32

MAX_LAYERS = 2047  # their weights, of at most 2^20 each, must add up to less than 2^31


class Weights(NamedTuple):
    """Shares of the layers as integers; `total` is their sum, 0 where no share is usable."""

    weight: jax.Array  # int32[layers], 0 to 2^20
    total: jax.Array  # int32


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Correctly rounded float32 quotient of arrays that broadcast.

    XLA turns a division by a constant or by a broadcast scalar into a multiplication by its reciprocal, which rounds twice. The
    barrier hides from it that the denominator is one.
    """
    return numerator / lax.optimization_barrier(jnp.broadcast_to(denominator, jnp.shape(numerator)))


def weights(shares: jax.Array) -> Weights:
    r"""Shares, float32[layers] of any scale, as integers: :math:`w_l = \mathrm{round}(2^{20} s_l / \max_k s_k)`, halves to even.

    Negative shares and those that are not finite count as 0.

    >>> weights(jnp.array([1.0, 0.5, jnp.nan])).weight.tolist()
    [1048576, 524288, 0]
    """
    shares = jnp.where(jnp.isfinite(shares) & (shares > 0), shares, 0.0)
    largest = jnp.max(shares)
    ratio = divide(shares, jnp.where(largest > 0, largest, 1.0))
    weight = jnp.round(ratio * 2.0**20).astype(jnp.int32)  # exact: a power of two
    return Weights(weight, jnp.sum(weight, dtype=jnp.int32))


def total(x: jax.Array) -> Amount:
    """Exact sum of up to 2^11 integers in [0, 2^32).

    >>> [int(part) for part in total(jnp.array([2**32 - 1, 2**32 - 1], jnp.uint32))]
    [131071, 65534]
    """
    x = x.astype(jnp.uint32)
    low = jnp.sum(x & 0xFFFF, dtype=jnp.uint32)
    return jnp.sum(x >> 16, dtype=jnp.uint32) + (low >> 16), low & 0xFFFF


def at_most(a: Amount, b: Amount) -> jax.Array:
    """Whether a <= b."""
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))


def add(a: Amount, b: Amount) -> Amount:
    """a + b."""
    low = a[1] + b[1]
    return a[0] + b[0] + (low >> 16), low & 0xFFFF


def subtract(a: Amount, b: Amount) -> Amount:
    """a - b, or zero where that would be negative."""
    borrow = (a[1] < b[1]).astype(jnp.uint32)
    negative = ~at_most(b, a)
    zero = jnp.uint32(0)
    return jnp.where(negative, zero, a[0] - b[0] - borrow), jnp.where(negative, zero, (borrow << 16) + a[1] - b[1])


def _small(a: Amount) -> jax.Array:
    """The amount as one uint32, 2^31 where it is larger."""
    return jnp.where(a[0] >= 2**15, jnp.uint32(2**31), (a[0] << 16) | a[1])


def first_come(amount: Amount, most: jax.Array) -> jax.Array:
    """An amount given out to the layers in order, to each as much as it takes: int32[layers].

    >>> first_come((jnp.uint32(0), jnp.uint32(5)), jnp.array([2, 4, 3])).tolist()
    [2, 3, 0]
    """

    def give(left, takes):
        given = jnp.minimum(_small(left), takes.astype(jnp.uint32))
        return subtract(left, (given >> 16, given & 0xFFFF)), given.astype(jnp.int32)

    return lax.scan(give, amount, most)[1]


def multiply_divide(amount: tuple[jax.Array, jax.Array], weight: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Quotient and remainder of amount * weight / total, exact, by long division.

    With the bits b of the amount taken from the top, :math:`a' = 2a + b`, and :math:`a w = q W + r`, so
    :math:`a' w = 2q W + (2r + b w)`: double, add, and subtract W where it fits. As r < W and w <= W < 2^31 nothing overflows.

    Args:
      amount: (high, low), uint32 scalars, below 2^48.
      weight: uint32[n], each at most the total.
      total: uint32 scalar, positive, below 2^31.

    Returns:
      uint32[n] quotients, 2^31 - 1 where they would be larger, and uint32[n] remainders (meaningful where they are not).
    """
    limit = jnp.uint32(2**31 - 1)
    high, low = amount

    def reduce(quotient, remainder):
        carry = (remainder >= total).astype(jnp.uint32)
        return jnp.minimum(quotient + carry, limit), remainder - carry * total

    def bit(i, state):
        position = jnp.uint32(47) - i.astype(jnp.uint32)
        set_ = jnp.where(position >= 16, high >> (position - 16), low >> position) & 1
        quotient, remainder = state
        quotient, remainder = reduce(2 * quotient, 2 * remainder)
        return reduce(quotient, remainder + set_ * weight)

    zeros = jnp.zeros_like(weight)
    return lax.fori_loop(0, 48, bit, (zeros, zeros))


def prune_counts(
    rate: jax.Array, nonzeros: jax.Array, missing: jax.Array, prunable: jax.Array, shares: Weights | None
) -> jax.Array:
    r"""How many weights each layer prunes: :math:`r_l = \min(\lceil p_l n_l \rceil, \text{prunable}_l, n_l - 1)`, at least 0.

    The rate :math:`p_l` is the schedule's, but a layer with sparsity under 0.2 and a share above average prunes at most the
    part that it is missing, so that a nearly dense layer is not emptied only to be refilled. All vectors are int32[layers];
    ``shares=None``, where nothing is redistributed, holds no layer back.
    """
    count = jnp.ceil(rate * nonzeros.astype(jnp.float32)).astype(jnp.int32)
    if shares is not None:
        sizes = nonzeros + missing
        nearly_dense = missing <= (sizes - 1) // 5  # 5 * missing < size, without overflow
        above_average = (shares.total > 0) & (shares.weight * len(shares.weight) > shares.total)
        sparsity = divide(missing.astype(jnp.float32), sizes.astype(jnp.float32))
        capped = jnp.ceil(jnp.minimum(rate, sparsity) * nonzeros.astype(jnp.float32)).astype(jnp.int32)
        count = jnp.where(nearly_dense & above_average, capped, count)
    return jnp.maximum(jnp.minimum(count, jnp.minimum(prunable, nonzeros - 1)), 0)


def share_out(amount: Amount, shares: Weights, room: jax.Array) -> jax.Array:
    r"""An amount T given out to the layers in proportion to their shares, none getting more than its room: int32[layers].

    With the integer shares w of sum W, layer l asks for :math:`b_l = \min(c_l, \lfloor T w_l / W \rfloor)` where :math:`c_l` is
    its room. What is left is spread equally: :math:`\lambda` is the largest integer with :math:`\sum_l \min(c_l, b_l + \lambda) \le
    T`. The last few go one each to the layers with room and the largest remainder of :math:`T w_l / W`, the lowest layer first.
    It is the fixed point of the original's repeated spreading, without its 0.99. The sum is exactly T, or all the room.

    >>> share_out(total(jnp.array([8])), weights(jnp.array([3.0, 1.0])), jnp.array([5, 9])).tolist()
    [5, 3]
    """
    weight = shares.weight.astype(jnp.uint32)
    quotient, remainder = multiply_divide(amount, weight, jnp.maximum(shares.total, 1).astype(jnp.uint32))
    room = room.astype(jnp.uint32)
    base = jnp.minimum(room, quotient)

    def bit(i, extra):
        candidate = extra | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        return jnp.where(at_most(total(jnp.minimum(room, base + candidate)), amount), candidate, extra)

    extra = lax.fori_loop(0, 31, bit, jnp.uint32(0))
    target = jnp.minimum(room, base + extra)
    left = _small(subtract(amount, total(target)))  # fewer than there are layers with room, if there are any
    order = jnp.where(target < room, remainder.astype(jnp.int32), -1)
    earlier = jnp.arange(len(order))[None, :] < jnp.arange(len(order))[:, None]
    ahead = (order[None, :] > order[:, None]) | ((order[None, :] == order[:, None]) & earlier)
    last = (target < room) & (jnp.sum(ahead, axis=1, dtype=jnp.uint32) < left)
    return (target + last).astype(jnp.int32)


def growth_targets(amount: Amount, own: jax.Array, shares: Weights | None, room: jax.Array) -> jax.Array:
    """How many weights each layer grows: int32[layers] that add up to the amount (:func:`share_out`).

    Without shares, or where they are all zero, each layer grows its own: as many as it pruned, where the density is constant.

    >>> own = jnp.array([4, 4])
    >>> growth_targets(total(own), own, weights(jnp.array([3.0, 1.0])), jnp.array([5, 9])).tolist()
    [5, 3]
    """
    if shares is None:
        return own
    return jnp.where(shares.total > 0, share_out(amount, shares, room), own)


def decreases(amount: Amount, nonzeros: jax.Array, prunable: jax.Array, final: jax.Array) -> jax.Array:
    """How many weights each layer gives up when the density falls: int32[layers] that add up to the amount.

    A layer gives in proportion to what it has above its final count, so that all arrive there together; what cannot be had in
    this way is taken from whatever layer has weights left. No layer gives its last one.

    >>> decreases(total(jnp.array([12])), jnp.array([20, 8]), jnp.array([20, 8]), jnp.array([2, 2])).tolist()
    [9, 3]
    """
    most = jnp.maximum(jnp.minimum(prunable, nonzeros - 1), 0)
    above = jnp.maximum(nonzeros - final, 0)
    given = share_out(amount, weights(above.astype(jnp.float32)), jnp.minimum(above, most))
    rest = most - given
    return given + share_out(subtract(amount, total(given)), weights(rest.astype(jnp.float32)), rest)
