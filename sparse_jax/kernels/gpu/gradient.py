"""Weight gradient at the units of a block pattern, and the size of the dense gradient in each block, on the tensor cores of Hopper.

A program owns up to `units_per_program` units that share a block of outputs, so that a tile of dy is read once for all of them:

    acc[unit] += x[images, pixel(tap), block_k].T @ dy[images, pixel, block_n]   over all images and pixels

The gradient is a dense array with zeros off the pattern, as the optimizer takes it. Units are listed in ascending order, so the program
that owns a unit also writes the zeros between it and the unit before: each block is written once, by one program, and no pass over the
weight is made beforehand.

Of compact values there are no zeros to write: a unit is written at its number.

A small weight has few units, and each is a sum over all images and pixels: a dozen programs would keep a dozen of 132 multiprocessors
busy. There :func:`partial_gradients` gives each program a part of the images and pixels only, and the partial sums, in float32, are added
up afterwards, in their order. Into how many is a rule of shapes (``config.num_splits``), so that no measurement changes the order of sums.

Growth wants to know in which missing blocks the gradient is large. :func:`scores` computes that for all blocks and keeps the sum of each
row's absolute values only: the dense gradient itself is never in memory.

A tensor core's result has 64 rows. A block with 32 inputs is multiplied together with the one beside it, which is then left out: the
*window* of x that a program reads has more channels than the block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_jax.kernels.gpu.call import call, once
from sparse_jax.kernels.gpu.config import ACC, SPLIT_M, Config, swizzled, window_rows


class Operands(NamedTuple):
    """What a weight gradient reads: arrays, and inside the kernel references to them in global memory.

    Attributes:
      x: [images, pixels, in], whose last pixel is all zeros where `pixels` points there; `in` is a multiple of a window's rows too.
      dy: [images, pixels of the result, out].
      units: int32[capacity]: block of inputs * taps + tap, by block of outputs, ascending.
      pointers: int32[blocks of outputs + 1] into `units`.
      pixels: int32[pixels of the result, taps]: the pixel of x that a tap reads.
    """

    x: Any
    dy: Any
    units: Any
    pointers: Any
    pixels: Any


class CompactOperands(NamedTuple):
    """What the gradient of compact values reads: see :class:`Operands`.

    Attributes:
      numbers: int32[capacity]: which unit of the values each of `units` is.
    """

    x: Any
    dy: Any
    units: Any
    pointers: Any
    pixels: Any
    numbers: Any


class ScoreOperands(NamedTuple):
    """What block scores read; see :class:`Operands`."""

    x: Any
    dy: Any
    pixels: Any


class _Tiling(NamedTuple):
    block_m: int  # images of a tile of x and dy, which a step adds up
    block_k: int  # inputs of a unit
    block_n: int  # outputs of a unit
    window_k: int  # channels of x that are multiplied: block_k or more
    num_stages: int
    units_per_program: int


def _tiling(kernel: str, block: tuple[int, int], config: Config) -> _Tiling:
    return _Tiling(
        block_m=config.block_m,
        block_k=block[0],
        block_n=block[1],
        window_k=window_rows(kernel, block[0]),
        num_stages=config.num_stages,
        units_per_program=config.units_per_program,
    )


@once
def gradient(operands: Operands, *, k_blocks: int, block: tuple[int, int], config: Config, interpret=None) -> jax.Array:
    """The weight gradient; all sides are multiples of their tiles.

    Args:
      operands: see :class:`Operands`.
      k_blocks: blocks of inputs.
      block: inputs and outputs.
      config: tiles.
      interpret: parameters of the interpreter; None: compile.

    Returns:
      [taps, k_blocks * inputs of a block, out], of x's type; zero where there is no unit.
    """
    tiling = _tiling('weight_gradient', block, config)
    dtype, outputs, num_taps = operands.x.dtype, operands.dy.shape[-1], operands.pixels.shape[1]
    tile = plgpu.SMEM((tiling.window_k, tiling.block_n), dtype, transforms=swizzled(dtype, tiling.block_n))
    return call(
        functools.partial(_gradient_kernel, k_blocks=k_blocks, tiling=tiling),
        'sparse_jax_weight_gradient',
        operands,
        out_type=jax.ShapeDtypeStruct((num_taps, k_blocks * tiling.block_k, outputs), dtype),
        scratch_types=[tile] * (1 + tiling.units_per_program),
        # the first programs of each list, which all have work, come first
        grid=(pl.cdiv(k_blocks * num_taps, tiling.units_per_program), outputs // tiling.block_n),
        grid_names=('group', 'n'),
        interpret=interpret,
    )


def _gradient_kernel(gmem: Operands, dw_gmem, zeros_smem, *dw_smems, k_blocks: int, tiling: _Tiling) -> None:
    """A group of units of one list, and the zeros before them; the last group writes the zeros after them too."""
    num_taps, group_size = gmem.pixels.shape[1], tiling.units_per_program
    block_k, block_n = tiling.block_k, tiling.block_n
    n_idx, group_idx = lax.axis_index('n'), lax.axis_index('group')
    list_start, list_end = gmem.pointers[n_idx], gmem.pointers[n_idx + 1]
    group_start = list_start + group_idx * group_size

    def unit_gmem(unit):
        k_idx = lax.div(unit, num_taps)
        return dw_gmem.at[lax.rem(unit, num_taps), pl.ds(k_idx * block_k, block_k), pl.ds(n_idx * block_n, block_n)]

    def write_zeros(first, end):
        def write_one(unit, carry):
            plgpu.copy_smem_to_gmem(zeros_smem.at[:block_k], unit_gmem(unit))
            return carry

        lax.fori_loop(first, end, write_one, 0)

    @pl.when(group_idx * group_size < lax.max(list_end - list_start, 1))
    def _():
        zeros_smem[...] = plgpu.layout_cast(jnp.zeros((tiling.window_k, block_n), gmem.x.dtype), plgpu.Layout.WGMMA)
        plgpu.commit_smem()

        @pl.when(list_end > list_start)
        def _():
            x_index_maps = _unit_index_maps(gmem, group_start, list_end, tiling)
            accs = _accumulate(gmem, x_index_maps, n_idx, _whole(gmem, tiling), tiling)
            for dw_smem, acc in zip(dw_smems, accs, strict=True):
                dw_smem[...] = acc.astype(gmem.x.dtype)
            plgpu.commit_smem()
            for i, dw_smem in enumerate(dw_smems):

                @pl.when(group_start + i < list_end)
                def _(i=i, dw_smem=dw_smem):
                    unit = gmem.units[group_start + i]
                    unit_before = jnp.where(group_start + i > list_start, gmem.units[lax.max(group_start + i - 1, 0)], -1)
                    write_zeros(unit_before + 1, unit)
                    _store(dw_smem, lax.div(unit, num_taps), block_k, unit_gmem(unit))

        @pl.when(group_start + group_size >= list_end)
        def _():
            last_unit = jnp.where(list_end > list_start, gmem.units[lax.max(list_end - 1, 0)], -1)
            write_zeros(last_unit + 1, k_blocks * num_taps)

        plgpu.wait_smem_to_gmem(0)


@once
def partial_gradients(
    operands: Operands | CompactOperands, *, block: tuple[int, int], num_splits: int, config: Config, interpret=None
) -> jax.Array:
    """The units' sums over each of `num_splits` parts of the images and pixels; other arguments as in :func:`gradient`.

    Returns:
      [num_splits, capacity, inputs, outputs of a block], float32, or of x's type where there is one part; in the order of the lists, or
      by their numbers. Undefined past the lists' end (where ``jax_debug_nans`` may meet NaN).
    """
    tiling = _tiling('weight_gradient', block, config)
    capacity, num_taps = len(operands.units), operands.pixels.shape[1]
    max_units = min(capacity, operands.x.shape[-1] // tiling.block_k * num_taps)  # of a block of outputs
    dtype = operands.x.dtype if num_splits == 1 else jnp.float32
    tile = plgpu.SMEM((tiling.window_k, tiling.block_n), dtype, transforms=swizzled(dtype, tiling.block_n))
    return call(
        functools.partial(_partial_kernel, num_splits=num_splits, tiling=tiling),
        'sparse_jax_weight_gradient',
        operands,
        out_type=jax.ShapeDtypeStruct((num_splits, capacity, *block), dtype),
        scratch_types=[tile] * tiling.units_per_program,
        grid=(num_splits, pl.cdiv(max_units, tiling.units_per_program), operands.dy.shape[-1] // tiling.block_n),
        grid_names=('split', 'group', 'n'),
        interpret=interpret,
    )


def _partial_kernel(gmem: Operands | CompactOperands, sums_gmem, *sums_smems, num_splits: int, tiling: _Tiling) -> None:
    """A group of units of one list, over one part of the images and pixels."""
    split_idx, n_idx, group_idx = lax.axis_index('split'), lax.axis_index('n'), lax.axis_index('group')
    list_end = gmem.pointers[n_idx + 1]
    group_start = gmem.pointers[n_idx] + group_idx * tiling.units_per_program

    @pl.when(group_start < list_end)
    def _():
        x_index_maps = _unit_index_maps(gmem, group_start, list_end, tiling)
        accs = _accumulate(gmem, x_index_maps, n_idx, _part(gmem, split_idx, num_splits, tiling), tiling)
        for sums_smem, acc in zip(sums_smems, accs, strict=True):
            sums_smem[...] = acc.astype(sums_gmem.dtype)
        plgpu.commit_smem()
        for i, sums_smem in enumerate(sums_smems):

            @pl.when(group_start + i < list_end)
            def _(i=i, sums_smem=sums_smem):
                k_idx = lax.div(gmem.units[group_start + i], gmem.pixels.shape[1])
                number = gmem.numbers[group_start + i] if isinstance(gmem, CompactOperands) else group_start + i
                _store(sums_smem, k_idx, tiling.block_k, sums_gmem.at[split_idx, number])

        plgpu.wait_smem_to_gmem(0)


@once
def scores(operands: ScoreOperands, *, block: tuple[int, int], config: Config, interpret=None) -> jax.Array:
    """Sums of each row's absolute values, in each block of the dense weight gradient; other arguments as in :func:`gradient`.

    Returns:
      float32[windows, taps, blocks of outputs, rows of a window]; a window has one or several blocks of inputs.
    """
    tiling = _tiling('scores', block, config)
    num_windows, num_taps = operands.x.shape[-1] // tiling.window_k, operands.pixels.shape[1]
    num_units, n_blocks = num_windows * num_taps, operands.dy.shape[-1] // tiling.block_n
    sums = call(
        functools.partial(_scores_kernel, num_units=num_units, tiling=tiling),
        'sparse_jax_scores',
        operands,
        out_type=jax.ShapeDtypeStruct((num_units, n_blocks, tiling.window_k), jnp.float32),
        scratch_types=[plgpu.SMEM((tiling.window_k,), jnp.float32)] * tiling.units_per_program,
        grid=(pl.cdiv(num_units, tiling.units_per_program), n_blocks),
        grid_names=('group', 'n'),
        interpret=interpret,
    )
    return sums.reshape(num_windows, num_taps, n_blocks, tiling.window_k)


def _scores_kernel(gmem: ScoreOperands, sums_gmem, *sums_smems, num_units: int, tiling: _Tiling) -> None:
    """A group of windows at a tap and a block of outputs: as if they were units, and all of them existed."""
    num_taps, group_size = gmem.pixels.shape[1], tiling.units_per_program
    n_idx, group_idx = lax.axis_index('n'), lax.axis_index('group')
    unit_at = lambda i: lax.min(group_idx * group_size + i, num_units - 1)

    def index_map_of(i):
        return lambda pixel_idx, m_idx: (
            m_idx,
            gmem.pixels[pixel_idx, lax.rem(unit_at(i), num_taps)],
            lax.div(unit_at(i), num_taps),
        )

    x_index_maps = [index_map_of(i) for i in range(group_size)]
    accs = _accumulate(gmem, x_index_maps, n_idx, _whole(gmem, tiling), tiling)
    for sums_smem, acc in zip(sums_smems, accs, strict=True):
        sums_smem[...] = jnp.sum(jnp.abs(acc), axis=1)
    plgpu.commit_smem()
    for i, sums_smem in enumerate(sums_smems):

        @pl.when(group_idx * group_size + i < num_units)
        def _(i=i, sums_smem=sums_smem):
            plgpu.copy_smem_to_gmem(sums_smem, sums_gmem.at[group_idx * group_size + i, n_idx])

    plgpu.wait_smem_to_gmem(0)


def _unit_index_maps(gmem: Operands | CompactOperands, group_start, list_end, tiling: _Tiling) -> list[Callable]:
    """Where x is read for each unit of a group; past the list's end for its last one once more, which is not stored."""
    num_taps = gmem.pixels.shape[1]

    def index_map_of(i):
        def x_index_map(pixel_idx, m_idx):
            unit = gmem.units[lax.min(group_start + i, list_end - 1)]
            lhs_pixel_idx = gmem.pixels[pixel_idx, lax.rem(unit, num_taps)]
            return m_idx, lhs_pixel_idx, lax.div(lax.div(unit, num_taps) * tiling.block_k, tiling.window_k)

        return x_index_map

    return [index_map_of(i) for i in range(tiling.units_per_program)]


