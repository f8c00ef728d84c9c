"""The products of reference.py on a TPU: Pallas kernels whose tiles are picked by prefetched scalars.

Images lie as [pixels, batch, channels], of a matrix product with one pixel: batch and channels fill the vector registers, and a tap is
another first index. The grid walks a pattern's units in their order, by block of outputs, so that a tile of the result stays in VMEM
until its list ends; the number of units is the grid's (dynamic) last side, so that room in the lists costs nothing. A block of outputs
that has no unit is never visited: its channels are set to zero afterwards.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_jax.kernels import device
from sparse_jax.kernels import pixels as pixels_lib
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.pixels import PixelMap
from sparse_jax.kernels.reference import Geometry
from sparse_jax.kernels.tpu import BLOCK

_BLOCKS_M = (1024, 512, 256, 128, 64, 32, 16)  # images or tokens of a tile; 16 rows of bfloat16 fill a register


class _Units(NamedTuple):
    """The units that a weight gradient is computed at, in the order of the grid.

    Attributes:
      units: int32[capacity]: block of inputs * taps + tap.
      n_indices: int32[capacity]: block of outputs.
      count: int32: units that exist; those after them are not visited.
    """

    units: jax.Array
    n_indices: jax.Array
    count: jax.Array


def forward(x, w, pattern: Pattern, geometry: Geometry) -> jax.Array:
    """As in reference.py."""
    y_shape = geometry.output_shape(x.shape, w.shape)
    pixel_map = pixels_lib.forward_pixels(geometry, x.shape[1:3], y_shape[1:3], w.shape[:2])
    y = _product(x, w, pattern.indices, pattern.pointers, pixel_map, transpose_rhs=False)
    return _to_images(y, y_shape)


def input_gradient(dy, w, pattern: Pattern, geometry: Geometry, x_shape: tuple[int, ...]) -> jax.Array:
    """As in reference.py."""
    pixel_map = pixels_lib.input_gradient_pixels(geometry, x_shape[1:3], dy.shape[1:3], w.shape[:2])
    dx = _product(dy, w, pattern.transposed_indices, pattern.transposed_pointers, pixel_map, transpose_rhs=True)
    return _to_images(dx, x_shape)


def weight_gradient(x, dy, pattern: Pattern, geometry: Geometry, w_shape: tuple[int, ...]) -> jax.Array:
    """As in reference.py."""
    num_taps = math.prod(w_shape[:-2])
    pixel_map = pixels_lib.forward_pixels(geometry, x.shape[1:3], dy.shape[1:3], w_shape[:2])
    padded_shape = num_taps, *(-(-n // BLOCK) * BLOCK for n in w_shape[-2:])
    indices, pointers = jnp.asarray(pattern.indices), jnp.asarray(pattern.pointers)
    units = _Units(indices, _list_indices(pointers, len(indices)), pointers[-1])

    def out_index_map(unit_idx, units, n_indices):
        return lax.rem(units[unit_idx], num_taps), lax.div(units[unit_idx], num_taps), n_indices[unit_idx]

    dw = _gradient(x, dy, units, pixel_map, jnp.zeros(padded_shape, x.dtype), out_index_map)
    return dw[:, : w_shape[-2], : w_shape[-1]].reshape(w_shape)


def block_scores(x, dy, w_shape: tuple[int, ...], geometry: Geometry, block: tuple[int, int]) -> jax.Array:
    """Sums of the absolute values of the dense weight gradient, float32[taps..., blocks of inputs, blocks of outputs]."""
    num_taps = math.prod(w_shape[:-2])
    k_blocks, n_blocks = (-(-n // side) for n, side in zip(w_shape[-2:], block, strict=True))
    pixel_map = pixels_lib.forward_pixels(geometry, x.shape[1:3], dy.shape[1:3], w_shape[:2])
    num_units = k_blocks * num_taps * n_blocks
    units = _Units(
        units=jnp.asarray(np.tile(np.arange(k_blocks * num_taps, dtype=np.int32), n_blocks)),
        n_indices=jnp.asarray(np.repeat(np.arange(n_blocks, dtype=np.int32), k_blocks * num_taps)),
        count=jnp.int32(num_units),
    )
    partial_sums = jnp.zeros((num_units, 8, BLOCK), jnp.float32)
    partial_sums = _gradient(x, dy, units, pixel_map, partial_sums, lambda unit_idx, *_: (unit_idx, 0, 0), absolute_sums=True)
    sums = partial_sums.sum((1, 2)).reshape(n_blocks, k_blocks, num_taps)
    return sums.transpose(2, 1, 0).reshape(*w_shape[:-2], k_blocks, n_blocks)


def _from_images(x) -> jax.Array:
    """[pixels, images, channels] of whole tiles."""
    batch, height, width, channels = x.shape
    x = x.transpose(1, 2, 0, 3).reshape(height * width, batch, channels)
    return jnp.pad(x, ((0, 0), (0, -batch % _block_m(batch)), (0, -channels % BLOCK)))


def _block_m(batch: int) -> int:
    """The largest tile that wastes fewest rows.

    >>> _block_m(8192), _block_m(100), _block_m(1)
    (1024, 16, 16)
    """
    return min(_BLOCKS_M, key=lambda block_m: (-(-batch // block_m) * block_m, -block_m))


def _to_images(y, shape: tuple[int, ...]) -> jax.Array:
    """To [batch, height, width, channels]."""
    return y[:, : shape[0], : shape[-1]].reshape(*shape[1:3], shape[0], shape[-1]).transpose(2, 0, 1, 3)


def _list_indices(pointers, capacity: int) -> jax.Array:
    """Which list each unit is in."""
    unit_idx = jnp.arange(capacity, dtype=jnp.int32)
    list_idx = jnp.searchsorted(pointers, unit_idx, side='right') - 1
    return jnp.clip(list_idx, 0, len(pointers) - 2).astype(jnp.int32)


def _call(kernel, **options):
    return pl.pallas_call(kernel, interpret=device.interpret(), **options)


def _product(x, w, units, pointers, pixel_map: PixelMap, *, transpose_rhs: bool) -> jax.Array:
    """y[pixel, images, block_n] = sum over the units of a list of x[pixel(tap), images, block_k] @ w[tap, block_k, block_n]."""
    batch, num_taps, num_pixels = x.shape[0], math.prod(w.shape[:-2]), math.prod(pixel_map.result_shape)
    images, block_m = _from_images(x), _block_m(batch)
    w = w.reshape(num_taps, *w.shape[-2:])
    w = jnp.pad(w, ((0, 0), (0, -w.shape[1] % BLOCK), (0, -w.shape[2] % BLOCK)))
    units, pointers = jnp.asarray(units), jnp.asarray(pointers)

    def kernel(units, n_indices, pointers, x_ref, w_ref, y_ref, acc_ref):
        pixel_idx, unit_idx = pl.program_id(1), pl.program_id(2)
        n_idx = n_indices[unit_idx]

        @pl.when(unit_idx == pointers[n_idx])
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)

        @pl.when((unit_idx < pointers[n_idx + 1]) & (pixel_map.at(pixel_idx, lax.rem(units[unit_idx], num_taps))[1]))
        def _():
            contracting = ((1,), (1 if transpose_rhs else 0,)), ((), ())
            acc_ref[...] += lax.dot_general(x_ref[0], w_ref[0], contracting, preferred_element_type=jnp.float32)

        @pl.when(unit_idx == pointers[n_idx + 1] - 1)
        def _():
            y_ref[0] = acc_ref[...].astype(y_ref.dtype)

    def x_index_map(m_idx, pixel_idx, unit_idx, units, n_indices, pointers):
        return pixel_map.at(pixel_idx, lax.rem(units[unit_idx], num_taps))[0], m_idx, lax.div(units[unit_idx], num_taps)

    def w_index_map(m_idx, pixel_idx, unit_idx, units, n_indices, pointers):
        k_and_n = lax.div(units[unit_idx], num_taps), n_indices[unit_idx]
        return lax.rem(units[unit_idx], num_taps), *(reversed(k_and_n) if transpose_rhs else k_and_n)

    def y_index_map(m_idx, pixel_idx, unit_idx, units, n_indices, pointers):
        return pixel_idx, m_idx, n_indices[unit_idx]

    n_blocks = len(pointers) - 1
    y = _call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(images.shape[1] // block_m, num_pixels, jnp.maximum(pointers[-1], 1)),
            in_specs=[pl.BlockSpec((1, block_m, BLOCK), x_index_map), pl.BlockSpec((1, BLOCK, BLOCK), w_index_map)],
            out_specs=pl.BlockSpec((1, block_m, BLOCK), y_index_map),
            scratch_shapes=[pltpu.VMEM((block_m, BLOCK), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_pixels, images.shape[1], n_blocks * BLOCK), x.dtype),
        name='sparse_jax_input_gradient' if transpose_rhs else 'sparse_jax_forward',
    )(units, _list_indices(pointers, len(units)), pointers, images, w)
    visited = jnp.repeat(pointers[1:] > pointers[:-1], BLOCK)
    return jnp.where(visited, y, jnp.zeros((), y.dtype))


def _gradient(x, dy, units: _Units, pixel_map: PixelMap, out, out_index_map: Callable, *, absolute_sums: bool = False) -> jax.Array:
    """x.T @ dy for each unit.

    Args:
      x: [batch, height, width, in].
      dy: [batch, height, width, out].
      units: those that are computed.
      pixel_map: which pixel of x a tap reads.
      out: zeros, which the results are written into.
      out_index_map: (unit_idx, units, n_indices) to the block of `out` that a unit's result is written to.
      absolute_sums: whether only the sums of the results' absolute values are written, in 8 rows.

    Returns:
      `out` with the results in it.
    """
    batch, num_taps, num_pixels = x.shape[0], math.prod(pixel_map.kernel_shape), math.prod(pixel_map.result_shape)
    images, block_m = _from_images(x), _block_m(batch)
    m_tiles = images.shape[1] // block_m
    num_steps = num_pixels * m_tiles

    def kernel(units, n_indices, count, x_ref, dy_ref, zeros_ref, out_ref, acc_ref):
        del zeros_ref
        unit_idx, step = pl.program_id(0), pl.program_id(1)

        @pl.when(step == 0)
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)

        @pl.when((unit_idx < count[0]) & (pixel_map.at(lax.div(step, m_tiles), lax.rem(units[unit_idx], num_taps))[1]))
        def _():
            contracting = ((0,), (0,)), ((), ())
            acc_ref[...] += lax.dot_general(x_ref[0], dy_ref[0], contracting, preferred_element_type=jnp.float32)

        @pl.when(step == num_steps - 1)
        def _():
            result = jnp.abs(acc_ref[...]).reshape(-1, 8, BLOCK).sum(0) if absolute_sums else acc_ref[...]
            out_ref[0] = result.astype(out_ref.dtype)

    def x_index_map(unit_idx, step, units, n_indices, count):
        return (
            pixel_map.at(lax.div(step, m_tiles), lax.rem(units[unit_idx], num_taps))[0],
            lax.rem(step, m_tiles),
            lax.div(units[unit_idx], num_taps),
        )

    def dy_index_map(unit_idx, step, units, n_indices, count):
        return lax.div(step, m_tiles), lax.rem(step, m_tiles), n_indices[unit_idx]

    out_block = (1, 8, BLOCK) if absolute_sums else (1, BLOCK, BLOCK)
    results = _call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(jnp.maximum(units.count, 1), num_steps),
            in_specs=[
                pl.BlockSpec((1, block_m, BLOCK), x_index_map),
                pl.BlockSpec((1, block_m, BLOCK), dy_index_map),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(
                out_block, lambda unit_idx, step, units, n_indices, _: out_index_map(unit_idx, units, n_indices)
            ),
            scratch_shapes=[pltpu.VMEM((BLOCK, BLOCK), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={5: 0},
        name='sparse_jax_scores' if absolute_sums else 'sparse_jax_weight_gradient',
    )(units.units, units.n_indices, units.count.reshape(1), images, _from_images(dy), out)
    return results if absolute_sums else jnp.where(units.count > 0, results, jnp.zeros((), results.dtype))
