"""The definition, in plain XLA and for every platform: dense products with a weight that is zero off its pattern."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.core import target
from sparse_jax.core.granularity import Block, Granularity
from sparse_jax.kernels import layout as layout_lib
from sparse_jax.kernels import lists
from sparse_jax.kernels.layout import CompactWeight, Layout
from sparse_jax.kernels.pattern import Pattern


class Geometry(NamedTuple):
    """How a convolution's kernel moves over its images."""

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)

    def output_shape(self, x: tuple[int, ...], w: tuple[int, ...]) -> tuple[int, ...]:
        """Of images [batch, height, width, in] and a kernel [height, width, in, out]."""
        sides = zip(x[1:3], w[:2], self.strides, self.padding, self.dilation, strict=True)
        reach = lambda taps, dilation: (taps - 1) * dilation + 1
        return x[0], *(max(0, (n + sum(pad) - reach(k, d)) // s + 1) for n, k, s, pad, d in sides), w[3]


# XLA on CPU convolves images of 2x2 pixels far more slowly than larger ones: 512 to 512 channels, 3x3 taps, batch 64, both
# gradients took 800 ms, as sums of matrix products 14 ms. At 3x3 pixels its convolution is the faster one again.
_FEW_PIXELS = 4


def convolve_dense(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """2D convolution; x: [batch, height, width, in], w: [height, width, in, out]."""
    strides, padding, dilation = geometry
    if w.shape[:2] == (1, 1) and padding == ((0, 0), (0, 0)):  # XLA's convolution of one tap takes three times as long on CPU
        x = x[:, :: strides[0], :: strides[1]]
        return (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ w[0, 0]).reshape(
            *x.shape[:-1], w.shape[-1]
        )  # [..., in] would be transposed for dw
    outputs = geometry.output_shape(x.shape, w.shape)
    few = x.shape[1] * x.shape[2] <= _FEW_PIXELS and outputs[1] * outputs[2] <= 4 * _FEW_PIXELS  # each is written out below
    if not few or target.platform() != 'cpu':
        return lax.conv_general_dilated(x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    sides, taps = x.shape[1:3], w.shape[:2]
    _, height, width, channels = outputs

    def pixel(i: int, j: int) -> jax.Array:
        """One output pixel: a matrix product for each tap that lies inside the image."""
        top, left = i * strides[0] - padding[0][0], j * strides[1] - padding[1][0]
        places = [(a, b, top + a * dilation[0], left + b * dilation[1]) for a in range(taps[0]) for b in range(taps[1])]
        products = [x[:, r, c] @ w[a, b] for a, b, r, c in places if 0 <= r < sides[0] and 0 <= c < sides[1]]
        return sum(products[1:], start=products[0]) if products else jnp.zeros((len(x), channels), x.dtype)

    if height == 0 or width == 0:
        return jnp.zeros((len(x), height, width, channels), x.dtype)
    rows = [jnp.stack([pixel(i, j) for j in range(width)], axis=1) for i in range(height)]
    return jnp.stack(rows, axis=1)


def mask_of(pattern: Pattern) -> jax.Array:
    """The mask that a pattern stands for: bool of the weight's shape."""
    return lists.mask_of(Layout(pattern.indices, pattern.pointers, pattern.shape, pattern.granularity))


def unsupported(dtype, granularity: Granularity) -> str:
    """Nothing is: it runs everywhere."""
    del dtype, granularity
    return ''


def forward(x: jax.Array, w: jax.Array, pattern: Pattern, geometry: Geometry) -> jax.Array:
    """y[n, p, o] = sum over taps t and inputs c of w[t, c, o] x[n, s p + t, c]."""
    del pattern
    return convolve_dense(x, w, geometry)


def frozen(x: jax.Array, weight: CompactWeight, geometry: Geometry) -> jax.Array:
    """The forward product with a compact weight."""
    w = weight.to_dense()
    return convolve_dense(x, w if w.ndim == 4 else w[None, None], geometry)


def _whole(values: jax.Array, layout: Layout) -> jax.Array:
    """A compact weight as a dense one of four axes."""
    return layout_lib.expand(values, layout).reshape(layout.taps + layout.shape[-2:])


def compact_forward(x: jax.Array, values: jax.Array, layout: Layout, geometry: Geometry) -> jax.Array:
    """The forward product with compact values."""
    return convolve_dense(x, _whole(values, layout), geometry)


def compact_input_gradient(
    dy: jax.Array, values: jax.Array, layout: Layout, geometry: Geometry, x_shape: tuple[int, ...]
) -> jax.Array:
    """The forward product, transposed."""
    x = jax.ShapeDtypeStruct(x_shape, dy.dtype)
    return jax.linear_transpose(lambda x: compact_forward(x, values, layout, geometry), x)(dy)[0]


def compact_weight_gradient(x: jax.Array, dy: jax.Array, layout: Layout, geometry: Geometry) -> jax.Array:
    """The weight gradient at the units that exist, in the form of the values."""
    dw = dense_weight_gradient(x, dy, layout.taps + layout.shape[-2:], geometry)
    return layout_lib.gather(dw.reshape(layout.shape), layout)


def input_gradient(dy: jax.Array, w: jax.Array, pattern: Pattern, geometry: Geometry, x_shape: tuple[int, ...]) -> jax.Array:
    """The forward product, transposed."""
    del pattern
    x = jax.ShapeDtypeStruct(x_shape, dy.dtype)
    return jax.linear_transpose(lambda x: convolve_dense(x, w, geometry), x)(dy)[0]


def dense_weight_gradient(x: jax.Array, dy: jax.Array, w_shape: tuple[int, ...], geometry: Geometry) -> jax.Array:
    """dw[t, c, o] = sum over images n and pixels p of x[n, s p + t, c] dy[n, p, o], at all positions."""
    w = jax.ShapeDtypeStruct(w_shape, x.dtype)
    return jax.linear_transpose(lambda w: convolve_dense(x, w, geometry), w)(dy)[0]


def weight_gradient(x: jax.Array, dy: jax.Array, pattern: Pattern, geometry: Geometry, w_shape: tuple[int, ...]) -> jax.Array:
    """The weight gradient at active positions, zeros elsewhere."""
    dw = dense_weight_gradient(x, dy, w_shape, geometry)
    return jnp.where(mask_of(pattern).reshape(w_shape), dw, jnp.zeros((), dw.dtype))


def block_scores(x, dy, w_shape: tuple[int, ...], geometry: Geometry, block: tuple[int, int]) -> jax.Array:
    """Sums of the absolute values of the dense weight gradient, float32[taps..., blocks of inputs, blocks of outputs]."""
    wide = dense_weight_gradient(x.astype(jnp.float32), dy.astype(jnp.float32), w_shape, geometry)
    return Block(*block).collapse(jnp.abs(wide), 0, lax.add)
