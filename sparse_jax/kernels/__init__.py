"""Sparse matrix product and convolution that follow a changing mask: time and arithmetic fall with the density.

Parameters stay dense arrays with exact zeros. A :class:`Pattern`, made on the host when masks change, says where the others are, and the
same function runs on plain XLA (the definition) or on kernels.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from sparse_jax import kernels
  >>> mask = jax.random.bernoulli(jax.random.key(0), 0.1, (3, 3, 8, 16))
  >>> w = jnp.where(mask, jax.random.normal(jax.random.key(1), mask.shape), 0)
  >>> pattern = kernels.make_pattern(mask)
  >>> kernels.sparse_conv(jnp.ones((2, 10, 10, 8)), w, pattern, strides=(2, 2)).shape
  (2, 5, 5, 16)
"""

from sparse_jax.kernels.api import convolve, sparse_conv, sparse_dot
from sparse_jax.kernels.backend import IMPLEMENTATIONS, unsupported
from sparse_jax.kernels.builder import make_pattern, make_patterns
from sparse_jax.kernels.cpu.lanes import convolve_by_lanes, from_lanes, lanes_unavailable, max_pool_by_lanes, to_lanes
from sparse_jax.kernels.device import lowering_for
from sparse_jax.kernels.freeze import freeze
from sparse_jax.kernels.layout import CompactWeight, Layout
from sparse_jax.kernels.pattern import Pattern, with_dense_gradients
from sparse_jax.kernels.runner import Runner
from sparse_jax.kernels.scores import block_scores

__all__ = [
    'IMPLEMENTATIONS',
    'CompactWeight',
    'Layout',
    'Pattern',
    'Runner',
    'block_scores',
    'convolve',
    'convolve_by_lanes',
    'freeze',
    'from_lanes',
    'lanes_unavailable',
    'lowering_for',
    'make_pattern',
    'make_patterns',
    'max_pool_by_lanes',
    'sparse_conv',
    'sparse_dot',
    'to_lanes',
    'unsupported',
    'with_dense_gradients',
]
