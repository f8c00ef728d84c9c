"""Which pixel a tap of a convolution meets: for kernels that walk pixels and taps, as tables or computed on the way."""

from typing import NamedTuple

import numpy as np
from jax import lax

from sparse_jax.kernels.reference import Geometry


class Taps(NamedTuple):
    """From a pixel of what is computed and a tap to the pixel that is read, along rows and columns alike:
    (pixel * multiply + offset + tap * step) / divide, where that is a whole number and inside."""

    source: tuple[int, int]  # rows and columns of what is read
    result: tuple[int, int]  # of what is computed
    taps: tuple[int, int]
    multiply: tuple[int, int]
    offset: tuple[int, int]
    step: tuple[int, int]
    divide: tuple[int, int]

    def at(self, pixel, tap, div=lax.div, rem=lax.rem):
        """Number of the pixel that is read, and whether there is one (the number is then inside all the same)."""
        numbers = (div(pixel, self.result[1]), rem(pixel, self.result[1])), (div(tap, self.taps[1]), rem(tap, self.taps[1]))
        there, found = True, []
        for axis, (at, k) in enumerate(zip(*numbers, strict=True)):
            place = at * self.multiply[axis] + self.offset[axis] + k * self.step[axis]
            whole = (place >= 0) & (place < self.source[axis] * self.divide[axis])
            place = place * whole
            whole &= rem(place, self.divide[axis]) == 0
            there, found = there & whole, [*found, div(place, self.divide[axis])]
        return found[0] * self.source[1] + found[1], there

    def table(self) -> np.ndarray:
        """int32[pixels, taps]: the number that is read; the one after the last where there is none.

        >>> of_product(Geometry(padding=((0, 0), (1, 1))), (1, 3), (1, 3), (1, 3)).table()
        array([[3, 0, 1],
               [0, 1, 2],
               [1, 2, 3]], dtype=int32)
        """
        pixel, tap = np.arange(np.prod(self.result))[:, None], np.arange(np.prod(self.taps))[None]
        numbers, there = self.at(pixel, tap, np.floor_divide, np.remainder)
        return np.where(there, numbers, np.prod(self.source)).astype(np.int32)


def of_product(geometry: Geometry, inputs: tuple[int, ...], outputs: tuple[int, ...], taps: tuple[int, ...]) -> Taps:
    """Which pixel of the images a pixel of the result reads."""
    starts = tuple(-low for low, _ in geometry.padding)
    return Taps(inputs, outputs, taps, geometry.strides, starts, geometry.dilation, (1, 1))  # type: ignore[arg-type]


def of_gradient(geometry: Geometry, inputs: tuple[int, ...], outputs: tuple[int, ...], taps: tuple[int, ...]) -> Taps:
    """Which pixel of the result's gradient a pixel of the images reads."""
    starts, steps = tuple(low for low, _ in geometry.padding), tuple(-d for d in geometry.dilation)
    return Taps(outputs, inputs, taps, (1, 1), starts, steps, geometry.strides)  # type: ignore[arg-type]
