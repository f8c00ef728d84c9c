"""The products of reference.py on the kernels.

Images [batch, height, width, channels] are read as [batch, pixels, channels], of a matrix product with one pixel. All the padding there is,
where taps lie outside of images, is one more tap of zeros (in products) or one more pixel of zeros (in the weight gradient).
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.kernels import device
from sparse_jax.kernels import lists as lists_lib
from sparse_jax.kernels import pixels as pixels_lib
from sparse_jax.kernels.gpu import config as config_lib
from sparse_jax.kernels.gpu import gradient as gradient_lib
from sparse_jax.kernels.gpu import product as product_lib
from sparse_jax.kernels.gpu.config import Config
from sparse_jax.kernels.layout import CompactWeight, Layout
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.reference import Geometry


class _Weight(NamedTuple):
    """A weight as a product walks it: dense by a pattern's lists, or compact by a layout's."""

    shape: tuple[int, ...]  # [height, width, in, out]
    block: tuple[int, int]
    values: jax.Array  # dense, or the units of a compact one
    units: jax.Array  # by block of the result's channels
    pointers: jax.Array
    numbers: jax.Array | None  # of a compact one: which unit each is

    def padded(self, add_zeros: bool) -> jax.Array:
        """In whole blocks, with a tap or a unit of zeros at the end where one is asked for."""
        if self.numbers is None:
            return _padded_weight(self.values, self.block, add_zeros)
        return _pad_end(self.values, int(add_zeros), 0, 0)

    def operands(self, **others) -> product_lib.Operands | product_lib.CompactOperands:
        if self.numbers is None:
            return product_lib.Operands(**others)
        return product_lib.CompactOperands(**others, numbers=self.numbers)


def forward(x, w, pattern: Pattern, geometry: Geometry, config: Config | None = None) -> jax.Array:
    """As in reference.py."""
    lists = jnp.asarray(pattern.indices), jnp.asarray(pattern.pointers)
    return _forward(x, _Weight(w.shape, pattern.granularity.sides, w, *lists, None), geometry, config)


def compact_forward(x, values, layout: Layout, geometry: Geometry, config: Config | None = None) -> jax.Array:
    """As in reference.py."""
    lists = layout.by_output or lists_lib.by_output(layout)
    weight = _Weight(_full(layout), layout.granularity.sides, values, lists.indices, lists.pointers, lists.numbers)
    return _forward(x, weight, geometry, config)


def frozen(x, weight: CompactWeight, geometry: Geometry, config: Config | None = None) -> jax.Array:
    """As in reference.py."""
    layout, lists = weight.layout, (jnp.asarray(weight.layout.indices), jnp.asarray(weight.layout.pointers))
    numbers = jnp.arange(layout.capacity, dtype=jnp.int32)
    return _forward(
        x, _Weight(_full(layout), layout.granularity.sides, jnp.asarray(weight.values), *lists, numbers), geometry, config
    )


def _full(layout: Layout) -> tuple[int, ...]:
    return layout.taps + layout.shape[-2:]


def _forward(x, weight: _Weight, geometry: Geometry, config: Config | None) -> jax.Array:
    config = config or config_lib.choose('forward', x.shape, weight.shape, weight.block, x.dtype)
    y_shape = geometry.output_shape(x.shape, weight.shape)
    pixels = pixels_lib.forward_pixels(geometry, x.shape[1:3], y_shape[1:3], weight.shape[:2]).table()
    operands = weight.operands(
        x=_padded_images(x, config.block_m, weight.block[0]),
        w=weight.padded(pixels.max() == x.shape[1] * x.shape[2]),
        units=weight.units,
        pointers=weight.pointers,
        pixels=jnp.asarray(pixels),
        phases=jnp.zeros(len(pixels), jnp.int32),
    )
    options: dict[str, Any] = dict(n_tiles=-(-weight.shape[-1] // weight.block[1]), config=config, interpret=_interpreter())
    y = product_lib.product(operands, block=weight.block, transpose_rhs=False, **options)
    return y[: x.shape[0], :, : weight.shape[-1]].reshape(y_shape)


def input_gradient(
    dy, w, pattern: Pattern, geometry: Geometry, x_shape: tuple[int, ...], config: Config | None = None
) -> jax.Array:
    """As in reference.py."""
    lists = jnp.asarray(pattern.transposed_indices), jnp.asarray(pattern.transposed_pointers)
    return _input_gradient(dy, _Weight(w.shape, pattern.granularity.sides, w, *lists, None), geometry, x_shape, config)


def compact_input_gradient(
    dy, values, layout: Layout, geometry: Geometry, x_shape: tuple[int, ...], config: Config | None = None
) -> jax.Array:
    """As in reference.py."""
    lists = jnp.asarray(layout.indices), jnp.asarray(layout.pointers), jnp.arange(layout.capacity, dtype=jnp.int32)
    return _input_gradient(dy, _Weight(_full(layout), layout.granularity.sides, values, *lists), geometry, x_shape, config)


def _input_gradient(dy, weight: _Weight, geometry: Geometry, x_shape: tuple[int, ...], config: Config | None) -> jax.Array:
    config = config or config_lib.choose('input_gradient', x_shape, weight.shape, weight.block, dy.dtype)
    pixels = pixels_lib.input_gradient_pixels(geometry, x_shape[1:3], dy.shape[1:3], weight.shape[:2]).table()
    weight = _sorted_by_phase(weight, geometry)
    row_stride, column_stride = geometry.strides
    phases = np.arange(x_shape[1])[:, None] % row_stride * column_stride + np.arange(x_shape[2]) % column_stride
    operands = weight.operands(
        x=_padded_images(dy, config.block_m, weight.block[1]),
        w=weight.padded(pixels.max() == dy.shape[1] * dy.shape[2]),
        units=weight.units,
        pointers=weight.pointers,
        pixels=jnp.asarray(pixels),
        phases=jnp.asarray(phases.reshape(-1), jnp.int32),
    )
    options: dict[str, Any] = dict(n_tiles=-(-weight.shape[-2] // weight.block[0]), config=config, interpret=_interpreter())
    dx = product_lib.product(operands, block=weight.block, transpose_rhs=True, **options)
    return dx[: x_shape[0], :, : x_shape[-1]].reshape(x_shape)


def weight_gradient(
    x, dy, pattern: Pattern, geometry: Geometry, w_shape: tuple[int, ...], config: Config | None = None
) -> jax.Array:
    """As in reference.py."""
    block = pattern.granularity.sides
    config, num_splits, images = _gradient_setup(x, dy, geometry, w_shape, block, config)
    operands = gradient_lib.Operands(**images, units=jnp.asarray(pattern.indices), pointers=jnp.asarray(pattern.pointers))
    num_taps, (k_blocks, n_blocks) = math.prod(w_shape[:-2]), _blocks(w_shape, block)
    if num_splits == 1:
        dw = gradient_lib.gradient(operands, k_blocks=k_blocks, block=block, config=config, interpret=_interpreter())
    else:
        values = _summed(operands, block, num_splits, config)
        dw = _scatter(values.astype(x.dtype), operands.units, operands.pointers, (num_taps, k_blocks, n_blocks))
    return dw[:, : w_shape[-2], : w_shape[-1]].reshape(w_shape)


def compact_weight_gradient(x, dy, layout: Layout, geometry: Geometry, config: Config | None = None) -> jax.Array:
    """As in reference.py: units only are written; those that are not used are zeros."""
    block, lists = layout.granularity.sides, layout.by_output or lists_lib.by_output(layout)
    config, num_splits, images = _gradient_setup(x, dy, geometry, _full(layout), block, config)
    operands = gradient_lib.CompactOperands(**images, units=lists.indices, pointers=lists.pointers, numbers=lists.numbers)
    values = _summed(operands, block, num_splits, config).astype(x.dtype)
    used = jnp.arange(layout.capacity) < layout.pointers[-1]
    return jnp.where(used[:, None, None], values, jnp.zeros((), values.dtype))


def _gradient_setup(
    x, dy, geometry: Geometry, w_shape: tuple[int, ...], block: tuple[int, int], config: Config | None
) -> tuple[Config, int, dict[str, jax.Array]]:
    """Tiles, into how many parts sums are divided, and the operands that do not depend on which units there are."""
    config = config or config_lib.choose('weight_gradient', x.shape, w_shape, block, x.dtype)
    pixels = pixels_lib.forward_pixels(geometry, x.shape[1:3], dy.shape[1:3], w_shape[:2]).table()
    num_splits = config_lib.num_splits(x.shape[0], len(pixels), math.prod(w_shape[:-2]) * math.prod(_blocks(w_shape, block)), block)
    window_k = config_lib.window_rows('weight_gradient', block[0])
    images = dict(
        x=_padded_images(x, config.block_m, window_k, pixels.max() == x.shape[1] * x.shape[2]),
        dy=_padded_images(dy, config.block_m, block[1]),
        pixels=jnp.asarray(pixels),
    )
    return config, num_splits, images


def _blocks(w_shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Blocks of inputs and of outputs."""
    inputs, outputs = (-(-n // side) for n, side in zip(w_shape[-2:], block, strict=True))
    return inputs, outputs


def _summed(operands, block: tuple[int, int], num_splits: int, config: Config) -> jax.Array:
    """The units' gradients: partial sums in one order, whatever the capacity, on which a reduction's may depend."""
    parts = gradient_lib.partial_gradients(operands, block=block, num_splits=num_splits, config=config, interpret=_interpreter())
    return functools.reduce(operator.add, parts)


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


def _sorted_by_phase(weight: _Weight, geometry: Geometry) -> _Weight:
    """With its lists each sorted by which pixels of the input a tap meets; as they are without strides."""
    units, pointers, kernel_shape = weight.units, weight.pointers, weight.shape[:2]
    row_stride, column_stride = geometry.strides
    num_phases = row_stride * column_stride
    if num_phases == 1:
        return weight
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
    numbers = None if weight.numbers is None else weight.numbers[order]
    return weight._replace(units=units[order], pointers=starts.astype(jnp.int32), numbers=numbers)
