"""Which pixel a tap of a convolution reads: for kernels that walk pixels and taps, as a table or computed on the way."""

from typing import NamedTuple

import numpy as np
from jax import lax

from sparse_jax.kernels.reference import Geometry


class PixelMap(NamedTuple):
    """From a pixel of the result and a tap to the pixel of the left operand (lhs) that is read, along rows and columns alike:
    (pixel * window_strides + offset + tap * rhs_dilation) / lhs_dilation, where that is a whole number and inside the image.

    The names are those of XLA's convolutions. An input gradient reads the result's gradient, with the kernel reversed.
    """

    lhs_shape: tuple[int, int]  # rows and columns of what is read
    result_shape: tuple[int, int]  # of what is computed
    kernel_shape: tuple[int, int]  # taps
    window_strides: tuple[int, int]
    offset: tuple[int, int]
    rhs_dilation: tuple[int, int]
    lhs_dilation: tuple[int, int]

    def at(self, pixel_idx, tap_idx, div=lax.div, rem=lax.rem):
        """Index of the pixel that is read, and whether there is one (where there is none the index is inside the image all the same)."""
        result_columns, kernel_columns = self.result_shape[1], self.kernel_shape[1]
        pixel_position = div(pixel_idx, result_columns), rem(pixel_idx, result_columns)
        tap_position = div(tap_idx, kernel_columns), rem(tap_idx, kernel_columns)
        exists, lhs_position = True, []
        for axis, (pixel, tap) in enumerate(zip(pixel_position, tap_position, strict=True)):
            position = pixel * self.window_strides[axis] + self.offset[axis] + tap * self.rhs_dilation[axis]
            valid = (position >= 0) & (position < self.lhs_shape[axis] * self.lhs_dilation[axis])
            position = position * valid
            valid &= rem(position, self.lhs_dilation[axis]) == 0
            exists, lhs_position = exists & valid, [*lhs_position, div(position, self.lhs_dilation[axis])]
        return lhs_position[0] * self.lhs_shape[1] + lhs_position[1], exists

    def table(self) -> np.ndarray:
        """int32[pixels, taps]: the index of the pixel that is read; the number of pixels where there is none.

        >>> forward_pixels(Geometry(padding=((0, 0), (1, 1))), (1, 3), (1, 3), (1, 3)).table()
        array([[3, 0, 1],
               [0, 1, 2],
               [1, 2, 3]], dtype=int32)
        """
        pixel_idx, tap_idx = np.arange(np.prod(self.result_shape))[:, None], np.arange(np.prod(self.kernel_shape))[None]
        lhs_idx, exists = self.at(pixel_idx, tap_idx, np.floor_divide, np.remainder)
        return np.where(exists, lhs_idx, np.prod(self.lhs_shape)).astype(np.int32)


def forward_pixels(
    geometry: Geometry, inputs: tuple[int, ...], outputs: tuple[int, ...], kernel_shape: tuple[int, ...]
) -> PixelMap:
    """Which pixel of the images a pixel of the result reads."""
    offset = tuple(-low for low, _ in geometry.padding)
    return PixelMap(
        lhs_shape=inputs,  # type: ignore[arg-type]
        result_shape=outputs,  # type: ignore[arg-type]
        kernel_shape=kernel_shape,  # type: ignore[arg-type]
        window_strides=geometry.strides,
        offset=offset,  # type: ignore[arg-type]
        rhs_dilation=geometry.dilation,
        lhs_dilation=(1, 1),
    )


def input_gradient_pixels(
    geometry: Geometry, inputs: tuple[int, ...], outputs: tuple[int, ...], kernel_shape: tuple[int, ...]
) -> PixelMap:
    """Which pixel of the result's gradient a pixel of the images reads."""
    offset, dilation = tuple(low for low, _ in geometry.padding), tuple(-d for d in geometry.dilation)
    return PixelMap(
        lhs_shape=outputs,  # type: ignore[arg-type]
        result_shape=inputs,  # type: ignore[arg-type]
        kernel_shape=kernel_shape,  # type: ignore[arg-type]
        window_strides=(1, 1),
        offset=offset,  # type: ignore[arg-type]
        rhs_dilation=dilation,  # type: ignore[arg-type]
        lhs_dilation=geometry.strides,
    )
