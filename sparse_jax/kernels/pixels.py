"""Which pixel a tap of a convolution meets, as tables for kernels whose images lie as [..., pixels, ...]: NumPy, made while tracing."""

import numpy as np

from sparse_jax.kernels.reference import Geometry


def of_product(geometry: Geometry, inputs: tuple[int, ...], outputs: tuple[int, ...], taps: tuple[int, ...]) -> np.ndarray:
    """int32[pixels of the result, taps]: which pixel of the images a tap reads; outside them the one after the last.

    >>> of_product(Geometry(padding=((0, 0), (1, 1))), (1, 3), (1, 3), (1, 3))
    array([[3, 0, 1],
           [0, 1, 2],
           [1, 2, 3]], dtype=int32)
    """
    (top, _), (left, _) = geometry.padding
    h = np.arange(outputs[0])[:, None] * geometry.strides[0] - top + np.arange(taps[0]) * geometry.dilation[0]
    w = np.arange(outputs[1])[:, None] * geometry.strides[1] - left + np.arange(taps[1]) * geometry.dilation[1]
    return _inside(h, w, inputs)


def of_gradient(geometry: Geometry, inputs: tuple[int, ...], outputs: tuple[int, ...], taps: tuple[int, ...]) -> np.ndarray:
    """int32[pixels of the images, taps]: which pixel of the result a tap wrote to; where there is none the one after the last."""

    def side(n, k, s, pad, d):
        at = np.arange(n)[:, None] + pad[0] - np.arange(k) * d
        return np.where(at % s, -1, at // s)

    sides = zip(inputs, taps, *geometry, strict=True)
    h, w = (side(*of) for of in sides)
    return _inside(h, w, outputs)


def _inside(h: np.ndarray, w: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Numbers of pixels from rows [pixel rows, tap rows] and columns likewise."""
    h, w = h[:, None, :, None], w[None, :, None, :]
    inside = (h >= 0) & (h < size[0]) & (w >= 0) & (w < size[1])
    numbers = np.where(inside, h * size[1] + w, size[0] * size[1])
    return numbers.reshape(numbers.shape[0] * numbers.shape[1], -1).astype(np.int32)
