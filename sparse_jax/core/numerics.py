"""Arithmetic whose result has the same bits in whatever order it is done, and so on every mesh.

Wide integers, which no 32-bit sum overflows; a division that is rounded once; the bits of floats as integers of the same order; means
that are summed exactly; and reductions in the form that each platform does quickly.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType

from sparse_jax.core import target

# --- wide integers: uint32 scalars (high, low) that mean high * 2^16 + low, the low below 2^16, the high below 2^32

Amount = tuple[jax.Array, jax.Array]


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


def saturated(a: Amount) -> jax.Array:
    """The amount as one uint32, 2^31 where it is larger."""
    return jnp.where(a[0] >= 2**15, jnp.uint32(2**31), (a[0] << 16) | a[1])


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
        position = jnp.uint32(47) - jnp.asarray(i, jnp.uint32)  # under jax.disable_jit i is a Python integer
        set_ = jnp.where(position >= 16, high >> (position - 16), low >> position) & 1
        quotient, remainder = state
        quotient, remainder = reduce(2 * quotient, 2 * remainder)
        return reduce(quotient, remainder + set_ * weight)

    zeros = jnp.zeros_like(weight)
    return lax.fori_loop(0, 48, bit, (zeros, zeros))


# --- floats


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Correctly rounded float32 quotient of arrays that broadcast.

    XLA turns a division by a constant or by a broadcast scalar into a multiplication by its reciprocal, which rounds twice. The
    barrier hides from it that the denominator is one.
    """
    return numerator / lax.optimization_barrier(jnp.broadcast_to(denominator, jnp.shape(numerator)))


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


_P = ParamSpec('_P')
_R = TypeVar('_R')


def lenient(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs a function under jax's standard promotion of ranks and dtypes, where its users have made jax strict about their own."""

    @functools.wraps(function)
    def run(*args: _P.args, **keywords: _P.kwargs) -> _R:
        with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
            return function(*args, **keywords)

    return run


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
    bits = jnp.where(where, score_bits(values.astype(jnp.float32)), jnp.uint32(0))
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
    return divide(total, number) * 2.0**-23 * scale


# --- reductions of whole layers

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


# --- where arrays lie


def placed_like(param: Any, x: jax.Array) -> jax.Array:
    """An array of a parameter's shape where the parameter lies; under jit with automatic axes XLA decides."""
    if isinstance(param, jax.Array) and not isinstance(param, Tracer) and param.committed:
        return jax.device_put(x, param.sharding)
    return sharded_like(param, x)


def replicated_over(params: Any, tree: Any) -> Any:
    """A tree of arrays, those that lie nowhere yet replicated over the mesh of concrete params, as a step will return them."""
    shardings = [p.sharding for p in jax.tree.leaves(params) if isinstance(p, jax.Array) and not isinstance(p, Tracer)]
    meshes = [s.mesh for s in shardings if isinstance(s, jax.NamedSharding)]
    if not meshes:
        return tree
    everywhere = lambda x: jax.NamedSharding(meshes[0], jax.P(*[None] * x.ndim))
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, everywhere(x)), tree)


def sharded_like(param: Any, x: jax.Array) -> jax.Array:
    """An array of a parameter's shape with its sharding, where that is part of its type (explicit axes of a mesh)."""
    sharding = jax.typeof(param).sharding if isinstance(param, jax.Array) else None
    if isinstance(sharding, jax.NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return x


def replicated(x: jax.Array) -> jax.Array:
    """A small array on all devices, where its sharding is part of its type (explicit axes of a mesh)."""
    sharding = jax.typeof(x).sharding
    if isinstance(sharding, jax.NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(*[None] * x.ndim)))
    return x
