"""Convolutions between images that lie by lanes, on the C++ kernels, with what stands around them done on the way.

A lane holds one image: 16 images of a batch side by side, [batch / 16, height, width, channels, 16]. The kernels read such images without
transposing anything, and whatever is elementwise takes any layout alike. A convolution of them can also

- take max((x - mean) scale + bias, 0) of its input's channels: batch normalisation and ReLU, while it packs what it reads;
- add a residual, and give mean and variance of its output's channels: while it writes.

So the activations are written once and read once where plain XLA goes over them five times.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core import target
from sparse_jax.core.granularity import Unstructured
from sparse_jax.kernels import arguments, compact
from sparse_jax.kernels.cpu import operations as cpu
from sparse_jax.kernels.layout import Layout
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.reference import Geometry

BATCH = 16
MOST_POOLED = 16  # pixels of a window that the kernel takes


def lanes_unavailable(batch: int, dtype) -> str:
    """Why images cannot lie by lanes here; empty where they can."""
    if target.platform() != 'cpu':
        return f'it runs on CPU, not on {target.platform()}'
    if batch % BATCH:
        return f'the batch of {batch} is no multiple of {BATCH}'
    return cpu.unsupported(dtype, Unstructured())


def to_lanes(x: jax.Array) -> jax.Array:
    """[batch, ..., channels] to [batch / 16, ..., channels, 16].

    >>> to_lanes(jnp.zeros((32, 8, 8, 3))).shape
    (2, 8, 8, 3, 16)
    """
    return jnp.moveaxis(x.reshape(len(x) // BATCH, BATCH, *x.shape[1:]), 1, -1)


def from_lanes(x: jax.Array) -> jax.Array:
    """The inverse of :func:`to_lanes`."""
    return jnp.moveaxis(x, -1, 1).reshape(len(x) * BATCH, *x.shape[1:-1])


def convolve_by_lanes(
    x: jax.Array,
    activation: jax.Array | None,
    w: jax.Array,
    residual: jax.Array | None,
    pattern: Pattern | Layout | None,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = 'SAME',
    statistics: bool = False,
) -> tuple[jax.Array, jax.Array]:
    r"""2D convolution of :math:`\max((x - \mu) s + b, 0)`, plus a residual, between images by lanes, on the C++ kernels.

    Args:
      x: float32[batch / 16, height, width, in, 16]: see :func:`to_lanes`, and :func:`lanes_unavailable` for where it runs.
      activation: float32[3, in]: :math:`\mu`, s and b of each channel; None: x as it is.
      w: float32[height, width, in, out], zero off the pattern; or the values of a compact one.
      residual: float32 of the result's shape, added to it; None: nothing.
      pattern: of w, by which its gradient is dense or not; the layout of compact values; None: w is dense.
      strides: as in :func:`sparse_conv`.
      padding: as in :func:`sparse_conv`; it surrounds what the activation made of x with zeros.
      statistics: whether the second result is wanted.

    Returns:
      [batch / 16, height', width', out, 16]; and mean and (biased) variance of its channels, float32[2, out], or of no size.

    Raises:
      ValueError: for other shapes or types, as :func:`sparse_conv`, and where :func:`lanes_unavailable` says that nothing by lanes runs.

    Reference: Ioffe and Szegedy, Batch normalization, 2015; Chan et al., Updating formulae for computing sample variances, 1979.
    """
    _check_lanes('convolve_by_lanes', x, activation)
    name, w_shape = 'convolve_by_lanes', pattern.shape if isinstance(pattern, Layout) else w.shape
    if len(w_shape) != 4 or w.dtype != jnp.float32 or w_shape[2] != x.shape[3]:
        raise ValueError(
            f'{name}: w must be float32[height, width, {x.shape[3]}, out], got {w.dtype}{list(w_shape)} for x of {list(x.shape)}.'
        )
    shape = x.shape[0] * BATCH, *x.shape[1:4]
    geometry = arguments.geometry_of(name, shape, w_shape, strides, padding, (1, 1))
    probe, is_dense = None, pattern is None
    if isinstance(pattern, Layout):
        probe, pattern = pattern.probe, dataclasses.replace(pattern, probe=None)
        arguments.check_compact(name, jax.ShapeDtypeStruct(shape, x.dtype), w, pattern, 4, probe, False)
        compact.check_probe(name, probe, pattern)
    elif pattern is not None:
        arguments.check_product(name, jax.ShapeDtypeStruct(shape, x.dtype), w, pattern, 4)
        arguments.check_zeros(w, pattern)
        is_dense = pattern.dense_gradient
        if pattern.observer is not None:
            pattern.observer(x, w, pattern, geometry)
    expected = (x.shape[0], *geometry.output_shape(shape, w_shape)[1:], BATCH)
    if residual is not None and (residual.shape != expected or residual.dtype != jnp.float32):
        raise ValueError(
            f'convolve_by_lanes: residual must be float32{list(expected)}, as the result, got {residual.dtype}{list(residual.shape)}.'
        )
    return _convolve(x, activation, w, residual, pattern, probe, Statics(geometry, tuple(w_shape), statistics, is_dense))


def max_pool_by_lanes(x: jax.Array, activation: jax.Array | None, window: tuple[int, int]) -> jax.Array:
    r"""Maxima over windows that do not overlap of :math:`\max((x - \mu) s + b, 0)`, between images by lanes, on the C++ kernels.

    Args:
      x: float32[batch / 16, height, width, channels, 16]; what fills no window is left out.
      activation: as in :func:`convolve_by_lanes`.
      window: rows and columns, of at most 16 pixels.

    Returns:
      [batch / 16, height / rows, width / columns, channels, 16].

    Raises:
      ValueError: for other shapes or types, a larger window, and where :func:`lanes_unavailable` says that nothing by lanes runs.
    """
    _check_lanes('max_pool_by_lanes', x, activation)
    if len(window) != 2 or min(window) < 1 or math.prod(window) > MOST_POOLED:
        raise ValueError(f'max_pool_by_lanes: window={window!r} must be rows and columns of at most {MOST_POOLED} pixels together.')
    return _max_pool(x, activation, tuple(window))


def _check_lanes(name: str, x: jax.Array, activation: jax.Array | None) -> None:
    """The C++ kernels read as much as these shapes say."""
    if x.ndim != 5 or x.shape[-1] != BATCH or x.dtype != jnp.float32:
        raise ValueError(
            f'{name}: x must be float32[batch / {BATCH}, height, width, channels, {BATCH}] as to_lanes makes it, '
            f'got {x.dtype}{list(x.shape)}.'
        )
    if reason := lanes_unavailable(BATCH, x.dtype):
        raise ValueError(f'{name}: there are no kernels by lanes here: {reason}. Take images by channels, and sparse_conv.')
    if activation is not None and (activation.shape != (3, x.shape[3]) or activation.dtype != jnp.float32):
        raise ValueError(
            f'{name}: activation must be float32[3, {x.shape[3]}]: mean, scale and bias, got {activation.dtype}{list(activation.shape)}.'
        )


class Statics(NamedTuple):
    """What :func:`convolve_by_lanes` is compiled for."""

    geometry: Geometry
    w_shape: tuple[int, ...]  # of the whole weight
    statistics: bool
    dense_gradient: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _convolve(x, activation, w, residual, pattern: Pattern | Layout | None, probe, statics: Statics) -> tuple[jax.Array, jax.Array]:
    """[groups, height, width, in, 16] to [groups, height', width', out, 16], and mean and variance of its channels [2, out].

    Args:
      x: images by lanes.
      activation: float32[3, in]: mean, scale and bias of its normalisation, which ReLU follows; None: x as it is.
      w: [height, width, in, out], zero off the pattern; or compact values.
      residual: added to the output; None: nothing.
      pattern: of w; None: w is dense.
      probe: of a layout, or None.
      statics: geometry; whether statistics are wanted (else they are of no size); whether w's gradient is wanted at all positions.
    """
    del probe
    groups, *shape = statics.geometry.output_shape(x.shape[:4], statics.w_shape)
    shapes = (groups, *shape, BATCH), ((2, statics.w_shape[3]) if statics.statistics else (0,))
    operands = x, _or_nothing(activation), w, cpu.LISTS, _or_nothing(residual)
    y, moments = cpu.call('forward', shapes, *operands, pattern=pattern, geometry=statics.geometry)
    return y, moments


def _d_activation(activation: jax.Array | None, sums: jax.Array) -> jax.Array | None:
    """Its gradient [3, channels] from the sums of g and of g (x - mean), g being the gradient of what ReLU lets through."""
    return None if activation is None else jnp.stack([-activation[1] * sums[0], sums[1], sums[0]])


def _or_nothing(x: Any) -> jax.Array:
    return cpu.nothing() if x is None else x


def _forward(x, activation, w, residual, pattern, probe, statics):
    results: Any = _convolve(x, activation, w, residual, pattern, probe, statics)
    y, moments = results
    kept = (y, moments) if statics.statistics else None
    return (y, moments), (x, activation, w, residual is not None, pattern, probe, kept)


def _backward(statics, residuals, gradients):
    x, activation, w, has_residual, pattern, probe, kept = residuals
    dy, d_moments = gradients
    if kept is not None:  # mean = sum(y) / n, variance = sum((y - mean)^2) / n, whose derivative by the mean is zero
        y, moments = kept
        count = math.prod(y.shape) / y.shape[3]
        shift, slope = d_moments[0] / count, 2 * d_moments[1] / count
        dy = dy + (shift - slope * moments[0])[:, None] + slope[:, None] * y
    options = dict(geometry=statics.geometry)
    taken = (_or_nothing(x) if activation is not None else cpu.nothing()), _or_nothing(activation)
    sums_shape = (0,) if activation is None else (2, x.shape[3])
    dx, sums = cpu.call('input_gradient', (x.shape, sums_shape), dy, *taken, w, cpu.LISTS, pattern=pattern, **options)
    listed = None if statics.dense_gradient else pattern
    gradient = lambda shape, listed: cpu.call('weight_gradient', (shape,), x, taken[1], dy, cpu.LISTS, pattern=listed, **options)[0]
    scores = None
    if probe is not None:
        score = lambda dw: compact.scores_of_gradient(dw, dataclasses.replace(pattern, indices=None, pointers=None))
        score = score if isinstance(pattern.granularity, Unstructured) else compact.of_whole_batches(score, probe)
        scores = score(gradient(statics.w_shape, None)).astype(probe.dtype)
    return dx, _d_activation(activation, sums), gradient(w.shape, listed), (dy if has_residual else None), None, scores


_convolve.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _max_pool(x: jax.Array, activation: jax.Array | None, window: tuple[int, int]) -> jax.Array:
    """Maxima over windows that do not overlap, of at most 16 pixels: [groups, height, width, channels, 16] to the same of fewer pixels.

    Args:
      x: images by lanes; what fills no window is left out.
      activation: as in :func:`convolve_by_lanes`, of x before the maximum.
      window: rows and columns.
    """
    groups, height, width, *rest = x.shape
    shape = groups, height // window[0], width // window[1], *rest
    call = cpu.kernel('pool', jax.ShapeDtypeStruct(shape, jnp.float32), window=np.array(window, np.int64))
    return call(x, _or_nothing(activation))


def _pool_backward(window, residuals, dy):
    x, activation = residuals
    sums_shape = (0,) if activation is None else (2, x.shape[3])
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x.shape, sums_shape)]
    dx, sums = cpu.kernel('pool_gradient', shapes, window=np.array(window, np.int64))(x, _or_nothing(activation), dy)
    return dx, _d_activation(activation, sums)


_max_pool.defvjp(lambda x, activation, window: (_max_pool(x, activation, window), (x, activation)), _pool_backward)
