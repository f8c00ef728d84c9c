"""Pallas kernels for TPUs (scalar prefetch): patterns of 128 by 128 blocks, bfloat16 and float32, sums in float32.

What they take is known here; operations.py, which imports Pallas, is loaded when one runs.
"""

import jax.numpy as jnp

from sparse_jax.core import target
from sparse_jax.core.granularity import Granularity

BLOCK = 128
DTYPES = ('bfloat16', 'float32')


def unsupported(dtype, granularity: Granularity) -> str:
    """Why these kernels cannot take a layer where they would run, and what would work; empty where they can."""
    if target.platform() != 'tpu':
        return f'it runs on a TPU, not on {target.platform()}'
    if jnp.dtype(dtype).name not in DTYPES:
        return f'it multiplies bfloat16 and float32, got {jnp.dtype(dtype).name}: set config.model.dtype=bfloat16, or cast x and w'
    if granularity.sides != (BLOCK, BLOCK):
        return (
            f'it takes blocks of 128x128, as the compiler wants the last side of a tile to be a multiple of 128 lanes, got {granularity}: '
            'train with sparsity.granularity=block:128x128, and pass that to make_pattern'
        )
    return ''
