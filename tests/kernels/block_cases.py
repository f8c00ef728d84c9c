"""Block patterns for the kernels of GPUs and TPUs, against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import kernels
from tests.kernels import kernel_cases

NONE, SAME = ((0, 0), (0, 0)), ((1, 1), (1, 1))


def matrix(tokens: int, inputs: int, outputs: int, density: float = 0.5):
    return tokens, 1, 1, inputs, outputs, (1, 1), (1, 1), NONE, (1, 1), density


def errors(case, block: tuple[int, int], platform: str, dtype, products: int = 3) -> list[float]:
    """Largest errors of the result and both gradients, as parts of the largest value; `products` says how many of the three.

    The float64 products are of the same rounded operands. A kernel sums in float32 and rounds once.
    """
    strides, padding, dilation = case[6:9]
    x, mask, w, dy = kernel_cases.make((*case, block))
    x, w, dy = (jnp.asarray(value, dtype) for value in (x, w, dy))
    pattern = kernels.make_pattern(mask, block=block)
    own = dict(strides=strides, padding=padding, dilation=dilation, implementation=platform)
    with kernels.lowering_for(platform, interpret=True):
        if products == 1:
            got = [kernels.sparse_conv(x, w, pattern, **own)]
        else:
            y, pull = jax.vjp(lambda x, w: kernels.sparse_conv(x, w, pattern, **own), x, w)
            got = [y, *pull(dy)]
    want = list(kernel_cases.convolution(x, w, dy, strides, padding, dilation))
    want[2] = np.where(mask, want[2], 0)
    off = ~np.broadcast_to(mask, w.shape)
    for value, expected in zip(got, want, strict=False):
        assert value.shape == expected.shape and value.dtype == dtype
    if len(got) == 3:
        assert not np.asarray(got[2], np.float64)[off].any()
    parts = zip(got, want, strict=False)
    return [float(np.abs(np.asarray(a, np.float64) - b).max() / max(np.abs(b).max(), 1e-9)) for a, b in parts]


def score_error(case, block: tuple[int, int], platform: str, dtype) -> float:
    """Of the block scores, likewise."""
    _, _, _, inputs, outputs, taps, strides, padding, dilation, _ = case
    x, _, w, dy = kernel_cases.make((*case, block))
    x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
    own = dict(block=block, strides=strides, padding=padding, dilation=dilation, implementation=platform)
    with kernels.lowering_for(platform, interpret=True):
        got = np.asarray(kernels.block_scores(x, dy, w.shape, **own))
    dense = np.abs(kernel_cases.convolution(x, w, dy, strides, padding, dilation)[2])
    want = np.zeros((*taps, -(-inputs // block[0]), -(-outputs // block[1])))
    for i in range(want.shape[2]):
        for o in range(want.shape[3]):
            part = dense[:, :, i * block[0] : (i + 1) * block[0], o * block[1] : (o + 1) * block[1]]
            want[:, :, i, o] = part.sum((2, 3))
    assert got.shape == want.shape and got.dtype == np.float32
    return float(np.abs(got - want).max() / want.max())


def rounding(dtype) -> float:
    """One rounding to nearest, at the largest value, of sums in float32."""
    return 0.51 * float(jnp.finfo(dtype).eps)
