"""sparse_jax: sparse momentum, RigL, SET and five more sparse-training methods as optax gradient transformations.

The algorithm is in :mod:`sparse_jax.core`, which needs jax and optax only.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from sparse_jax._version import __version__
from sparse_jax.core import allocation as redistribution
from sparse_jax.core import criteria, distributions, granularity, masks, methods, momentum, schedules, selection
from sparse_jax.core.masks import SparsifyState, UpdateStats, apply_masks, check_sparse, get_masks, layer_names, set_masks
from sparse_jax.core.methods import sparse_momentum
from sparse_jax.core.rule import Rule
from sparse_jax.core.schedules import Timing, needs_dense_gradient
from sparse_jax.core.sparsify import sparsify

if TYPE_CHECKING:
    from sparse_jax import export, kernels, nnx, stats

__all__ = [
    'Rule',
    'SparsifyState',
    'Timing',
    'UpdateStats',
    '__version__',
    'apply_masks',
    'check_sparse',
    'criteria',
    'distributions',
    'export',
    'get_masks',
    'granularity',
    'kernels',
    'layer_names',
    'methods',
    'momentum',
    'needs_dense_gradient',
    'nnx',
    'redistribution',
    'schedules',
    'selection',
    'set_masks',
    'sparse_momentum',
    'sparsify',
    'stats',
]

_LAZY = ('export', 'kernels', 'nnx', 'stats')  # the optimizer needs none of them

# `from sparse_jax.criteria import magnitude` works as `sj.criteria.magnitude` does: the modules of the core, by their public paths.
for _module in (criteria, distributions, granularity, masks, methods, momentum, schedules, selection):
    sys.modules[f'{__name__}.{_module.__name__.rpartition(".")[2]}'] = _module
sys.modules[f'{__name__}.redistribution'] = redistribution
del _module, masks


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f'{__name__}.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return __all__
