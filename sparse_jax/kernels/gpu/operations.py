"""The products of reference.py on the kernels.

Images [batch, height, width, channels] are read as [batch, pixels, channels], of a matrix product with one pixel. All the padding there is,
where taps lie outside of images, is one more tap of zeros (in products) or one more pixel of zeros (in the weight gradient).
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.kernels import device
from sparse_jax.kernels import pixels as pixels_lib
from sparse_jax.kernels.gpu import config as config_lib
from sparse_jax.kernels.gpu.config import Config
from sparse_jax.kernels.gpu.gradient import gradient, partial_gradients, scores
from sparse_jax.kernels.gpu.product import product
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.reference import Geometry


def forward(x, w, pattern: Pattern, geometry: Geometry, config: Config | None = None) -> jax.Array:
    """As in reference.py."""
    config = config or config_lib.choose('forward', x.shape, w.shape, pattern.granularity.sides, x.dtype)
    result = geometry.output_shape(x.shape, w.shape)
    pixels = pixels_lib.of_product(geometry, x.shape[1:3], result[1:3], w.shape[:2]).table()
    y = product(
        _images(x, config.tokens, pattern.granularity.sides[0]),
        _weight(w, pattern.granularity.sides, pixels.max() == x.shape[1] * x.shape[2]),
        jnp.asarray(pattern.indices),
        jnp.asarray(pattern.pointers),
        jnp.asarray(pixels),
        jnp.zeros(len(pixels), jnp.int32),
        block=pattern.granularity.sides,
        transposed=False,
        config=config,
        interpret=_interpreter(),
    )
    return y[: x.shape[0], :, : w.shape[-1]].reshape(result)


def input_gradient(
    dy, w, pattern: Pattern, geometry: Geometry, x_shape: tuple[int, ...], config: Config | None = None
) -> jax.Array:
    """As in reference.py."""
    config = config or config_lib.choose('input_gradient', x_shape, w.shape, pattern.granularity.sides, dy.dtype)
    pixels = pixels_lib.of_gradient(geometry, x_shape[1:3], dy.shape[1:3], w.shape[:2]).table()
    units, pointers = _by_phase(pattern, geometry, w.shape[:2])
    height, width = geometry.strides
    at = np.arange(x_shape[1])[:, None] % height * width + np.arange(x_shape[2]) % width
    dx = product(
        _images(dy, config.tokens, pattern.granularity.sides[1]),
        _weight(w, pattern.granularity.sides, pixels.max() == dy.shape[1] * dy.shape[2]),
        units,
        pointers,
        jnp.asarray(pixels),
        jnp.asarray(at.reshape(-1), jnp.int32),
        block=pattern.granularity.sides,
        transposed=True,
        config=config,
        interpret=_interpreter(),
    )
    return dx[: x_shape[0], :, : x_shape[-1]].reshape(x_shape)


def weight_gradient(
    x, dy, pattern: Pattern, geometry: Geometry, w_shape: tuple[int, ...], config: Config | None = None
) -> jax.Array:
    """As in reference.py."""
    config = config or config_lib.choose('weight_gradient', x.shape, w_shape, pattern.granularity.sides, x.dtype)
    rows, columns = pattern.granularity.sides
    taps = math.prod(w_shape[:-2])
    pixels = pixels_lib.of_product(geometry, x.shape[1:3], dy.shape[1:3], w_shape[:2]).table()
    inputs, outputs = (-(-n // side) for n, side in zip(w_shape[-2:], pattern.granularity.sides, strict=True))
    splits = config_lib.splits(x.shape[0], len(pixels), taps * inputs * outputs, pattern.granularity.sides)
    operands = (
        _images(x, config.tokens, config_lib.window('weight_gradient', rows), pixels.max() == x.shape[1] * x.shape[2]),
        _images(dy, config.tokens, columns),
        jnp.asarray(pattern.indices),
        jnp.asarray(pattern.pointers),
        jnp.asarray(pixels),
    )
    own: Any = dict(taps=taps, block=pattern.granularity.sides, config=config, interpret=_interpreter())
    if splits == 1:
        dw = gradient(*operands, inputs=inputs, **own)
    else:
        parts = partial_gradients(*operands, splits=splits, **own)
        sums = functools.reduce(operator.add, parts)  # in one order, whatever the capacity: a reduction's may depend on it
        dw = _dense(sums.astype(x.dtype), *operands[2:4], (taps, inputs, outputs))
    return dw[:, : w_shape[-2], : w_shape[-1]].reshape(w_shape)


def block_scores(
    x, dy, w_shape: tuple[int, ...], geometry: Geometry, block: tuple[int, int], config: Config | None = None
) -> jax.Array:
    """Sums of the absolute values of the dense weight gradient, float32[taps..., blocks of inputs, blocks of outputs]."""
    config = config or config_lib.choose('scores', x.shape, w_shape, block, x.dtype)
    taps = math.prod(w_shape[:-2])
    pixels = pixels_lib.of_product(geometry, x.shape[1:3], dy.shape[1:3], w_shape[:2]).table()
    sums = scores(
        _images(x, config.tokens, config_lib.window('scores', block[0]), pixels.max() == x.shape[1] * x.shape[2]),
        _images(dy, config.tokens, block[1]),
        jnp.asarray(pixels),
        block=block,
        config=config,
        interpret=_interpreter(),
    )
    windows, _, columns, wide = sums.shape
    sums = sums.reshape(windows, taps, columns, wide // block[0], block[0]).sum(-1)
    sums = sums.transpose(1, 0, 3, 2).reshape(taps, -1, columns)[:, : -(-w_shape[-2] // block[0])]
    return sums.reshape(*w_shape[:-2], -1, columns)


def _interpreter():
    if not device.interpret():
        return None
    from jax._src.pallas.mosaic_gpu.interpret import params  # not public yet: of the tests only

    return params.InterpretGPUParams(detect_races=True)


def _images(x, tokens: int, channels: int, zeros: bool = False) -> jax.Array:
    """[images, pixels, channels] of whole tiles, with a pixel of zeros at the end where that is wanted."""
    batch, height, width, features = x.shape
    return _padded(x.reshape(batch, height * width, features), -batch % tokens, int(zeros), -features % channels)


def _weight(w, block: tuple[int, int], zeros: bool) -> jax.Array:
    """[taps, in, out] of whole blocks, with a tap of zeros at the end where that is wanted."""
    return _padded(w.reshape(-1, *w.shape[-2:]), int(zeros), -w.shape[-2] % block[0], -w.shape[-1] % block[1])


def _padded(x, *more: int) -> jax.Array:
    return jnp.pad(x, [(0, n) for n in more]) if any(more) else x


def _dense(values, units, pointers, number: tuple[int, int, int]) -> jax.Array:
    """[taps, in, out] of the values [capacity, rows, columns] of its units, and zeros; `number` is of taps and of blocks."""
    taps, inputs, outputs = number
    position = jnp.arange(len(units), dtype=jnp.int32)
    owner = jnp.searchsorted(pointers, position, side='right', method='compare_all') - 1  # past the end: too large, and dropped
    source, tap = jnp.divmod(units, taps)
    at = jnp.full(number, -1, jnp.int32).at[tap, source, owner].set(position, mode='drop')
    blocks = jnp.where((at >= 0)[..., None, None], values[at], jnp.zeros((), values.dtype))
    return blocks.swapaxes(2, 3).reshape(taps, inputs * values.shape[1], outputs * values.shape[2])


def _by_phase(pattern: Pattern, geometry: Geometry, taps: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """The transposed lists, each sorted by which pixels of the input a tap meets; as they are without strides."""
    units, pointers = jnp.asarray(pattern.transposed_indices), jnp.asarray(pattern.transposed_pointers)
    height, width = geometry.strides
    phases = height * width
    if phases == 1:
        return units, pointers
    (top, _), (left, _) = geometry.padding
    h = (np.arange(taps[0]) * geometry.dilation[0] - top) % height
    w = (np.arange(taps[1]) * geometry.dilation[1] - left) % width
    of_tap = jnp.asarray((h[:, None] * width + w).reshape(-1), jnp.int32)
    number = jnp.arange(len(units))
    row = jnp.searchsorted(pointers, number, side='right', method='compare_all') - 1
    last = jnp.iinfo(jnp.int32).max
    keys = jnp.where(number < pointers[-1], row * phases + of_tap[units % len(of_tap)], last).astype(jnp.int32)
    order = jnp.argsort(keys, stable=True)  # some hundred units
    starts = jnp.searchsorted(keys[order], jnp.arange((len(pointers) - 1) * phases + 1, dtype=jnp.int32))
    return units[order], starts.astype(jnp.int32)
