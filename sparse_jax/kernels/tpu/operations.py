"""The products of reference.py on a TPU: Pallas kernels whose tiles are picked by prefetched scalars.

Images lie as [pixels, batch, channels], of a matrix product with one pixel: batch and channels fill the vector registers, and a tap is
another first index. The grid walks a pattern's units in their order, by block of outputs, so that a tile of the result stays in VMEM
until its list ends; the number of units is the grid's (dynamic) last side, so that room in the lists costs nothing. A block of outputs
that has no unit is never visited: its channels are set to zero afterwards.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_jax.kernels import device
from sparse_jax.kernels import pixels as pixels_lib
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.pixels import Taps
from sparse_jax.kernels.reference import Geometry
from sparse_jax.kernels.tpu import BLOCK

_TILES = (1024, 512, 256, 128, 64, 32, 16)  # images or tokens; 16 rows of bfloat16 fill a register


def forward(x, w, pattern: Pattern, geometry: Geometry) -> jax.Array:
    """As in reference.py."""
    result = geometry.output_shape(x.shape, w.shape)
    pixels = pixels_lib.of_product(geometry, x.shape[1:3], result[1:3], w.shape[:2])
    y = _product(x, w, pattern.indices, pattern.pointers, pixels, transposed=False)
    return _back(y, result)


def input_gradient(dy, w, pattern: Pattern, geometry: Geometry, x_shape: tuple[int, ...]) -> jax.Array:
    """As in reference.py."""
    pixels = pixels_lib.of_gradient(geometry, x_shape[1:3], dy.shape[1:3], w.shape[:2])
    dx = _product(dy, w, pattern.transposed_indices, pattern.transposed_pointers, pixels, transposed=True)
    return _back(dx, x_shape)


def weight_gradient(x, dy, pattern: Pattern, geometry: Geometry, w_shape: tuple[int, ...]) -> jax.Array:
    """As in reference.py."""
    taps = math.prod(w_shape[:-2])
    pixels = pixels_lib.of_product(geometry, x.shape[1:3], dy.shape[1:3], w_shape[:2])
    padded = taps, *(-(-n // BLOCK) * BLOCK for n in w_shape[-2:])
    units, pointers = jnp.asarray(pattern.indices), jnp.asarray(pattern.pointers)
    place = lambda units, outputs, unit: (lax.rem(units[unit], taps), lax.div(units[unit], taps), outputs[unit])
    dw = _gradient(x, dy, units, _owners(pointers, len(units)), pointers[-1], pixels, jnp.zeros(padded, x.dtype), place)
    return dw[:, : w_shape[-2], : w_shape[-1]].reshape(w_shape)


def block_scores(x, dy, w_shape: tuple[int, ...], geometry: Geometry, block: tuple[int, int]) -> jax.Array:
    """Sums of the absolute values of the dense weight gradient, float32[taps..., blocks of inputs, blocks of outputs]."""
    taps, (inputs, outputs) = math.prod(w_shape[:-2]), (-(-n // side) for n, side in zip(w_shape[-2:], block, strict=True))
    pixels = pixels_lib.of_product(geometry, x.shape[1:3], dy.shape[1:3], w_shape[:2])
    units = jnp.asarray(np.tile(np.arange(inputs * taps, dtype=np.int32), outputs))
    owners = jnp.asarray(np.repeat(np.arange(outputs, dtype=np.int32), inputs * taps))
    place = lambda units, outputs, unit: (unit, 0, 0)
    sums = jnp.zeros((len(units), 8, BLOCK), jnp.float32)
    sums = _gradient(x, dy, units, owners, jnp.int32(len(units)), pixels, sums, place, summed=True).sum((1, 2))
    return sums.reshape(outputs, inputs, taps).transpose(2, 1, 0).reshape(*w_shape[:-2], inputs, outputs)


def _images(x) -> jax.Array:
    """[pixels, images, channels] of whole tiles."""
    batch, height, width, features = x.shape
    x = x.transpose(1, 2, 0, 3).reshape(height * width, batch, features)
    return jnp.pad(x, ((0, 0), (0, -batch % _tile(batch)), (0, -features % BLOCK)))


def _tile(batch: int) -> int:
    """The largest tile that wastes fewest rows.

    >>> _tile(8192), _tile(100), _tile(1)
    (1024, 16, 16)
    """
    return min(_TILES, key=lambda tile: (-(-batch // tile) * tile, -tile))


def _back(y, shape: tuple[int, ...]) -> jax.Array:
    """To [batch, height, width, channels]."""
    return y[:, : shape[0], : shape[-1]].reshape(*shape[1:3], shape[0], shape[-1]).transpose(2, 0, 1, 3)


def _owners(pointers, capacity: int) -> jax.Array:
    """Which list each unit is in."""
    number = jnp.arange(capacity, dtype=jnp.int32)
    owners = jnp.searchsorted(pointers, number, side='right') - 1
    return jnp.clip(owners, 0, len(pointers) - 2).astype(jnp.int32)


def _call(kernel, **options):
    return pl.pallas_call(kernel, interpret=device.interpret(), **options)


def _product(x, w, units, pointers, pixels: Taps, *, transposed: bool) -> jax.Array:
    """y[pixel, images, columns] = sum over the units of a list of x[pixel(tap), images, rows] @ w[tap, rows, columns]."""
    batch, taps, number = x.shape[0], math.prod(w.shape[:-2]), math.prod(pixels.result)
    images, tile = _images(x), _tile(batch)
    w = w.reshape(taps, *w.shape[-2:])
    w = jnp.pad(w, ((0, 0), (0, -w.shape[1] % BLOCK), (0, -w.shape[2] % BLOCK)))
    units, pointers = jnp.asarray(units), jnp.asarray(pointers)

    def kernel(units, lists, pointers, x_ref, w_ref, y_ref, sums_ref):
        pixel, unit = pl.program_id(1), pl.program_id(2)
        own = lists[unit]

        @pl.when(unit == pointers[own])
        def _():
            sums_ref[...] = jnp.zeros_like(sums_ref)

        @pl.when((unit < pointers[own + 1]) & (pixels.at(pixel, lax.rem(units[unit], taps))[1]))
        def _():
            over = ((1,), (1 if transposed else 0,)), ((), ())
            sums_ref[...] += lax.dot_general(x_ref[0], w_ref[0], over, preferred_element_type=jnp.float32)

        @pl.when(unit == pointers[own + 1] - 1)
        def _():
            y_ref[0] = sums_ref[...].astype(y_ref.dtype)

    def of_x(tokens, pixel, unit, units, lists, pointers):
        return pixels.at(pixel, lax.rem(units[unit], taps))[0], tokens, lax.div(units[unit], taps)

    def of_w(tokens, pixel, unit, units, lists, pointers):
        source = lax.div(units[unit], taps), lists[unit]
        return lax.rem(units[unit], taps), *(reversed(source) if transposed else source)

    blocks = len(pointers) - 1
    grid = images.shape[1] // tile, number, jnp.maximum(pointers[-1], 1)
    y = _call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[pl.BlockSpec((1, tile, BLOCK), of_x), pl.BlockSpec((1, BLOCK, BLOCK), of_w)],
            out_specs=pl.BlockSpec((1, tile, BLOCK), lambda tokens, pixel, unit, units, lists, *_: (pixel, tokens, lists[unit])),
            scratch_shapes=[pltpu.VMEM((tile, BLOCK), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((number, images.shape[1], blocks * BLOCK), x.dtype),
        name='sparse_jax_input_gradient' if transposed else 'sparse_jax_forward',
    )(units, _owners(pointers, len(units)), pointers, images, w)
    visited = jnp.repeat(pointers[1:] > pointers[:-1], BLOCK)
    return jnp.where(visited, y, jnp.zeros((), y.dtype))


def _gradient(x, dy, units, outputs, count, pixels: Taps, zeros, place, *, summed: bool = False) -> jax.Array:
    """x.T @ dy for each of `count` units, into the block of `zeros` that `place` says, or (summed) the sums of its absolute values."""
    batch, taps, number = x.shape[0], math.prod(pixels.taps), math.prod(pixels.result)
    images, tile = _images(x), _tile(batch)
    tiles = images.shape[1] // tile
    steps = number * tiles

    def kernel(units, outputs, count, x_ref, dy_ref, zeros_ref, dw_ref, sums_ref):
        del zeros_ref
        unit, step = pl.program_id(0), pl.program_id(1)

        @pl.when(step == 0)
        def _():
            sums_ref[...] = jnp.zeros_like(sums_ref)

        @pl.when((unit < count[0]) & (pixels.at(lax.div(step, tiles), lax.rem(units[unit], taps))[1]))
        def _():
            over = ((0,), (0,)), ((), ())
            sums_ref[...] += lax.dot_general(x_ref[0], dy_ref[0], over, preferred_element_type=jnp.float32)

        @pl.when(step == steps - 1)
        def _():
            sums = jnp.abs(sums_ref[...]).reshape(-1, 8, BLOCK).sum(0) if summed else sums_ref[...]
            dw_ref[0] = sums.astype(dw_ref.dtype)

    def of_x(unit, step, units, outputs, count):
        return (
            pixels.at(lax.div(step, tiles), lax.rem(units[unit], taps))[0],
            lax.rem(step, tiles),
            lax.div(units[unit], taps),
        )

    def of_dy(unit, step, units, outputs, count):
        return lax.div(step, tiles), lax.rem(step, tiles), outputs[unit]

    result = (1, 8, BLOCK) if summed else (1, BLOCK, BLOCK)
    dw = _call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(jnp.maximum(count, 1), steps),
            in_specs=[
                pl.BlockSpec((1, tile, BLOCK), of_x),
                pl.BlockSpec((1, tile, BLOCK), of_dy),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(result, lambda unit, step, units, outputs, *_: place(units, outputs, unit)),
            scratch_shapes=[pltpu.VMEM((BLOCK, BLOCK), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(zeros.shape, zeros.dtype),
        input_output_aliases={5: 0},
        name='sparse_jax_scores' if summed else 'sparse_jax_weight_gradient',
    )(units, outputs, count.reshape(1), images, _images(dy), zeros)
    return dw if summed else jnp.where(count > 0, dw, jnp.zeros((), dw.dtype))
