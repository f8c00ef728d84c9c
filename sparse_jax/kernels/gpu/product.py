"""Product with a block-sparse weight on the tensor cores of Hopper: forward and, over the transposed lists, the input gradient.

One kernel does both, for matrices and convolutions. Images lie as [images, pixels, channels]; a matrix product has one pixel. A program
owns a tile of `block_m` images at one pixel of the result and one block of `block_n` of its channels. It walks the list of that block's
units, `block_k` of their channels a step, and for each adds

    acc[block_m, block_n] += x[images, pixel(tap), block_k] @ w[tap, block_k, block_n]

with both tiles brought by TMA in a ring of stages, read straight from the images and from the dense weight: nothing is packed, and no
value is copied when masks change. Of a compact weight the tile is that of a unit, by its number, and no dense weight is there. The accumulator stays in registers; no two programs write to one tile. The taps of a convolution are
another index of pixels, nothing else; strides are too, so that images are never rearranged. Where a tap lies outside of an image some
pixel is read and multiplied with a tap of zeros: that costs a copy of the weight, which is smaller than images with a frame of zeros.

The input gradient is the same walk over the transposed lists, with w transposed as it is read. At a stride a pixel of the input is
met by some of the taps only: its *phase*, (row mod stride, column mod stride), tells which, and lists are sorted by phase.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_jax.kernels.gpu.call import call, once
from sparse_jax.kernels.gpu.config import ACC, Config, swizzled


class Operands(NamedTuple):
    """What a product reads: arrays, and inside the kernel references to them in global memory.

    Attributes:
      x: [images, pixels, channels], the left operand.
      w: [taps, in, out], dense, and one more tap of zeros where `pixels` points outside of x.
      units: int32[capacity]: block of x's channels * taps + tap, by block of the result's channels and then phase.
      pointers: int32[blocks * phases + 1] into `units`.
      pixels: int32[pixels of the result, taps]: the pixel of x that a tap reads; the one after the last: none.
      phases: int32[pixels of the result].
    """

    x: Any
    w: Any
    units: Any
    pointers: Any
    pixels: Any
    phases: Any


class CompactOperands(NamedTuple):
    """What a product with a compact weight reads.

    Attributes:
      x: as in :class:`Operands`.
      w: [capacity, inputs, outputs of a block], and one more unit of zeros where `pixels` points outside of x.
      units: likewise.
      pointers: likewise.
      pixels: likewise.
      phases: likewise.
      numbers: int32[capacity]: which unit of w each of `units` is.
    """

    x: Any
    w: Any
    units: Any
    pointers: Any
    pixels: Any
    phases: Any
    numbers: Any


class _Tiling(NamedTuple):
    block_m: int  # images of a tile
    block_n: int  # channels of the result: a whole side of a unit
    block_k: int  # channels of x that one step multiplies
    k_tiles: int  # steps that a unit takes
    n_tiles: int  # blocks of the result's channels
    num_stages: int
    transpose_rhs: bool


@once
def product(
    operands: Operands | CompactOperands,
    *,
    block: tuple[int, int],
    n_tiles: int,
    transpose_rhs: bool,
    config: Config,
    interpret=None,
) -> jax.Array:
    """The walk above; all sides are multiples of their tiles.

    Args:
      operands: see :class:`Operands` and :class:`CompactOperands`.
      block: of the weight, inputs and outputs.
      n_tiles: blocks of the result's channels.
      transpose_rhs: whether w is read transposed, and the result has its inputs as channels.
      config: tiles.
      interpret: parameters of the interpreter; None: compile.

    Returns:
      [images, pixels of the result, channels of the result], of x's type.
    """
    unit_k, block_n = reversed(block) if transpose_rhs else block
    block_k = min(config.block_k, unit_k)
    tiling = _Tiling(
        block_m=config.block_m,
        block_n=block_n,
        block_k=block_k,
        k_tiles=unit_k // block_k,
        n_tiles=n_tiles,
        num_stages=config.num_stages,
        transpose_rhs=transpose_rhs,
    )
    m, dtype, num_pixels = operands.x.shape[0], operands.x.dtype, operands.pixels.shape[0]
    return call(
        functools.partial(_kernel, tiling=tiling),
        'sparse_jax_input_gradient' if transpose_rhs else 'sparse_jax_forward',
        operands,
        out_type=jax.ShapeDtypeStruct((m, num_pixels, tiling.n_tiles * block_n), dtype),
        scratch_types=dict(y_smem=plgpu.SMEM((tiling.block_m, block_n), dtype, transforms=swizzled(dtype, block_n))),
        grid=(m // tiling.block_m * num_pixels * tiling.n_tiles,),
        grid_names=('program',),
        interpret=interpret,
    )


def _kernel(gmem: Operands | CompactOperands, y_gmem, y_smem, *, tiling: _Tiling) -> None:
    """One tile of the result, at one of its pixels."""
    block_m, block_n, n_tiles = tiling.block_m, tiling.block_n, tiling.n_tiles
    num_pixels, num_phases = gmem.pixels.shape[0], (gmem.pointers.shape[0] - 1) // n_tiles
    # one axis, as a GPU's second and third have 65,535 programs at most; those that share images run side by side
    program = lax.axis_index('program')
    n_idx, m_pixel_idx = lax.rem(program, n_tiles), lax.div(program, n_tiles)
    pixel_idx, m_idx = lax.rem(m_pixel_idx, num_pixels), lax.div(m_pixel_idx, num_pixels)
    list_idx = n_idx * num_phases + gmem.phases[pixel_idx] if num_phases > 1 else n_idx
    first_unit = gmem.pointers[list_idx]
    num_units = gmem.pointers[list_idx + 1] - first_unit
    x_index_map, w_index_map = _index_maps(gmem, first_unit, (m_idx, n_idx, pixel_idx), tiling)

    def accumulate(acc):
        w_tile = (block_n, tiling.block_k) if tiling.transpose_rhs else (tiling.block_k, block_n)
        options: Any = dict(transforms=swizzled(gmem.x.dtype, tiling.block_k, w_tile[1]), delay_release=1)
        plgpu.emit_pipeline(
            functools.partial(_multiply, acc=acc, transpose_rhs=tiling.transpose_rhs),
            in_specs=[
                plgpu.BlockSpec((block_m, None, tiling.block_k), x_index_map, **options),
                plgpu.BlockSpec((None, *w_tile), w_index_map, **options),
            ],
            grid=(num_units * tiling.k_tiles,),
            max_concurrent_steps=tiling.num_stages,
        )(gmem.x, gmem.w)
        return acc[...]

    y_smem[...] = pl.run_scoped(accumulate, ACC((block_m, block_n), jnp.float32)).astype(gmem.x.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[pl.ds(m_idx * block_m, block_m), pixel_idx, pl.ds(n_idx * block_n, block_n)])
    plgpu.wait_smem_to_gmem(0)


def _index_maps(
    gmem: Operands | CompactOperands, first_unit, tile_idx: tuple[Any, Any, Any], tiling: _Tiling
) -> tuple[Callable, Callable]:
    """Which tiles of x and w each step multiplies, for the tile (m, n, pixel) of the result."""
    m_idx, n_idx, pixel_idx = tile_idx
    num_taps, last_pixel = gmem.pixels.shape[1], gmem.x.shape[1] - 1
    has_tap_of_zeros = gmem.w.shape[0] > num_taps

    def k_and_tap(step):
        unit = gmem.units[first_unit + lax.div(step, tiling.k_tiles)]
        return lax.div(unit, num_taps) * tiling.k_tiles + lax.rem(step, tiling.k_tiles), lax.rem(unit, num_taps)

    def x_index_map(step):
        k_idx, tap_idx = k_and_tap(step)
        return m_idx, lax.min(gmem.pixels[pixel_idx, tap_idx], last_pixel), k_idx

    def w_index_map(step):
        k_idx, tap_idx = k_and_tap(step)
        if has_tap_of_zeros:
            tap_idx = jnp.where(gmem.pixels[pixel_idx, tap_idx] > last_pixel, num_taps, tap_idx)
        return (tap_idx, n_idx, k_idx) if tiling.transpose_rhs else (tap_idx, k_idx, n_idx)

    if isinstance(gmem, Operands):
        return x_index_map, w_index_map
    has_unit_of_zeros = gmem.w.shape[0] > gmem.numbers.shape[0]

    def unit_index_map(step):
        number = gmem.numbers[first_unit + lax.div(step, tiling.k_tiles)]
        if has_unit_of_zeros:
            _, tap_idx = k_and_tap(step)
            number = jnp.where(gmem.pixels[pixel_idx, tap_idx] > last_pixel, gmem.w.shape[0] - 1, number)
        part = lax.rem(step, tiling.k_tiles)
        return (number, 0, part) if tiling.transpose_rhs else (number, part, 0)

    return x_index_map, unit_index_map


def _multiply(_, x_smem, w_smem, *, acc, transpose_rhs: bool) -> None:
    """One step of the pipeline."""
    plgpu.wgmma(acc, x_smem, w_smem.transpose((1, 0)) if transpose_rhs else w_smem)
    plgpu.wgmma_wait(1)  # the step before has been multiplied: its stage may be filled again
