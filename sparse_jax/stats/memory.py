"""Bytes that a sparse network takes."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sparse_jax.core import layers as layers_lib
from sparse_jax.stats.tables import nonzeros


def memory(params: Any, opt_state: Any) -> dict[str, int]:
    """Bytes that the params take: dense, with a bit a weight for the mask, and in compressed rows (int32 indices).

    Training holds dense arrays today: these are the sizes of what could be stored or sent.

    Args:
      params: tree of parameters, or their shapes.
      opt_state: state of an optimizer with one ``sparsify``; or a tree of masks.

    Returns:
      ``dense``, ``values_and_bits``, ``compressed_rows``; leaves that are not sparse count as they are.

    Example:
      >>> memory({'w': jnp.ones((32, 32)), 'bias': jnp.ones(32)}, {'w': jnp.eye(32, dtype=bool), 'bias': jnp.array(True)})
      {'dense': 4224, 'values_and_bits': 384, 'compressed_rows': 516}
    """
    counts = nonzeros(opt_state)
    dense = bits = rows = 0
    for name, param in layers_lib.leaf_paths(params):
        size, width = int(np.prod(param.shape)), jnp.dtype(param.dtype).itemsize
        dense += size * width
        if name in counts:
            bits += counts[name] * width + -(-size // 8)
            rows += counts[name] * (width + 4) + 4 * (size // param.shape[-1] + 1)
        else:
            bits += size * width
            rows += size * width
    return {'dense': dense, 'values_and_bits': bits, 'compressed_rows': rows}
