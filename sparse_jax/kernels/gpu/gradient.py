"""Weight gradient at the units of a block pattern, and the size of the dense gradient in each block, on the tensor cores of Hopper.

A program owns up to `group` units that share a block of outputs, so that a tile of dy is read once for all of them:

    sums[unit] += x[images, pixel(tap), rows].T @ dy[images, pixel, columns]   over all images and pixels

The gradient is a dense array with zeros off the pattern, as the optimizer takes it. Units are listed in ascending order, so the program
that owns a unit also writes the zeros between it and the unit before: each block is written once, by one program, and no pass over the
weight is made beforehand.

A small weight has few units, and each is a sum over all images and pixels: a dozen programs would keep a dozen of 132 multiprocessors
busy. There :func:`partial_gradients` gives each program a part of the images and pixels only, and the parts, in float32, are added up
afterwards, in their order. Into how many is a rule of shapes (``config.splits``), so that no measurement changes the order of sums.

Growth wants to know in which missing blocks the gradient is large. :func:`scores` computes that for all blocks and keeps the sum of each
row's absolute values only: the dense gradient itself is never in memory.

A tensor core's result has 64 rows. A block with 32 inputs is multiplied together with the one beside it, which is then left out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_jax.kernels.gpu.config import ACC, IMAGES, Config, swizzled
from sparse_jax.kernels.gpu.config import window as window_rows


def gradient(
    x: jax.Array,
    dy: jax.Array,
    units: jax.Array,
    pointers: jax.Array,
    pixels: jax.Array,
    *,
    taps: int,
    inputs: int,
    block: tuple[int, int],
    config: Config,
    interpret=None,
) -> jax.Array:
    """The weight gradient; all sides are multiples of their tiles.

    Args:
      x: [images, pixels, in], whose last pixel is all zeros where `pixels` points there; `in` is a multiple of a window's rows too.
      dy: [images, pixels of the result, out].
      units: int32[capacity]: block of inputs * taps + tap, by block of outputs, ascending.
      pointers: int32[blocks of outputs + 1] into `units`.
      pixels: int32[pixels of the result, taps]: the pixel of x that a tap reads.
      taps: of the convolution.
      inputs: blocks of inputs.
      block: inputs and outputs.
      config: tiles.
      interpret: parameters of the interpreter; None: compile.

    Returns:
      [taps, inputs * rows of a block, out], of x's type; zero where there is no unit.
    """
    rows, columns = block
    wide = window_rows('weight_gradient', rows)
    group, number = config.group, inputs * taps  # of units that a block of outputs can have
    programs = pl.cdiv(number, group)

    def kernel(x_gmem, dy_gmem, units_gmem, pointers_gmem, pixels_gmem, dw_gmem, zeros_smem, *dw_smems):
        channel, place = lax.axis_index('channel'), lax.axis_index('place')
        first, end = pointers_gmem[channel], pointers_gmem[channel + 1]
        begin = first + place * group

        def target(unit):
            source = lax.div(unit, taps)
            return dw_gmem.at[lax.rem(unit, taps), pl.ds(source * rows, rows), pl.ds(channel * columns, columns)]

        def write_zeros(low, high):
            def one(unit, carry):
                plgpu.copy_smem_to_gmem(zeros_smem.at[:rows], target(unit))
                return carry

            lax.fori_loop(low, high, one, 0)

        @pl.when(place * group < lax.max(end - first, 1))
        def _():
            zeros_smem[...] = plgpu.layout_cast(jnp.zeros((wide, columns), x.dtype), plgpu.Layout.WGMMA)
            plgpu.commit_smem()

            @pl.when(end > first)
            def _():
                windows = _windows(units_gmem, pixels_gmem, begin, end, taps, block, group)
                results = _sums(x_gmem, dy_gmem, windows, channel, pixels.shape[0], (wide, columns), config)
                for dw_smem, result in zip(dw_smems, results, strict=True):
                    dw_smem[...] = result.astype(x.dtype)
                plgpu.commit_smem()
                for i, dw_smem in enumerate(dw_smems):

                    @pl.when(begin + i < end)
                    def _(i=i, dw_smem=dw_smem):
                        unit = units_gmem[begin + i]
                        write_zeros(jnp.where(begin + i > first, units_gmem[lax.max(begin + i - 1, 0)], -1) + 1, unit)
                        _store(dw_smem, lax.div(unit, taps), rows, target(unit))

            @pl.when(begin + group >= end)
            def _():
                write_zeros(jnp.where(end > first, units_gmem[lax.max(end - 1, 0)], -1) + 1, number)

            plgpu.wait_smem_to_gmem(0)

    kernel.__name__ = 'sparse_jax_weight_gradient'
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((taps, inputs * rows, dy.shape[-1]), x.dtype),
        scratch_types=[plgpu.SMEM((wide, columns), x.dtype, transforms=swizzled(x.dtype, columns))] * (1 + group),
        grid=(programs, dy.shape[-1] // columns),  # the first programs of each list, which all have work, come first
        grid_names=('place', 'channel'),
        **({} if interpret is None else dict(interpret=interpret)),
    )(x, dy, units, pointers, pixels)


def partial_gradients(
    x: jax.Array,
    dy: jax.Array,
    units: jax.Array,
    pointers: jax.Array,
    pixels: jax.Array,
    *,
    taps: int,
    block: tuple[int, int],
    splits: int,
    config: Config,
    interpret=None,
) -> jax.Array:
    """The units' sums over each of `splits` parts of the images and pixels; arguments as in :func:`gradient`.

    Returns:
      float32[splits, capacity, rows, columns of a block], undefined past the lists' end (where ``jax_debug_nans`` may meet NaN).
    """
    rows, columns = block
    wide = window_rows('weight_gradient', rows)
    group = config.group
    most = min(len(units), x.shape[-1] // rows * taps)  # units that a block of outputs can have

    def kernel(x_gmem, dy_gmem, units_gmem, pointers_gmem, pixels_gmem, sums_gmem, *sums_smems):
        split, channel, place = lax.axis_index('split'), lax.axis_index('channel'), lax.axis_index('place')
        end = pointers_gmem[channel + 1]
        begin = pointers_gmem[channel] + place * group

        @pl.when(begin < end)
        def _():
            windows = _windows(units_gmem, pixels_gmem, begin, end, taps, block, group)
            results = _sums(x_gmem, dy_gmem, windows, channel, pixels.shape[0], (wide, columns), config, split, splits)
            for sums_smem, result in zip(sums_smems, results, strict=True):
                sums_smem[...] = result
            plgpu.commit_smem()
            for i, sums_smem in enumerate(sums_smems):

                @pl.when(begin + i < end)
                def _(i=i, sums_smem=sums_smem):
                    _store(sums_smem, lax.div(units_gmem[begin + i], taps), rows, sums_gmem.at[split, begin + i])

            plgpu.wait_smem_to_gmem(0)

    kernel.__name__ = 'sparse_jax_weight_gradient'
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((splits, len(units), rows, columns), jnp.float32),
        scratch_types=[plgpu.SMEM((wide, columns), jnp.float32, transforms=swizzled(jnp.float32, columns))] * group,
        grid=(splits, pl.cdiv(most, group), dy.shape[-1] // columns),
        grid_names=('split', 'place', 'channel'),
        **({} if interpret is None else dict(interpret=interpret)),
    )(x, dy, units, pointers, pixels)


def scores(
    x: jax.Array,
    dy: jax.Array,
    pixels: jax.Array,
    *,
    block: tuple[int, int],
    config: Config,
    interpret=None,
) -> jax.Array:
    """Sums of each row's absolute values, in each block of the dense weight gradient; arguments as in :func:`gradient`.

    Returns:
      float32[windows, taps, blocks of outputs, rows of a window]; a window has one or several blocks of inputs.
    """
    rows, columns = block
    wide = window_rows('scores', rows)
    group, taps = config.group, pixels.shape[1]
    windows, channels = x.shape[-1] // wide, dy.shape[-1] // columns
    number = windows * taps

    def kernel(x_gmem, dy_gmem, pixels_gmem, sums_gmem, *sums_smems):
        channel, place = lax.axis_index('channel'), lax.axis_index('place')
        unit = lambda i: lax.min(place * group + i, number - 1)

        def window(i):
            return lambda pixel, tokens: (tokens, pixels_gmem[pixel, lax.rem(unit(i), taps)], lax.div(unit(i), taps))

        indices = [window(i) for i in range(group)]
        results = _sums(x_gmem, dy_gmem, indices, channel, pixels.shape[0], (wide, columns), config)
        for sums_smem, result in zip(sums_smems, results, strict=True):
            sums_smem[...] = jnp.sum(jnp.abs(result), axis=1)
        plgpu.commit_smem()
        for i, sums_smem in enumerate(sums_smems):

            @pl.when(place * group + i < number)
            def _(i=i, sums_smem=sums_smem):
                plgpu.copy_smem_to_gmem(sums_smem, sums_gmem.at[place * group + i, channel])

        plgpu.wait_smem_to_gmem(0)

    kernel.__name__ = 'sparse_jax_scores'
    sums = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((number, channels, wide), jnp.float32),
        scratch_types=[plgpu.SMEM((wide,), jnp.float32)] * group,
        grid=(pl.cdiv(number, group), channels),
        grid_names=('place', 'channel'),
        **({} if interpret is None else dict(interpret=interpret)),
    )(x, dy, pixels)
    return sums.reshape(windows, taps, channels, wide)


def _windows(units_gmem, pixels_gmem, begin, end, taps: int, block: tuple[int, int], group: int) -> list[Callable]:
    """Where x is read for the units at `begin` and after; past the list's end for its last one once more, which is not stored."""
    wide = window_rows('weight_gradient', block[0])

    def window(i):
        def index(pixel, tokens):
            unit = units_gmem[lax.min(begin + i, end - 1)]
            return tokens, pixels_gmem[pixel, lax.rem(unit, taps)], lax.div(lax.div(unit, taps) * block[0], wide)

        return index

    return [window(i) for i in range(group)]


