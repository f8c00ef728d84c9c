"""Sparse matrix product and convolution with their gradients, over any backend."""

import functools
import math
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from sparse_jax.core import errors
from sparse_jax.kernels import backend, reference, sharded
from sparse_jax.kernels.cpu import lanes
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.reference import Geometry

# Functions (x, w, pattern, geometry) that are told of each product while it is traced: see choice.py.
observers: list[Callable[..., None]] = []


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _product(x, w, pattern: Pattern, geometry: Geometry, implementation: str, dense_gradient: bool):
    del dense_gradient
    return backend.run('forward', implementation, pattern, x, w, pattern, geometry)


def _product_forward(x, w, pattern, geometry, implementation, dense_gradient):
    return _product(x, w, pattern, geometry, implementation, dense_gradient), (x, w, pattern)


def _product_backward(geometry, implementation, dense_gradient, residuals, dy):
    x, w, pattern = residuals
    dx = backend.run('input_gradient', implementation, pattern, dy, w, pattern, geometry, x.shape)
    if dense_gradient:
        dw = reference.dense_weight_gradient(x, dy, w.shape, geometry)
    else:
        dw = backend.run('weight_gradient', implementation, pattern, x, dy, pattern, geometry, w.shape)
    return dx, dw, None


_product.defvjp(_product_forward, _product_backward)


def _check(name: str, x: jax.Array | jax.ShapeDtypeStruct, w: jax.Array, pattern: Pattern, axes: int) -> None:
    where = f' (layer {pattern.name})' if isinstance(pattern, Pattern) and pattern.name else ''
    if not isinstance(pattern, Pattern):
        raise ValueError(f'{name}: pattern must come from make_pattern, got {type(pattern).__name__}.')
    if w.ndim != axes or tuple(w.shape) != tuple(pattern.shape):
        raise ValueError(f'{name}: w has shape {tuple(w.shape)}, its pattern is of shape {tuple(pattern.shape)}{where}.')
    split = pattern.split
    if pattern.indices.ndim != 1 + (split is not None and split.axis is not None):
        raise ValueError(f'{name}: the pattern holds several layers, one a row{where}: take one row, as lax.scan does.')
    listed = pattern.pointers
    known = not isinstance(listed, Tracer) and getattr(listed, 'is_fully_addressable', True)
    if known and (units := int(np.asarray(listed).max())) > pattern.capacity:
        raise ValueError(
            f'{name}: the pattern lists {units} units and has room for {pattern.capacity}{where}: make it anew with make_pattern, whose '
            'at_least= keeps a capacity that suffices.'
        )
    if x.shape[-1] != w.shape[-2]:
        raise ValueError(
            f'{name}: x of shape {tuple(x.shape)} has {x.shape[-1]} features, w of shape {tuple(w.shape)} takes {w.shape[-2]}{where}.'
        )
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f'{name}: x and w must be of one floating-point type, got {x.dtype} and {w.dtype}{where}: cast one of them.'
        )
    if split is not None and x.shape[0] % split.mesh.shape['data']:
        raise ValueError(
            f"{name}: x has {x.shape[0]} rows, which the mesh's data={split.mesh.shape['data']} does not divide{where}."
        )


def _check_zeros(w: jax.Array, pattern: Pattern) -> None:
    """With SPARSE_JAX_DEBUG=1, at run time: the kernels do not read what is off the pattern, so it must be zero."""

    def check(count):
        if count:
            where = f' of {pattern.name}' if pattern.name else ''
            raise ValueError(
                f'the weight{where} of shape {pattern.shape} has {int(count)} nonzeros off its pattern: make the pattern of the same '
                'masks that the weight was multiplied with, again after each mask update.'
            )

    mask = reference.mask_of(pattern) if pattern.split is None else sharded.mask(reference.mask_of, pattern)
    jax.debug.callback(check, jnp.sum((w != 0) & ~mask))


def _apply(x, w, pattern, geometry, dense_gradient, implementation):
    if os.environ.get('SPARSE_JAX_DEBUG') == '1':
        _check_zeros(w, pattern)
    shape = x.shape
    if w.ndim == 2 or (w.shape[:2] == (1, 1) and geometry == Geometry()):  # one tap: a matrix product of all pixels
        x, w = x.reshape(-1, 1, 1, shape[-1]), w.reshape(1, 1, *w.shape[-2:])
    empty = 0 in (x.size, *geometry.output_shape(x.shape, w.shape))
    chosen = backend.choose(implementation, x.dtype, pattern, empty=empty)
    for observer in observers:
        observer(x, w, pattern, geometry)
    y: jax.Array = _product(x, w, pattern, geometry, chosen, dense_gradient)  # pyright: ignore[reportAssignmentType]
    return y if x.shape == shape else y.reshape(*shape[:-1], w.shape[-1])


