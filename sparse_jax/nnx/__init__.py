"""Drop-in layers for networks in flax.nnx: flax's own Linear and Conv, whose products follow a sparsity pattern.

Example:
  >>> import jax.numpy as jnp, optax, sparse_jax as sj
  >>> from flax import nnx
  >>> class Net(nnx.Module):
  ...     def __init__(self, rngs):
  ...         self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
  ...         self.out = nnx.Linear(16, 10, rngs=rngs)
  ...     def __call__(self, x):
  ...         return self.out(nnx.relu(self.conv(x)).mean((1, 2)))
  >>> model = sj.nnx.sparsify(Net(nnx.Rngs(0)))
  >>> type(model.conv).__name__, model(jnp.ones((2, 8, 8, 3))).shape
  ('SparseConv', (2, 10))
"""

from sparse_jax.nnx.layers import SparseConv, SparseLinear, SparsityPattern
from sparse_jax.nnx.modules import apply_masks, freeze, load, runner, set_patterns, sparsify

__all__ = [
    'SparseConv',
    'SparseLinear',
    'SparsityPattern',
    'apply_masks',
    'freeze',
    'load',
    'runner',
    'set_patterns',
    'sparsify',
]
