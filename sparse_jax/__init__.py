"""sparse_jax: neural networks that are sparse from the first step to the last, as one optax transformation.

The core needs jax and optax only. Read it in this order: :mod:`~sparse_jax.transform`, :mod:`~sparse_jax.masks`,
:mod:`~sparse_jax.criteria`, :mod:`~sparse_jax.redistribution`, :mod:`~sparse_jax.selection`.
"""

import importlib
from typing import TYPE_CHECKING

from sparse_jax import criteria, distributions, granularity, methods, momentum, redistribution, schedules, selection
from sparse_jax._version import __version__
from sparse_jax.masks import SparsifyState, UpdateStats, apply_masks, check_sparse, get_masks, layer_names, set_masks
from sparse_jax.methods import sparse_momentum
from sparse_jax.schedules import needs_dense_gradient
from sparse_jax.transform import sparsify

__all__ = [
    'SparsifyState',
    'UpdateStats',
    '__version__',
    'apply_masks',
    'check_sparse',
    'criteria',
    'distributions',
    'get_masks',
    'granularity',
    'kernels',
    'layer_names',
    'methods',
    'momentum',
    'needs_dense_gradient',
    'redistribution',
    'schedules',
    'selection',
    'set_masks',
    'sparse_momentum',
    'sparsify',
    'stats',
]


if TYPE_CHECKING:
    from sparse_jax import kernels, stats


def __getattr__(name: str):
    if name in ('kernels', 'stats'):  # loaded when they are first used: the optimizer needs neither
        return importlib.import_module(f'sparse_jax.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
