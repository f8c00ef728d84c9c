"""How large the dense weight gradient is in each block, for growth by blocks without a dense gradient in memory."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.core import errors, granularity
from sparse_jax.kernels import api, backend, reference
from sparse_jax.kernels.reference import Geometry

_WITH_KERNELS = ('reference', 'gpu', 'tpu')


def block_scores(
    x: jax.Array,
    dy: jax.Array,
    w_shape: Sequence[int],
    *,
    block: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = 'SAME',
    dilation: tuple[int, int] = (1, 1),
    implementation: str | None = None,
) -> jax.Array:
    r"""Sum of the absolute values of the dense weight gradient in each block: :math:`s_{tbc} = \sum_{i \in b, o \in c} |g_{tio}|`.

    What growth by gradient needs of blocks that do not exist. The kernels add up tile after tile of tokens and keep a block's sum only;
    the reference makes the dense gradient, in float32.

    Args:
      x: [..., in], or [batch, height, width, in] of a convolution; floating point.
      dy: gradient of the product's result, [..., out], of x's type.
      w_shape: of the weight: (in, out), or (height, width, in, out).
      block: inputs and outputs.
      strides: as in :func:`sparse_conv`; of no effect with a matrix product.
      padding: likewise.
      dilation: likewise.
      implementation: ``'reference'``, ``'gpu'`` or ``'tpu'``; None: the reference, which the dense product's speed makes the quicker one.

    Returns:
      float32[taps..., blocks of inputs, blocks of outputs].

    Raises:
      ValueError: if shapes, types or the block do not fit together, or there is no such implementation.
      NotImplementedError: if the implementation cannot take these operands, or does not run on this machine.

    Example:
      >>> import jax.numpy as jnp
      >>> block_scores(jnp.ones((3, 4)), jnp.ones((3, 2)), (4, 2), block=(2, 2))
      Array([[12.],
             [12.]], dtype=float32)

    Reference: Evci et al., Rigging the lottery, 2020.
    """
    w_shape, name = tuple(w_shape), implementation or 'reference'
    if name not in _WITH_KERNELS:
        raise errors.unknown('implementation', name, _WITH_KERNELS)
    fits = len(w_shape) in (2, 4) and x.shape[-1:] == w_shape[-2:-1] and dy.shape[-1:] == w_shape[-1:]
    if not fits or x.dtype != dy.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f'block_scores: x {x.dtype}{list(x.shape)}, dy {dy.dtype}{list(dy.shape)} and w_shape={w_shape} do not fit: x must be [..., in], '
            'dy [..., out] of the same floating type, and w_shape (in, out) or (height, width, in, out).'
        )
    block = _block(block)
    if reason := backend.unsupported(name, x.dtype, block):
        raise NotImplementedError(f'block_scores: implementation={name!r} does not run here: {reason}. Take implementation=None.')
    granularity.Block(*block).unit_shape(w_shape)  # ValueError for a block larger than the weight
    if len(w_shape) == 2:
        geometry, full = Geometry(), (1, 1, *w_shape)
        x, dy = x.reshape(-1, 1, 1, x.shape[-1]), dy.reshape(-1, 1, 1, dy.shape[-1])
    else:
        geometry, full = api.geometry_of('block_scores', x.shape, w_shape, strides, padding, dilation), w_shape
    if geometry.output_shape(x.shape, full) != dy.shape:
        raise ValueError(f'block_scores: dy has shape {dy.shape}, the product has {geometry.output_shape(x.shape, full)}.')
    if name == 'reference' or 0 in (x.size, dy.size):
        scores = _reference(x, dy, full, geometry, block)
    else:
        scores = backend.call('block_scores', name, x, dy, full, geometry, block)
    return scores[0, 0] if len(w_shape) == 2 else scores


def _block(block) -> tuple[int, int]:
    try:
        rows, columns = (operator.index(side) for side in block)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise ValueError(f'block_scores: block={block} must be two integers of at least 1: inputs and outputs, such as (64, 64).')
    return rows, columns


def _reference(x, dy, w_shape: tuple[int, ...], geometry: Geometry, block: tuple[int, int]) -> jax.Array:
    wide = reference.dense_weight_gradient(x.astype(jnp.float32), dy.astype(jnp.float32), w_shape, geometry)
    return granularity.Block(*block).collapse(jnp.abs(wide), 0, lax.add)
