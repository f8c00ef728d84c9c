"""Trained networks to and from the world: files, scipy, BCOO, PyTorch's layouts.

Trees are those that training has: params, and masks like them, a bool array where a leaf is sparse and a scalar True where it is dense.
Results are numpy arrays, on the host.
"""

from sparse_jax.export.files import load, save
from sparse_jax.export.leaves import masks_from, unpack_masks
from sparse_jax.export.matrices import to_bcoo, to_scipy
from sparse_jax.export.torch_layout import from_torch_state, to_torch_state

__all__ = ['from_torch_state', 'load', 'masks_from', 'save', 'to_bcoo', 'to_scipy', 'to_torch_state', 'unpack_masks']
