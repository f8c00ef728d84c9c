"""How large the dense weight gradient is in each block, for growth by blocks without a dense gradient in memory."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparse_jax.core import errors
from sparse_jax.kernels import arguments, backend, builder
from sparse_jax.kernels.reference import Geometry


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
    if name not in backend.SCORING:
        raise errors.unknown('implementation', name, backend.SCORING)
    fits = len(w_shape) in (2, 4) and x.shape[-1:] == w_shape[-2:-1] and dy.shape[-1:] == w_shape[-1:]
    if not fits or x.dtype != dy.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f'block_scores: x {x.dtype}{list(x.shape)}, dy {dy.dtype}{list(dy.shape)} and w_shape={w_shape} do not fit: x must be [..., in], '
            'dy [..., out] of the same floating type, and w_shape (in, out) or (height, width, in, out).'
        )
    granularity = builder.as_block('block_scores', block)
    if reason := backend.unsupported(name, x.dtype, granularity):
        raise NotImplementedError(f'block_scores: implementation={name!r} does not run here: {reason}. Take implementation=None.')
    granularity.unit_shape(w_shape)  # ValueError for a block larger than the weight
    if len(w_shape) == 2:
        geometry, full = Geometry(), (1, 1, *w_shape)
        x, dy = (a.reshape(math.prod(a.shape[:-1]), 1, 1, a.shape[-1]) for a in (x, dy))
    else:
        geometry, full = arguments.geometry_of('block_scores', x.shape, w_shape, strides, padding, dilation), w_shape
    if geometry.output_shape(x.shape, full) != dy.shape:
        raise ValueError(f'block_scores: dy has shape {dy.shape}, the product has {geometry.output_shape(x.shape, full)}.')
    scoring = backend.SCORING['reference' if 0 in (x.size, dy.size) else name]
    scores = scoring.block_scores(x, dy, full, geometry, granularity.sides)
    return scores[0, 0] if len(w_shape) == 2 else scores