def _store(smem, source, rows: int, target) -> None:
    """Copies a unit's rows of a window: all of them, or the part that its block of inputs, `source`, is."""
    parts = smem.shape[0] // rows
    for part in range(parts):

        @pl.when(lax.rem(source, parts) == part)
        def _(part=part):
            plgpu.copy_smem_to_gmem(smem.at[part * rows : (part + 1) * rows], target)


def _sums(
    x_gmem,
    dy_gmem,
    windows: Sequence[Callable],
    channel,
    pixels: int,
    tile: tuple[int, int],
    config: Config,
    split: Any = 0,
    splits: int = 1,
) -> list:
    """x.T @ dy over a part of the images and pixels, for each window of x and one block of dy: float32 of this tile, in registers.

    Pixels are divided where there are enough, or else images, in steps that all configs have.
    """
    rows, columns = tile
    tiles, begin, grid = x_gmem.shape[0] // config.tokens, (0, 0), (pixels, x_gmem.shape[0] // config.tokens)
    if 1 < splits <= pixels:
        first, last = (lax.div((split + i) * pixels, splits) for i in (0, 1))
        begin, grid = (first, 0), (last - first, tiles)
    elif splits > 1:
        chunk = IMAGES // config.tokens
        first, last = (lax.min(lax.div((split + i) * pl.cdiv(tiles, chunk), splits) * chunk, tiles) for i in (0, 1))
        begin, grid = (0, first), (pixels, last - first)
    own: Any = dict(transforms=swizzled(x_gmem.dtype, rows, columns), delay_release=1)

    def body(_, dy_smem, *x_smems, sums):
        for acc, x_smem in zip(sums, x_smems, strict=True):
            plgpu.wgmma(acc, x_smem.transpose((1, 0)), dy_smem)
        plgpu.wgmma_wait(len(sums))  # the products of the step before are done: its stage may be filled again

    def main(*sums):
        at = lambda index: lambda pixel, tokens: index(begin[0] + pixel, begin[1] + tokens)
        of_dy = plgpu.BlockSpec((config.tokens, None, columns), at(lambda pixel, tokens: (tokens, pixel, channel)), **own)
        of_x = [plgpu.BlockSpec((config.tokens, None, rows), at(window), **own) for window in windows]
        plgpu.emit_pipeline(
            functools.partial(body, sums=sums),
            in_specs=[of_dy, *of_x],
            grid=grid,
            max_concurrent_steps=config.stages,
        )(dy_gmem, *[x_gmem] * len(windows))
        return [acc[...] for acc in sums]

    return pl.run_scoped(main, *[ACC(tile, jnp.float32)] * len(windows))
