"""Block patterns for the kernels of GPUs and TPUs, against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import compact, kernels
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
    options = dict(strides=strides, padding=padding, dilation=dilation, implementation=platform)
    with kernels.lowering_for(platform, interpret=True):
        if products == 1:
            actual = [kernels.sparse_conv(x, w, pattern, **options)]
        else:
            y, vjp = jax.vjp(lambda x, w: kernels.sparse_conv(x, w, pattern, **options), x, w)
            actual = [y, *vjp(dy)]
    desired = list(kernel_cases.convolution(x, w, dy, strides, padding, dilation))
    desired[2] = np.where(mask, desired[2], 0)
    off = ~np.broadcast_to(mask, w.shape)
    for value, expected in zip(actual, desired, strict=False):
        assert value.shape == expected.shape and value.dtype == dtype
    if len(actual) == 3:
        assert not np.asarray(actual[2], np.float64)[off].any()
    pairs = zip(actual, desired, strict=False)
    return [float(np.abs(np.asarray(a, np.float64) - b).max() / max(np.abs(b).max(), 1e-9)) for a, b in pairs]


def compact_errors(case, block: tuple[int, int], platform: str, dtype, products: int = 3) -> list[float]:
    """:func:`errors` of compact values, with room to spare and their lists by output made beforehand; what is not used must be zeros."""
    strides, padding, dilation = case[6:9]
    x, mask, w, dy = kernel_cases.make((*case, block))
    x, w, dy = (jnp.asarray(value, dtype) for value in (x, w, dy))
    mask = np.broadcast_to(mask, w.shape)
    options = dict(strides=strides, padding=padding, dilation=dilation, implementation=platform)
    granularity = f'block:{block[0]}x{block[1]}'
    with kernels.lowering_for(platform, interpret=True):
        values, layout = compact.compress({'w': w}, {'w': mask}, granularity=granularity, capacity_factor=1.3)
        prepared = compact.prepare(layout)['w']
        values = values['w']
        product = lambda x, values: kernels.sparse_conv(x, values, prepared, **options)
        if products == 1:
            actual = [product(x, values)]
        else:
            y, vjp = jax.vjp(product, x, values)
            dx, d_values = vjp(dy)
            used = int(prepared.pointers[-1])
            assert d_values.shape == values.shape and not np.asarray(d_values[used:], np.float64).any()
            actual = [y, dx, compact.expand({'w': d_values}, layout)['w']]
    desired = list(kernel_cases.convolution(x, w, dy, strides, padding, dilation))
    desired[2] = np.where(mask, desired[2], 0)
    pairs = zip(actual, desired, strict=False)
    return [float(np.abs(np.asarray(a, np.float64) - b).max() / max(np.abs(b).max(), 1e-9)) for a, b in pairs]


def score_error(case, block: tuple[int, int], platform: str, dtype) -> float:
    """Of the block scores, likewise."""
    _, _, _, inputs, outputs, taps, strides, padding, dilation, _ = case
    x, _, w, dy = kernel_cases.make((*case, block))
    x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
    options = dict(block=block, strides=strides, padding=padding, dilation=dilation, implementation=platform)
    with kernels.lowering_for(platform, interpret=True):
        actual = np.asarray(kernels.block_scores(x, dy, w.shape, **options))
    dense = np.abs(kernel_cases.convolution(x, w, dy, strides, padding, dilation)[2])
    desired = np.zeros((*taps, -(-inputs // block[0]), -(-outputs // block[1])))
    for k_idx in range(desired.shape[2]):
        for n_idx in range(desired.shape[3]):
            k_slice, n_slice = (slice(i * side, (i + 1) * side) for i, side in zip((k_idx, n_idx), block, strict=True))
            desired[:, :, k_idx, n_idx] = dense[:, :, k_slice, n_slice].sum((2, 3))
    assert actual.shape == desired.shape and actual.dtype == np.float32
    return float(np.abs(actual - desired).max() / desired.max())


def rounding(dtype) -> float:
    """One rounding to nearest, at the largest value, of sums in float32."""
    return 0.51 * float(jnp.finfo(dtype).eps)
