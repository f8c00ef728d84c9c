"""sparse_jax: sparse momentum, RigL, SET and ten more sparse-training methods as optax gradient transformations.

The algorithm is in :mod:`sparse_jax.core`, which needs jax and optax only. Each name here is imported when it is first used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

from sparse_jax._version import __version__

if TYPE_CHECKING:
    from sparse_jax import compact, export, kernels, nnx, plan, stats
    from sparse_jax.core import allocation as redistribution
    from sparse_jax.core import criteria, distributions, granularity, matrix_axes, methods, momentum, saliency, schedules, selection
    from sparse_jax.core.masks import SparsifyState, UpdateStats, apply_masks, check_sparse, get_masks, layer_names, set_masks
    from sparse_jax.core.methods import sparse_momentum
    from sparse_jax.core.pruning import prune
    from sparse_jax.core.rule import Rule
    from sparse_jax.core.schedules import Timing, needs_dense_gradient
    from sparse_jax.core.sparsify import sparsify

__all__ = [
    'Rule',
    'SparsifyState',
    'Timing',
    'UpdateStats',
    '__version__',
    'apply_masks',
    'check_sparse',
    'compact',
    'criteria',
    'distributions',
    'export',
    'get_masks',
    'granularity',
    'kernels',
    'layer_names',
    'matrix_axes',
    'methods',
    'momentum',
    'needs_dense_gradient',
    'nnx',
    'plan',
    'prune',
    'redistribution',
    'saliency',
    'schedules',
    'selection',
    'set_masks',
    'sparse_momentum',
    'sparsify',
    'stats',
]

_PACKAGES = ('compact', 'export', 'kernels', 'nnx', 'plan', 'stats')
_OF_CORE = {  # modules of the core by their public names
    'criteria': 'criteria', 'distributions': 'distributions', 'granularity': 'granularity', 'masks': 'masks', 'matrix_axes': 'matrix_axes',
    'methods': 'methods',    'momentum': 'momentum', 'redistribution': 'allocation', 'saliency': 'saliency', 'schedules': 'schedules', 'selection': 'selection',
}  # fmt: skip
_MODULE_OF = {
    'Rule': 'rule', 'SparsifyState': 'masks', 'Timing': 'schedules', 'UpdateStats': 'masks', 'apply_masks': 'masks', 'check_sparse': 'masks',
    'get_masks': 'masks', 'layer_names': 'masks', 'needs_dense_gradient': 'schedules', 'prune': 'pruning', 'set_masks': 'masks', 'sparse_momentum': 'methods',
    'sparsify': 'sparsify',
}  # fmt: skip


class _Alias(types.ModuleType):
    """``from sparse_jax.criteria import magnitude`` works as ``sj.criteria.magnitude`` does."""

    def _module(self) -> types.ModuleType:
        return importlib.import_module(f'sparse_jax.core.{_OF_CORE[self.__name__.rpartition(".")[2]]}')

    def __getattr__(self, name: str):
        return getattr(self._module(), name)

    def __dir__(self):
        return dir(self._module())


for _name in _OF_CORE:
    sys.modules[f'{__name__}.{_name}'] = _Alias(f'{__name__}.{_name}')


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f'{__name__}.{name}')
    if name in _OF_CORE and name in __all__:
        value = importlib.import_module(f'{__name__}.core.{_OF_CORE[name]}')
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f'{__name__}.core.{_MODULE_OF[name]}'), name)
    else:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return __all__
