"""Pallas kernels for Hopper GPUs (Mosaic GPU): block patterns, bfloat16 and float16, sums in float32.

What they take is known here; operations.py, which imports Pallas, is loaded when one runs.
"""

import jax.numpy as jnp

from sparse_jax.core import target

BLOCKS = (32, 64, 128)
DTYPES = ('bfloat16', 'float16')


def unsupported(dtype, block: tuple[int, int]) -> str:
    """Why these kernels cannot take a layer where they would run, and what would work; empty where they can."""
    if target.platform() != 'gpu':
        return f'it runs on an NVIDIA GPU, not on {target.platform()}'
    capability = target.capability()
    if capability.partition('.')[0] != '9':
        return (
            f'it needs a Hopper GPU (compute capability 9.0: H100, H200), whose instructions it uses, and this one has {capability}'
        )
    if jnp.dtype(dtype).name not in DTYPES:
        return f'it multiplies bfloat16 and float16, got {jnp.dtype(dtype).name}: set config.model.dtype=bfloat16, or cast x and w'
    if block[0] not in BLOCKS or block[1] not in BLOCKS:
        what = 'single weights' if block == (1, 1) else f'blocks of {block[0]}x{block[1]}'
        sides = ', '.join(map(str, BLOCKS))
        return f'it takes blocks with sides of {sides}, got {what}: train with sparsity.granularity=block:64x64, and pass block=(64, 64)'
    return ''