def _store(window_smem, k_idx, block_k: int, unit_gmem) -> None:
    """Copies a unit's rows of a window: all of them, or the part that its block of inputs, `k_idx`, is."""
    blocks_per_window = window_smem.shape[0] // block_k
    for i in range(blocks_per_window):

        @pl.when(lax.rem(k_idx, blocks_per_window) == i)
        def _(i=i):
            plgpu.copy_smem_to_gmem(window_smem.at[i * block_k : (i + 1) * block_k], unit_gmem)


class _Range(NamedTuple):
    """The pixels of the result and the tiles of images that a program adds up."""

    start: tuple[Any, Any]
    size: tuple[Any, Any]


def _whole(gmem: Operands | CompactOperands | ScoreOperands, tiling: _Tiling) -> _Range:
    return _Range((0, 0), (gmem.pixels.shape[0], gmem.x.shape[0] // tiling.block_m))


def _part(gmem: Operands | CompactOperands, split_idx, num_splits: int, tiling: _Tiling) -> _Range:
    """Pixels are divided where there are enough, or else images, in steps that the tiles of all configs divide."""
    num_pixels, m_tiles = _whole(gmem, tiling).size
    if num_splits <= num_pixels:
        first, end = (lax.div((split_idx + i) * num_pixels, num_splits) for i in (0, 1))
        return _Range((first, 0), (end - first, m_tiles))
    chunk = SPLIT_M // tiling.block_m
    first, end = (lax.min(lax.div((split_idx + i) * pl.cdiv(m_tiles, chunk), num_splits) * chunk, m_tiles) for i in (0, 1))
    return _Range((0, first), (num_pixels, end - first))


def _accumulate(
    gmem: Operands | CompactOperands | ScoreOperands, x_index_maps: Sequence[Callable], n_idx, within: _Range, tiling: _Tiling
) -> list[jax.Array]:
    """x.T @ dy over a range of pixels and images, for each window of x and one block of dy: float32[window_k, block_n], in registers."""
    window_k, block_n, block_m = tiling.window_k, tiling.block_n, tiling.block_m
    options: Any = dict(transforms=swizzled(gmem.x.dtype, window_k, block_n), delay_release=1)
    shifted = lambda index_map: lambda pixel_idx, m_idx: index_map(within.start[0] + pixel_idx, within.start[1] + m_idx)

    def accumulate(*accs):
        dy_spec = plgpu.BlockSpec((block_m, None, block_n), shifted(lambda pixel_idx, m_idx: (m_idx, pixel_idx, n_idx)), **options)
        x_specs = [plgpu.BlockSpec((block_m, None, window_k), shifted(index_map), **options) for index_map in x_index_maps]
        plgpu.emit_pipeline(
            functools.partial(_multiply, accs=accs),
            in_specs=[dy_spec, *x_specs],
            grid=within.size,
            max_concurrent_steps=tiling.num_stages,
        )(gmem.dy, *[gmem.x] * len(x_index_maps))
        return [acc[...] for acc in accs]

    return pl.run_scoped(accumulate, *[ACC((window_k, block_n), jnp.float32)] * len(x_index_maps))


def _multiply(_, dy_smem, *x_smems, accs) -> None:
    """One step of the pipeline."""
    for acc, x_smem in zip(accs, x_smems, strict=True):
        plgpu.wgmma(acc, x_smem.transpose((1, 0)), dy_smem)
    plgpu.wgmma_wait(len(accs))  # the products of the step before are done: its stage may be filled again