def sparse_dot(
    x: jax.Array,
    w: jax.Array,
    pattern: Pattern,
    *,
    dense_gradient: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    r"""Matrix product with a sparse weight: :math:`y_{\ldots o} = \sum_i x_{\ldots i} w_{io}` over the pattern's positions.

    The gradient with respect to x is such a product with the transposed weight, that with respect to w is computed at the pattern's
    positions only and zero elsewhere. All backends give the same values within rounding on finite inputs; where x or w holds NaN or
    infinity, positions off the pattern may or may not spread it (0 times NaN).

    Args:
      x: [..., in].
      w: [in, out], of x's type, and zero off the pattern (checked at run time with SPARSE_JAX_DEBUG=1 in the environment).
      pattern: of w: see :func:`make_pattern`.
      dense_gradient: whether the gradient with respect to w is wanted at all positions; so too if the pattern says so.
      implementation: ``'reference'`` (plain XLA), ``'cpu'`` (C++, float32), ``'gpu'`` (Hopper, blocks with sides of 32, 64 or 128, bfloat16
        or float16) or ``'tpu'`` (blocks of 128x128, bfloat16 or float32); None: the one that the pattern names, or else by rule: on CPU
        ``'cpu'`` for patterns at 20% or less, on GPU and TPU their own up to the density at which it was measured to win (see
        ``benchmarks.gpu``), otherwise the reference.

    Returns:
      [..., out], of x's type.

    Raises:
      ValueError: if shapes or types do not fit together, a concrete pattern lists more units than it has room for, or there is no such
        implementation.
      NotImplementedError: if the implementation named here cannot take these operands, or does not run on this machine.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparse_jax import kernels
      >>> w = jnp.array([[1.0, 0.0], [2.0, 3.0]])
      >>> kernels.sparse_dot(jnp.ones((1, 2)), w, kernels.make_pattern(w != 0))
      Array([[3., 3.]], dtype=float32)

    Reference: Gale et al., Sparse GPU kernels for deep learning, 2020; Nikdan et al., SparseProp, 2023.
    """
    _check('sparse_dot', x, w, pattern, 2)
    return _apply(x, w, pattern, Geometry(), dense_gradient or pattern.dense_gradient, implementation)


def sparse_conv(
    x: jax.Array,
    w: jax.Array,
    pattern: Pattern,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = 'SAME',
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    dense_gradient: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    r"""2D convolution with a sparse kernel: :math:`y_{npo} = \sum_{t,i} w_{tio} x_{n, sp + dt, i}` over the pattern's positions.

    Gradients as in :func:`sparse_dot`.

    Args:
      x: [batch, height, width, in].
      w: [height, width, in, out], of x's type, and zero off the pattern.
      pattern: of w: see :func:`make_pattern`.
      strides: steps in rows and columns.
      padding: ``'SAME'``, ``'VALID'``, or pixels before and after in rows and columns, such as ((1, 1), (1, 1)).
      dilation: distance of neighbouring taps in rows and columns.
      groups: 1; there are no grouped convolutions yet.
      dense_gradient: as in :func:`sparse_dot`.
      implementation: as in :func:`sparse_dot`.

    Returns:
      [batch, height', width', out], of x's type.

    Raises:
      ValueError: as :func:`sparse_dot`, and for strides, padding or dilation that make no convolution.
      NotImplementedError: as :func:`sparse_dot`, and for groups.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparse_jax import kernels
      >>> w = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(2.0)
      >>> kernels.sparse_conv(jnp.ones((1, 2, 2, 1)), w, kernels.make_pattern(w != 0)).ravel()
      Array([2., 2., 2., 2.], dtype=float32)

    Reference: Elsen et al., Fast sparse convnets, 2020; Park et al., Faster CNNs with direct sparse convolutions, 2017.
    """
    if groups != 1:
        raise NotImplementedError(f'sparse_conv: groups={groups} is not there yet: take groups=1, or a dense convolution.')
    if x.ndim != 4:
        raise ValueError(f'sparse_conv: x must be [batch, height, width, in], got shape {tuple(x.shape)}.')
    _check('sparse_conv', x, w, pattern, 4)
    geometry = geometry_of('sparse_conv', x.shape, w.shape, strides, padding, dilation)
    if w.shape[:2] == (1, 1) and geometry.padding == ((0, 0), (0, 0)):  # only every s-th pixel is read
        x, geometry = x[:, :: geometry.strides[0], :: geometry.strides[1]], Geometry()
    return _apply(x, w, pattern, geometry, dense_gradient or pattern.dense_gradient, implementation)


def convolve(
    x: jax.Array,
    w: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = 'SAME',
    dilation: tuple[int, int] = (1, 1),
) -> jax.Array:
    """2D convolution with a dense kernel, by what XLA does best: the dense rival of :func:`sparse_conv`, with its arguments.

    Args:
      x: [batch, height, width, in].
      w: [height, width, in, out], of x's type.
      strides: as in :func:`sparse_conv`.
      padding: as in :func:`sparse_conv`.
      dilation: as in :func:`sparse_conv`.

    Returns:
      [batch, height', width', out], of x's type.

    Raises:
      ValueError: for strides, padding or dilation that make no convolution.

    Example:
      >>> import jax.numpy as jnp
      >>> convolve(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 8)), strides=(2, 2)).shape
      (1, 2, 2, 8)
    """
    return reference.convolve_dense(x, w, geometry_of('convolve', x.shape, w.shape, strides, padding, dilation))


def convolve_by_lanes(
    x: jax.Array,
    activation: jax.Array | None,
    w: jax.Array,
    residual: jax.Array | None,
    pattern: Pattern | None,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = 'SAME',
    statistics: bool = False,
) -> tuple[jax.Array, jax.Array]:
    r"""2D convolution of :math:`\max((x - \mu) s + b, 0)`, plus a residual, between images by lanes, on the C++ kernels.

    Args:
      x: float32[batch / 16, height, width, in, 16]: see :func:`to_lanes`, and :func:`lanes_unavailable` for where it runs.
      activation: float32[3, in]: :math:`\mu`, s and b of each channel; None: x as it is.
      w: float32[height, width, in, out], zero off the pattern.
      residual: float32 of the result's shape, added to it; None: nothing.
      pattern: of w, by which its gradient is dense or not; None: w is dense.
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
    if w.ndim != 4 or w.dtype != jnp.float32 or w.shape[2] != x.shape[3]:
        raise ValueError(
            f'convolve_by_lanes: w must be float32[height, width, {x.shape[3]}, out], got {w.dtype}{list(w.shape)} for x of {list(x.shape)}.'
        )
    shape = x.shape[0] * lanes.BATCH, *x.shape[1:4]
    if pattern is not None:
        _check('convolve_by_lanes', jax.ShapeDtypeStruct(shape, x.dtype), w, pattern, 4)
        if os.environ.get('SPARSE_JAX_DEBUG') == '1':
            _check_zeros(w, pattern)
    geometry = geometry_of('convolve_by_lanes', shape, w.shape, strides, padding, (1, 1))
    if pattern is not None:
        for observer in observers:
            observer(x, w, pattern, geometry)
    expected = (x.shape[0], *geometry.output_shape(shape, w.shape)[1:], lanes.BATCH)
    if residual is not None and (residual.shape != expected or residual.dtype != jnp.float32):
        raise ValueError(
            f'convolve_by_lanes: residual must be float32{list(expected)}, as the result, got {residual.dtype}{list(residual.shape)}.'
        )
    statics = lanes.Statics(geometry, statistics, pattern is None or pattern.dense_gradient)
    return lanes.convolve(x, activation, w, residual, pattern, statics)


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
    if len(window) != 2 or min(window) < 1 or math.prod(window) > lanes.MOST_POOLED:
        raise ValueError(
            f'max_pool_by_lanes: window={window!r} must be rows and columns of at most {lanes.MOST_POOLED} pixels together.'
        )
    return lanes.max_pool(x, activation, tuple(window))


def _check_lanes(name: str, x: jax.Array, activation: jax.Array | None) -> None:
    """The C++ kernels read as much as these shapes say."""
    if x.ndim != 5 or x.shape[-1] != lanes.BATCH or x.dtype != jnp.float32:
        raise ValueError(
            f'{name}: x must be float32[batch / {lanes.BATCH}, height, width, channels, {lanes.BATCH}] as to_lanes makes it, '
            f'got {x.dtype}{list(x.shape)}.'
        )
    if reason := lanes.lanes_unavailable(lanes.BATCH, x.dtype):
        raise ValueError(f'{name}: there are no kernels by lanes here: {reason}. Take images by channels, and sparse_conv.')
    if activation is not None and (activation.shape != (3, x.shape[3]) or activation.dtype != jnp.float32):
        raise ValueError(
            f'{name}: activation must be float32[3, {x.shape[3]}]: mean, scale and bias, got {activation.dtype}{list(activation.shape)}.'
        )


def geometry_of(name: str, x: tuple[int, ...], w: tuple[int, ...], strides, padding, dilation) -> Geometry:
    """Checked; ValueError for strides, padding or dilation that make no convolution."""
    pairs = {'strides': strides, 'dilation': dilation}
    for key, value in pairs.items():
        if not isinstance(value, Sequence) or len(value) != 2 or not all(_is_integer(v) and v >= 1 for v in value):
            raise ValueError(f'{name}: {key}={value!r} must be two integers of at least 1, for rows and columns.')
    strides, dilation = tuple(map(int, strides)), tuple(map(int, dilation))
    if isinstance(padding, str):
        if padding.upper() not in ('SAME', 'VALID'):
            raise errors.unknown('padding', padding, ['SAME', 'VALID'])
        reach = [(taps - 1) * d + 1 for taps, d in zip(w[:2], dilation, strict=True)]
        padding = lax.padtype_to_pads(x[1:3], reach, strides, padding.upper())
    pads = tuple(tuple(pair) if isinstance(pair, Sequence) else () for pair in padding) if isinstance(padding, Sequence) else ()
    if len(pads) != 2 or not all(len(pair) == 2 and all(_is_integer(v) and v >= 0 for v in pair) for pair in pads):
        raise ValueError(f'{name}: padding={padding!r} must be pixels before and after in rows and columns, at least 0.')
    return Geometry(strides, tuple((int(low), int(high)) for low, high in pads), dilation)  # type: ignore[arg-type]


def _is_integer(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
