"""What is read of a jaxpr: the functions that an equation calls, and how often a product uses each entry of its operands."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PRODUCTS = {'dot_general': 'matrix', 'conv_general_dilated': 'convolution'}


def body(jaxpr):
    """The jaxpr itself, of a closed one too."""
    return getattr(jaxpr, 'jaxpr', jaxpr)


def called(eqn):
    """Returns the jaxpr of a call (jit, checkpoint, custom_jvp_call, custom_vjp_call, ...), closed where that is, or None."""
    return next((eqn.params[key] for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if key in eqn.params), None)


def is_key(x) -> bool:
    """Whether an array holds random keys, which are no numbers."""
    return jnp.issubdtype(getattr(x, 'dtype', np.dtype('float32')), jax.dtypes.prng_key)


def scan(eqn) -> tuple[Any, int, int, int]:
    """Of a scan: the jaxpr of a round, how many there are, and how many of its arguments are constants and carried.

    Counted by shapes, since the names of these numbers differ between versions of jax: what is scanned has one axis more outside.
    """
    inner = body(eqn.params['jaxpr'])
    num_rows = sum(outside.aval.ndim > inside.aval.ndim for outside, inside in zip(eqn.invars, inner.invars, strict=True))
    num_carry = sum(outside.aval.ndim == inside.aval.ndim for outside, inside in zip(eqn.outvars, inner.outvars, strict=True))
    return inner, eqn.params['length'], len(eqn.invars) - num_carry - num_rows, num_carry


def has_products(jaxpr) -> bool:
    """Whether there is a product in a jaxpr, or in any that it calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            return True
        inner = [v for p in eqn.params.values() for v in (p if isinstance(p, (tuple, list)) else [p])]
        if any(hasattr(body(v), 'eqns') and has_products(body(v)) for v in inner):
            return True
    return False


def uses(eqn) -> tuple[Any, Any, int]:
    """How often a product uses each entry of its left and of its right operand, and its number of multiply-adds.

    Those of a convolution's kernel are an array of its shape, since padding is not counted.
    """
    return _uses_in_dot(eqn) if eqn.primitive.name == 'dot_general' else _uses_in_convolution(eqn)


def _uses_in_dot(eqn):
    left, right = (v.aval for v in eqn.invars)
    contracted = [left.shape[i] for i in eqn.params['dimension_numbers'][0][0]]
    total = math.prod(eqn.outvars[0].aval.shape) * math.prod(contracted)
    return total // max(left.size, 1), total // max(right.size, 1), total


def _uses_in_convolution(eqn):
    image, kernel = (v.aval for v in eqn.invars)
    out, p = eqn.outvars[0].aval, eqn.params
    numbers = p['dimension_numbers']
    use = np.array(image.shape[numbers.lhs_spec[0]] // p['batch_group_count'], np.int64)
    shape = [1] * kernel.ndim
    for axis in range(len(p['window_strides'])):
        kernel_axis, side = numbers.rhs_spec[2 + axis], image.shape[numbers.lhs_spec[2 + axis]]
        taps, positions = kernel.shape[kernel_axis], out.shape[numbers.out_spec[2 + axis]]
        pixel = (
            np.arange(positions)[None, :] * p['window_strides'][axis]
            + np.arange(taps)[:, None] * p['rhs_dilation'][axis]
            - p['padding'][axis][0]
        )
        inside = (pixel >= 0) & (pixel <= (side - 1) * p['lhs_dilation'][axis]) & (pixel % p['lhs_dilation'][axis] == 0)
        along_axis = list(shape)
        along_axis[kernel_axis] = taps
        use = use * inside.sum(1).reshape(along_axis)
    use = np.broadcast_to(use, kernel.shape)
    total = int(use.sum(dtype=np.int64))
    return total // max(image.size, 1), use, total
