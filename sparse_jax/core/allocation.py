"""Who gets the pruned weights: a budget of T weights shared out over the layers, exact, in integers, under jit.

Every quantity is an integer below 2^31 except totals over the layers, which may be larger and are kept as a pair (high, low) that
means high * 2^16 + low. Floating point enters only as one correctly rounded division, so the result has the same bits whatever the
mesh, and a program in any other language can repeat it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.core.numerics import Amount as Amount
from sparse_jax.core.numerics import add as add
from sparse_jax.core.numerics import at_most, divide, multiply_divide, saturated, subtract, total

MAX_LAYERS = 2047  # their weights, of at most 2^20 each, must add up to less than 2^31


class Weights(NamedTuple):
    """Shares of the layers as integers; `total` is their sum, 0 where no share is usable."""

    weight: jax.Array  # int32[layers], 0 to 2^20
    total: jax.Array  # int32


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


def first_come(amount: Amount, most: jax.Array) -> jax.Array:
    """An amount given out to the layers in order, to each as much as it takes: int32[layers].

    >>> first_come((jnp.uint32(0), jnp.uint32(5)), jnp.array([2, 4, 3])).tolist()
    [2, 3, 0]
    """

    def give(left, takes):
        given = jnp.minimum(saturated(left), takes.astype(jnp.uint32))
        return subtract(left, (given >> 16, given & 0xFFFF)), given.astype(jnp.int32)

    return lax.scan(give, amount, most)[1]


def prune_counts(
    rate: jax.Array, nonzeros: jax.Array, missing: jax.Array, prunable: jax.Array, shares: Weights | None, *, keep_one: bool = True
) -> jax.Array:
    r"""How many weights each layer prunes: :math:`r_l = \min(\lceil p_l n_l \rceil, \text{prunable}_l, n_l - 1)`, at least 0.

    The rate :math:`p_l` is the schedule's, but a layer with sparsity under 0.2 and a share above average prunes at most the
    part that it is missing, so that a nearly dense layer is not emptied only to be refilled. All vectors are int32[layers];
    ``shares=None``, where nothing is redistributed, holds no layer back. ``keep_one=False``: all :math:`n_l` may go, as many come back.
    """
    count = jnp.ceil(rate * nonzeros.astype(jnp.float32)).astype(jnp.int32)
    if shares is not None:
        sizes = nonzeros + missing
        nearly_dense = missing <= (sizes - 1) // 5  # 5 * missing < size, without overflow
        above_average = (shares.total > 0) & (shares.weight * len(shares.weight) > shares.total)
        sparsity = divide(missing.astype(jnp.float32), sizes.astype(jnp.float32))
        capped = jnp.ceil(jnp.minimum(rate, sparsity) * nonzeros.astype(jnp.float32)).astype(jnp.int32)
        count = jnp.where(nearly_dense & above_average, capped, count)
    return jnp.maximum(jnp.minimum(count, jnp.minimum(prunable, nonzeros - 1 if keep_one else nonzeros)), 0)


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
        candidate = extra | (jnp.uint32(1) << jnp.asarray(30 - i, jnp.uint32))
        return jnp.where(at_most(total(jnp.minimum(room, base + candidate)), amount), candidate, extra)

    extra = lax.fori_loop(0, 31, bit, jnp.uint32(0))
    target = jnp.minimum(room, base + extra)
    left = saturated(subtract(amount, total(target)))  # fewer than there are layers with room, if there are any
    order = jnp.where(target < room, remainder.astype(jnp.int32), -1)
    earlier = jnp.arange(len(order))[None, :] < jnp.arange(len(order))[:, None]
    ahead = (order[None, :] > order[:, None]) | ((order[None, :] == order[:, None]) & earlier)
    last = (target < room) & (jnp.sum(ahead, axis=1, dtype=jnp.uint32) < left)
    return (target + last).astype(jnp.int32)


def whole_units(amount: Amount, shares: Weights, room: jax.Array, weights_of_unit: jax.Array) -> jax.Array:
    """As :func:`share_out`, an amount of weights, where a layer takes only whole units of so many weights each: int32[layers] units.

    Each layer takes the whole units of what it would be given. Of what is left over one unit each goes to the layers with room, the largest
    rest first, and then as many as fit to the layers with room, the widest units first. The sum is never above the amount, and what is
    missing is less than a unit of any layer with room.

    >>> whole_units(total(jnp.array([10])), weights(jnp.array([1.0, 1.0])), jnp.array([9, 9]), jnp.array([4, 3])).tolist()
    [1, 2]
    """
    given = share_out(amount, shares, room * weights_of_unit)
    units, rest = given // weights_of_unit, given % weights_of_unit
    left = subtract(amount, total(units * weights_of_unit))

    def give(most: int, order: jax.Array, left: Amount, units: jax.Array):
        def to_layer(left, layer):
            width = weights_of_unit[layer].astype(jnp.uint32)
            fits = (saturated(left) // width).astype(jnp.int32)
            takes = jnp.minimum(jnp.minimum(fits, most), room[layer] - units[layer])
            spent = takes.astype(jnp.uint32) * width
            return subtract(left, (spent >> 16, spent & 0xFFFF)), takes

        left, takes = lax.scan(to_layer, left, order)
        return left, units + jnp.zeros_like(units).at[order].set(takes)

    left, units = give(1, jnp.argsort(-rest, stable=True), left, units)
    return give(2**30, jnp.argsort(-weights_of_unit, stable=True), left, units)[1]


def growth_targets(amount: Amount, regrown: jax.Array, shares: Weights | None, room: jax.Array) -> jax.Array:
    """How many weights each layer grows: int32[layers] that add up to the amount (:func:`share_out`).

    Without shares, or where they are all zero, each layer grows what it gave up: as many as it pruned, where the density is constant.

    >>> regrown = jnp.array([4, 4])
    >>> growth_targets(total(regrown), regrown, weights(jnp.array([3.0, 1.0])), jnp.array([5, 9])).tolist()
    [5, 3]
    """
    if shares is None:
        return regrown
    return jnp.where(shares.total > 0, share_out(amount, shares, room), regrown)


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
