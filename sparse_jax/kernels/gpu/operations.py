"""The products of reference.py on the kernels.

Images [batch, height, width, channels] are read as [batch, pixels, channels], of a matrix product with one pixel. All the padding there is,
where taps lie outside of images, is one more tap of zeros (in products) or one more pixel of zeros (in the weight gradient).
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.kernels import device
from sparse_jax.kernels import pixels as pixels_lib
from sparse_jax.kernels.gpu import config as config_lib
from sparse_jax.kernels.gpu import gradient as gradient_lib
from sparse_jax.kernels.gpu import product as product_lib
from sparse_jax.kernels.gpu.config import Config
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.reference import Geometry


def forward(x, w, pattern: Pattern, geometry: Geometry, config: Config | None = None) -> jax.Array:
    """As in reference.py."""
    config = config or config_lib.choose('forward', x.shape, w.shape, pattern.granularity.sides, x.dtype)
    y_shape = geometry.output_shape(x.shape, w.shape)
    pixels = pixels_lib.forward_pixels(geometry, x.shape[1:3], y_shape[1:3], w.shape[:2]).table()
    operands = product_lib.Operands(
        x=_padded_images(x, config.block_m, pattern.granularity.sides[0]),
        w=_padded_weight(w, pattern.granularity.sides, pixels.max() == x.shape[1] * x.shape[2]),
        units=jnp.asarray(pattern.indices),
        pointers=jnp.asarray(pattern.pointers),
        pixels=jnp.asarray(pixels),
        phases=jnp.zeros(len(pixels), jnp.int32),
    )
    y = product_lib.product(operands, block=pattern.granularity.sides, transpose_rhs=False, config=config, interpret=_interpreter())
    return y[: x.shape[0], :, : w.shape[-1]].reshape(y_shape)


def input_gradient(
    dy, w, pattern: Pattern, geometry: Geometry, x_shape: tuple[int, ...], config: Config | None = None
) -> jax.Array:
    """As in reference.py."""
    config = config or config_lib.choose('input_gradient', x_shape, w.shape, pattern.granularity.sides, dy.dtype)
    pixels = pixels_lib.input_gradient_pixels(geometry, x_shape[1:3], dy.shape[1:3], w.shape[:2]).table()
    units, pointers = _sorted_by_phase(pattern, geometry, w.shape[:2])
    row_stride, column_stride = geometry.strides
    phases = np.arange(x_shape[1])[:, None] % row_stride * column_stride + np.arange(x_shape[2]) % column_stride
    operands = product_lib.Operands(
        x=_padded_images(dy, config.block_m, pattern.granularity.sides[1]),
        w=_padded_weight(w, pattern.granularity.sides, pixels.max() == dy.shape[1] * dy.shape[2]),
        units=units,
        pointers=pointers,
        pixels=jnp.asarray(pixels),
        phases=jnp.asarray(phases.reshape(-1), jnp.int32),
    )
    dx = product_lib.product(operands, block=pattern.granularity.sides, transpose_rhs=True, config=config, interpret=_interpreter())
    return dx[: x_shape[0], :, : x_shape[-1]].reshape(x_shape)


def weight_gradient(
    x, dy, pattern: Pattern, geometry: Geometry, w_shape: tuple[int, ...], config: Config | None = None
) -> jax.Array:
    """As in reference.py."""
    config = config or config_lib.choose('weight_gradient', x.shape, w_shape, pattern.granularity.sides, x.dtype)
    block = pattern.granularity.sides
    num_taps = math.prod(w_shape[:-2])
    pixels = pixels_lib.forward_pixels(geometry, x.shape[1:3], dy.shape[1:3], w_shape[:2]).table()
    k_blocks, n_blocks = (-(-n // side) for n, side in zip(w_shape[-2:], block, strict=True))
    num_splits = config_lib.num_splits(x.shape[0], len(pixels), num_taps * k_blocks * n_blocks, block)
    window_k = config_lib.window_rows('weight_gradient', block[0])
    operands = gradient_lib.Operands(
        x=_padded_images(x, config.block_m, window_k, pixels.max() == x.shape[1] * x.shape[2]),
        dy=_padded_images(dy, config.block_m, block[1]),
        units=jnp.asarray(pattern.indices),
        pointers=jnp.asarray(pattern.pointers),
        pixels=jnp.asarray(pixels),
    )
    if num_splits == 1:
        dw = gradient_lib.gradient(operands, k_blocks=k_blocks, block=block, config=config, interpret=_interpreter())
    else:
        partial_sums = gradient_lib.partial_gradients(
            operands, block=block, num_splits=num_splits, config=config, interpret=_interpreter()
        )
        values = functools.reduce(operator.add, partial_sums)  # in one order, whatever the capacity: a reduction's may depend on it
        dw = _scatter(values.astype(x.dtype), operands.units, operands.pointers, (num_taps, k_blocks, n_blocks))
    return dw[:, : w_shape[-2], : w_shape[-1]].reshape(w_shape)


def block_scores(
    x, dy, w_shape: tuple[int, ...], geometry: Geometry, block: tuple[int, int], config: Config | None = None
) -> jax.Array:
    """Sums of the absolute values of the dense weight gradient, float32[taps..., blocks of inputs, blocks of outputs]."""
    config = config or config_lib.choose('scores', x.shape, w_shape, block, x.dtype)
    num_taps = math.prod(w_shape[:-2])
    pixels = pixels_lib.forward_pixels(geometry, x.shape[1:3], dy.shape[1:3], w_shape[:2]).table()
    window_k = config_lib.window_rows('scores', block[0])
    operands = gradient_lib.ScoreOperands(
        x=_padded_images(x, config.block_m, window_k, pixels.max() == x.shape[1] * x.shape[2]),
        dy=_padded_images(dy, config.block_m, block[1]),
        pixels=jnp.asarray(pixels),
    )
    row_sums = gradient_lib.scores(operands, block=block, config=config, interpret=_interpreter())
    num_windows, _, n_blocks, _ = row_sums.shape
    sums = row_sums.reshape(num_windows, num_taps, n_blocks, window_k // block[0], block[0]).sum(-1)
    sums = sums.transpose(1, 0, 3, 2).reshape(num_taps, -1, n_blocks)[:, : -(-w_shape[-2] // block[0])]
    return sums.reshape(*w_shape[:-2], -1, n_blocks)


def _interpreter():
    if not device.interpret():
        return None
    from jax._src.pallas.mosaic_gpu.interpret import params  # not public yet: of the tests only

    return params.InterpretGPUParams(detect_races=True)


def _padded_images(x, block_m: int, block_k: int, add_pixel: bool = False) -> jax.Array:
    """[images, pixels, channels] of whole tiles, with a pixel of zeros at the end where `add_pixel` asks for one."""
    batch, height, width, channels = x.shape
    return _pad_end(x.reshape(batch, height * width, channels), -batch % block_m, int(add_pixel), -channels % block_k)


def _padded_weight(w, block: tuple[int, int], add_tap: bool) -> jax.Array:
    """[taps, in, out] of whole blocks, with a tap of zeros at the end where `add_tap` asks for one."""
    return _pad_end(w.reshape(-1, *w.shape[-2:]), int(add_tap), -w.shape[-2] % block[0], -w.shape[-1] % block[1])


def _pad_end(x, *widths: int) -> jax.Array:
    return jnp.pad(x, [(0, width) for width in widths]) if any(widths) else x


def _scatter(values, units, pointers, grid: tuple[int, int, int]) -> jax.Array:
    """Dense [taps, in, out] from the units' values [capacity, inputs, outputs of a block], zeros elsewhere.

    `grid` is the number of taps, blocks of inputs and blocks of outputs.
    """
    num_taps, k_blocks, n_blocks = grid
    unit_idx = jnp.arange(len(units), dtype=jnp.int32)
    n_idx = jnp.searchsorted(pointers, unit_idx, side='right', method='compare_all') - 1  # past the end: too large, and dropped
    k_idx, tap_idx = jnp.divmod(units, num_taps)
    unit_at = jnp.full(grid, -1, jnp.int32).at[tap_idx, k_idx, n_idx].set(unit_idx, mode='drop')
    blocks = jnp.where((unit_at >= 0)[..., None, None], values[unit_at], jnp.zeros((), values.dtype))
    return blocks.swapaxes(2, 3).reshape(num_taps, k_blocks * values.shape[1], n_blocks * values.shape[2])


def _sorted_by_phase(pattern: Pattern, geometry: Geometry, kernel_shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """The transposed lists, each sorted by which pixels of the input a tap meets; as they are without strides."""
    units, pointers = jnp.asarray(pattern.transposed_indices), jnp.asarray(pattern.transposed_pointers)
    row_stride, column_stride = geometry.strides
    num_phases = row_stride * column_stride
    if num_phases == 1:
        return units, pointers
    (top, _), (left, _) = geometry.padding
    tap_rows = (np.arange(kernel_shape[0]) * geometry.dilation[0] - top) % row_stride
    tap_columns = (np.arange(kernel_shape[1]) * geometry.dilation[1] - left) % column_stride
    tap_phases = jnp.asarray((tap_rows[:, None] * column_stride + tap_columns).reshape(-1), jnp.int32)
    unit_idx = jnp.arange(len(units))
    list_idx = jnp.searchsorted(pointers, unit_idx, side='right', method='compare_all') - 1
    past_end = jnp.iinfo(jnp.int32).max
    keys = jnp.where(unit_idx < pointers[-1], list_idx * num_phases + tap_phases[units % len(tap_phases)], past_end)
    keys = keys.astype(jnp.int32)
    order = jnp.argsort(keys, stable=True)  # some hundred units
    starts = jnp.searchsorted(keys[order], jnp.arange((len(pointers) - 1) * num_phases + 1, dtype=jnp.int32))
    return units[order], starts.astype(jnp.int32)
