"""Product with a block-sparse weight on the tensor cores of Hopper: forward and, over the transposed lists, the input gradient.

One kernel does both, for matrices and convolutions. Images lie as [images, pixels, channels]; a matrix product has one pixel. A program
owns a tile of images at one pixel of the result and one block of its channels. It walks the list of that block's units, and for each

    sums[images, columns] += x[images, pixel(tap), rows] @ w[tap, rows, columns]

with both tiles brought by TMA in a ring of stages, read straight from the images and from the dense weight: nothing is packed, and no
value is copied when masks change. Sums stay in registers; no two programs write to one place. The taps of a convolution are another
index of pixels, nothing else; strides are too, so that images are never rearranged. Where a tap lies outside of an image some pixel is
read and multiplied with a tap of zeros: that costs a copy of the weight, which is smaller than images with a frame of zeros.

The input gradient is the same walk over the transposed lists, with w transposed as it is read. At a stride a pixel of the input is
met by some of the taps only: its *phase*, (row mod stride, column mod stride), tells which, and lists are sorted by phase.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_jax.kernels.gpu.config import ACC, Config, swizzled


def product(
    x: jax.Array,
    w: jax.Array,
    units: jax.Array,
    pointers: jax.Array,
    pixels: jax.Array,
    phases: jax.Array,
    *,
    block: tuple[int, int],
    transposed: bool,
    config: Config,
    interpret=None,
) -> jax.Array:
    """The walk above; all sides are multiples of their tiles.

    Args:
      x: [images, pixels, channels], the factor.
      w: [taps, in, out], dense, and one more tap of zeros where `pixels` points outside of x.
      units: int32[capacity]: block of x's channels * taps + tap, by block of the result's channels and then phase.
      pointers: int32[blocks * phases + 1] into `units`.
      pixels: int32[pixels of the result, taps]: the pixel of x that a tap reads; the one after the last: none.
      phases: int32[pixels of the result].
      block: of the weight, inputs and outputs.
      transposed: whether w is read transposed, and the result has its inputs as channels.
      config: tiles.
      interpret: parameters of the interpreter; None: compile.

    Returns:
      [images, pixels of the result, channels of the result], of x's type.
    """
    images, last, taps = x.shape[0], x.shape[1] - 1, pixels.shape[1]
    weights, inputs, outputs = w.shape
    outside = weights > taps
    rows, columns = block
    depth, width = (columns, rows) if transposed else (rows, columns)
    part = min(config.depth, depth)  # of a unit, in a step
    parts = depth // part
    blocks = (inputs if transposed else outputs) // width
    number_of_pixels = pixels.shape[0]
    number_of_phases = (pointers.shape[0] - 1) // blocks
    tile = config.tokens

    def kernel(x_gmem, w_gmem, units_gmem, pointers_gmem, pixels_gmem, phases_gmem, y_gmem, y_smem):
        # one axis, as a GPU's second and third have 65,535 programs at most; those that share images run side by side
        program = lax.axis_index('program')
        channel, rest = lax.rem(program, blocks), lax.div(program, blocks)
        pixel, tokens = lax.rem(rest, number_of_pixels), lax.div(rest, number_of_pixels)
        row = channel * number_of_phases + phases_gmem[pixel] if number_of_phases > 1 else channel
        first = pointers_gmem[row]
        count = pointers_gmem[row + 1] - first

        def place(step):
            unit = units_gmem[first + lax.div(step, parts)]
            return lax.div(unit, taps) * parts + lax.rem(step, parts), lax.rem(unit, taps)

        def of_x(step):
            source, tap = place(step)
            return tokens, lax.min(pixels_gmem[pixel, tap], last), source

        def of_w(step):
            source, tap = place(step)
            if outside:
                tap = jnp.where(pixels_gmem[pixel, tap] > last, taps, tap)
            return (tap, channel, source) if transposed else (tap, source, channel)

        def body(_, x_smem, w_smem, *, sums):
            plgpu.wgmma(sums, x_smem, w_smem.transpose((1, 0)) if transposed else w_smem)
            plgpu.wgmma_wait(1)  # the step before has been multiplied: its stage may be filled again

        def main(sums):
            of_part = (rows, part) if transposed else (part, columns)
            of_stage: Any = dict(transforms=swizzled(x.dtype, part, of_part[1]), delay_release=1)
            plgpu.emit_pipeline(
                functools.partial(body, sums=sums),
                in_specs=[
                    plgpu.BlockSpec((tile, None, part), of_x, **of_stage),
                    plgpu.BlockSpec((None, *of_part), of_w, **of_stage),
                ],
                grid=(count * parts,),
                max_concurrent_steps=config.stages,
            )(x_gmem, w_gmem)
            return sums[...]

        y_smem[...] = pl.run_scoped(main, ACC((tile, width), jnp.float32)).astype(x.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[pl.ds(tokens * tile, tile), pixel, pl.ds(channel * width, width)])
        plgpu.wait_smem_to_gmem(0)

    kernel.__name__ = 'sparse_jax_input_gradient' if transposed else 'sparse_jax_forward'
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((images, number_of_pixels, blocks * width), x.dtype),
        scratch_types=dict(y_smem=plgpu.SMEM((tile, width), x.dtype, transforms=swizzled(x.dtype, width))),
        grid=(images // tile * number_of_pixels * blocks,),
        grid_names=('program',),
        **({} if interpret is None else dict(interpret=interpret)),
    )(x, w, units, pointers, pixels, phases)
