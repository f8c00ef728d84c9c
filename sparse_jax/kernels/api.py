"""Sparse matrix product and convolution with their gradients, over any backend."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparse_jax.kernels import arguments, backend, compact, reference
from sparse_jax.kernels.layout import CompactWeight, Layout
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.reference import Geometry

# The three products are closed under differentiation. With M the pattern's mask and W on it:
#   y  = x W,            whose gradients are dx = dy W^T and dW = M * (x^T dy);
#   dx = dy W^T,         for a cotangent t of dx: t W for dy,   and M * (t^T dy) for W;
#   dW = M * (x^T dy),   for a cotangent T of dW, S = M * T: dy S^T for x, and x S for dy.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _product(x, w, pattern: Pattern, geometry: Geometry, implementation: str, dense_gradient: bool):
    del dense_gradient
    return backend.of_pattern(implementation, pattern).forward(x, w, pattern, geometry)


def _product_forward(x, w, pattern, geometry, implementation, dense_gradient):
    return _product(x, w, pattern, geometry, implementation, dense_gradient), (x, w, pattern)


def _product_backward(geometry, implementation, dense_gradient, residuals, dy):
    x, w, pattern = residuals
    dx = _input_gradient(dy, w, pattern, geometry, implementation, x.shape)
    if dense_gradient:
        dw = reference.dense_weight_gradient(x, dy, w.shape, geometry)
    else:
        dw = _weight_gradient(x, dy, pattern, geometry, implementation, w.shape)
    return dx, dw, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _input_gradient(dy, w, pattern: Pattern, geometry: Geometry, implementation: str, shape: tuple[int, ...]):
    return backend.of_pattern(implementation, pattern).input_gradient(dy, w, pattern, geometry, shape)


def _input_gradient_forward(dy, w, pattern, geometry, implementation, shape):
    return _input_gradient(dy, w, pattern, geometry, implementation, shape), (dy, w, pattern)


def _input_gradient_backward(geometry, implementation, shape, residuals, t):
    del shape
    dy, w, pattern = residuals
    by_dy = _product(t, w, pattern, geometry, implementation, False)
    return by_dy, _weight_gradient(t, dy, pattern, geometry, implementation, w.shape), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _weight_gradient(x, dy, pattern: Pattern, geometry: Geometry, implementation: str, shape: tuple[int, ...]):
    return backend.of_pattern(implementation, pattern).weight_gradient(x, dy, pattern, geometry, shape)


def _weight_gradient_forward(x, dy, pattern, geometry, implementation, shape):
    return _weight_gradient(x, dy, pattern, geometry, implementation, shape), (x, dy, pattern)


def _weight_gradient_backward(geometry, implementation, shape, residuals, t):
    x, dy, pattern = residuals
    s = jnp.where(arguments.mask_of(pattern).reshape(shape), t, jnp.zeros((), t.dtype))
    by_x = _input_gradient(dy, s, pattern, geometry, implementation, x.shape)
    return by_x, _product(x, s, pattern, geometry, implementation, False), None


_product.defvjp(_product_forward, _product_backward)
_input_gradient.defvjp(_input_gradient_forward, _input_gradient_backward)
_weight_gradient.defvjp(_weight_gradient_forward, _weight_gradient_backward)


def _apply(x, w, pattern, geometry, dense_gradient, implementation):
    arguments.check_zeros(w, pattern)
    shape = x.shape
    if w.ndim == 2 or (w.shape[:2] == (1, 1) and geometry == Geometry()):  # one tap: a matrix product of all pixels
        x, w = x.reshape(math.prod(shape[:-1]), 1, 1, shape[-1]), w.reshape(1, 1, *w.shape[-2:])
    y_shape = geometry.output_shape(x.shape, w.shape)
    choice = backend.choose(implementation, x.dtype, pattern, rows=math.prod(y_shape[:-1]), empty=0 in (x.size, *y_shape))
    if pattern.observer is not None:
        pattern.observer(x, w, pattern, geometry)
    try:
        y: jax.Array = _product(x, w, pattern, geometry, choice.implementation, dense_gradient)  # pyright: ignore[reportAssignmentType]
    except TypeError as error:
        if 'forward-mode' not in str(error):
            raise
        raise NotImplementedError(
            'sparse_dot and sparse_conv have derivatives in reverse mode, of any order: jax.grad, jax.vjp, jax.jacrev. In place of '
            'jax.jvp(jax.grad(f), ...) take jax.vjp(jax.grad(f), w)[1](v); jax.jvp itself is there for dense products of '
            'sj.apply_masks(params, masks).'
        ) from None
    return y if x.shape == shape else y.reshape(*shape[:-1], w.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _frozen_product(x, weight: CompactWeight, geometry: Geometry, implementation: str):
    return backend.COMPACT[implementation].frozen(x, weight, geometry)


@_frozen_product.defjvp
def _no_gradient(geometry, implementation, primals, tangents):
    del geometry, implementation, primals, tangents
    raise NotImplementedError(
        'frozen weights are for inference, and have no gradients: train with sparse_dot(x, w, pattern), and freeze what came out.'
    )


def _apply_frozen(x, weight: CompactWeight, geometry: Geometry, implementation: str | None) -> jax.Array:
    shape, layout = x.shape, weight.layout
    if weight.ndim == 2 or (weight.shape[:2] == (1, 1) and geometry == Geometry()):  # one tap: a matrix product of all pixels
        x = x.reshape(math.prod(shape[:-1]), 1, 1, shape[-1])
    choice = backend.choose_compact(implementation, x.dtype, layout)
    is_empty = 0 in (x.size, layout.capacity, *geometry.output_shape(x.shape, layout.taps + layout.shape[-2:]))
    y: jax.Array = _frozen_product(x, weight, geometry, 'reference' if is_empty else choice.implementation)  # pyright: ignore[reportAssignmentType]
    return y if x.shape == shape else y.reshape(*shape[:-1], weight.shape[-1])


def sparse_dot(
    x: jax.Array,
    w: jax.Array | CompactWeight,
    pattern: Pattern | Layout | None = None,
    *,
    probe: jax.Array | None = None,
    dense_gradient: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    r"""Matrix product with a sparse weight: :math:`y_{\ldots o} = \sum_i x_{\ldots i} w_{io}` over the pattern's positions.

    The gradient with respect to x is such a product with the transposed weight, that with respect to w is computed at the pattern's
    positions only and zero elsewhere. Gradients of gradients are there too, in reverse mode (with compact values on the reference only);
    ``jax.jvp`` is not. All backends give the same values within rounding on finite inputs; where x or w holds NaN or
    infinity, positions off the pattern may or may not spread it (0 times NaN).

    Args:
      x: [..., in].
      w: [in, out], of x's type, and zero off the pattern (checked at run time with SPARSE_JAX_DEBUG=1 in the environment); or the values of
        a compact weight, whose layout is the pattern: see :mod:`sparse_jax.compact`; or a frozen weight of that shape: see :func:`freeze`.
      pattern: of w: see :func:`make_pattern`; or a layout. None with a frozen weight.
      probe: with a layout: zeros whose gradient is the score of each unit, those that do not exist included: see
        :func:`sparse_jax.compact.probes`. None: no unit is scored.
      dense_gradient: whether the gradient with respect to w is wanted at all positions; so too if the pattern says so. Not with a layout:
        there a probe gives it.
      implementation: ``'reference'`` (plain XLA), ``'cpu'`` (C++, float32), ``'gpu'`` (Hopper, blocks with sides of 32, 64 or 128, bfloat16
        or float16) or ``'tpu'`` (blocks of 128x128, bfloat16 or float32); None: the one that the pattern names, or else by rule: on CPU
        ``'cpu'`` for patterns at 20% or less (10% for fewer than 16 rows) and for compact values, on GPU and TPU their own up to the density at which it was measured to win (see
        ``benchmarks.gpu``), otherwise the reference.

    Returns:
      [..., out], of x's type.

    Raises:
      ValueError: if shapes or types do not fit together, a concrete pattern lists more units than it has room for, there is no such
        implementation, or a probe of blocks is used twice.
      NotImplementedError: if the implementation named here cannot take these operands, or does not run on this machine; for a probe of blocks
        inside of ``shard_map``, or of ``vmap`` over examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparse_jax import kernels
      >>> w = jnp.array([[1.0, 0.0], [2.0, 3.0]])
      >>> kernels.sparse_dot(jnp.ones((1, 2)), w, kernels.make_pattern(w != 0))
      Array([[3., 3.]], dtype=float32)

    Reference: Gale et al., Sparse GPU kernels for deep learning, 2020; Nikdan et al., SparseProp, 2023.
    """
    if isinstance(w, CompactWeight):
        arguments.check_frozen('sparse_dot', x, w, 2, pattern, dense_gradient)
        return _apply_frozen(x, w, Geometry(), implementation)
    if isinstance(pattern, Layout):
        probe = pattern.probe if probe is None else probe
        arguments.check_compact('sparse_dot', x, w, pattern, 2, probe, dense_gradient)
        return compact.apply('sparse_dot', x, w, pattern, Geometry(), probe, implementation)
    arguments.check_no_probe('sparse_dot', probe)
    pattern = arguments.check_product('sparse_dot', x, w, pattern, 2)
    return _apply(x, w, pattern, Geometry(), dense_gradient or pattern.dense_gradient, implementation)


def sparse_conv(
    x: jax.Array,
    w: jax.Array | CompactWeight,
    pattern: Pattern | Layout | None = None,
    *,
    probe: jax.Array | None = None,
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
      w: [height, width, in, out], of x's type, and zero off the pattern; or a compact or frozen weight of that shape.
      pattern: as in :func:`sparse_dot`.
      probe: as in :func:`sparse_dot`.
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
    frozen = isinstance(w, CompactWeight)
    if frozen:
        arguments.check_frozen('sparse_conv', x, w, 4, pattern, dense_gradient)
    elif isinstance(pattern, Layout):
        probe = pattern.probe if probe is None else probe
        arguments.check_compact('sparse_conv', x, w, pattern, 4, probe, dense_gradient)
    else:
        arguments.check_no_probe('sparse_conv', probe)
        pattern = arguments.check_product('sparse_conv', x, w, pattern, 4)
    shape = pattern.shape if isinstance(pattern, Layout) else w.shape
    geometry = arguments.geometry_of('sparse_conv', x.shape, shape, strides, padding, dilation)
    if shape[:2] == (1, 1) and geometry.padding == ((0, 0), (0, 0)):  # only every s-th pixel is read
        x, geometry = x[:, :: geometry.strides[0], :: geometry.strides[1]], Geometry()
    if isinstance(pattern, Layout):
        return compact.apply('sparse_conv', x, w, pattern, geometry, probe, implementation)  # pyright: ignore[reportArgumentType]
    if frozen or pattern is None:
        return _apply_frozen(x, w, geometry, implementation)  # pyright: ignore[reportArgumentType]
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
    return reference.convolve_dense(x, w, arguments.geometry_of('convolve', x.shape, w.shape, strides, padding, dilation))
