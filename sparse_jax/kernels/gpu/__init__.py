"""Pallas kernels for Hopper GPUs (Mosaic GPU): block patterns, bfloat16 and float16, sums in float32.

What they take is known here; operations.py, which imports Pallas, is loaded when one runs.
"""

import jax.numpy as jnp

from sparse_jax.core import target
from sparse_jax.core.granularity import Granularity
from sparse_jax.kernels import device

BLOCKS = (32, 64, 128)
DTYPES = ('bfloat16', 'float16')


def unsupported(dtype, granularity: Granularity) -> str:
    """Why these kernels cannot take a layer where they would run, and what would work; empty where they can."""
    if target.platform() != 'gpu':
        return f'it runs on an NVIDIA GPU, not on {target.platform()}'
    capability = device.capability()
    if capability.partition('.')[0] != '9':
        return (
            f'it needs a Hopper GPU (compute capability 9.0: H100, H200), whose instructions it uses, and this one has {capability}'
        )
    if jnp.dtype(dtype).name not in DTYPES:
        return f'it multiplies bfloat16 and float16, got {jnp.dtype(dtype).name}: set config.model.dtype=bfloat16, or cast x and w'
    if not set(granularity.sides) <= set(BLOCKS):
        sides = ', '.join(map(str, BLOCKS))
        return f'it takes blocks with sides of {sides}, got {granularity}: train with sparsity.granularity=block:64x64, and pass that to make_pattern'
    return ''
