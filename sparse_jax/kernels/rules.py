"""Which backend a pattern's density suggests on a platform, from measurements made beforehand."""

import functools
import logging

import jax
import jax.numpy as jnp

from sparse_jax.core import target
from sparse_jax.kernels import gpu, store, tpu

_LOG = logging.getLogger('sparse_jax')
_FILE = 'crossovers.json'

# Up to this density the C++ kernel was faster than XLA's dense product in every shape of benchmarks/layers/compare.py.
_ON_CPU = 0.2


def by_rule(density: float, block: tuple[int, int]) -> str:
    """The backend that this density suggests where programs are traced for: 'cpu', 'gpu', 'tpu' or 'reference'.

    On a GPU it is its kernels up to the density, to two digits, at which ``benchmarks.gpu`` measured them to be as fast as the dense product,
    on this kind of device and for this block; the reference where that was not measured, which is said once. So far nothing measures
    TPUs. Kernels that do not run there at all are named too: whoever takes the name finds out why, and says so. The reference multiplies
    single weights, and what is traced for a device that is not here.

    >>> by_rule(0.05, (1, 1)), by_rule(0.5, (1, 1))
    ('cpu', 'reference')
    """
    platform = target.platform()
    if platform == 'cpu':
        return 'cpu' if density <= _ON_CPU else 'reference'
    backend = {'gpu': gpu, 'tpu': tpu}.get(platform)
    if target.is_elsewhere() or block == (1, 1) or backend is None:
        return 'reference'
    if backend.unsupported(jnp.bfloat16, block):
        return platform
    most = store.read(_FILE).get(_device(), {}).get(_name(block))
    if most is None:
        _say_once(_device(), _name(block), ' measure them with python -m benchmarks.gpu,' if platform == 'gpu' else '')
        return 'reference'
    return platform if store.rounded(density) <= most else 'reference'


def write(block: tuple[int, int], density: float) -> None:
    """Keeps up to which density a block's kernels were the faster ones on this device."""
    content = store.read(_FILE)
    content.setdefault(_device(), {})[_name(block)] = store.rounded(density)
    store.write(_FILE, content)


def _device() -> str:
    return jax.devices()[0].device_kind


def _name(block: tuple[int, int]) -> str:
    return f'{block[0]}x{block[1]}'


@functools.cache
def _say_once(device: str, block: str, how: str) -> None:
    _LOG.warning(
        'sparse_jax: blocks of %s were not measured on %s, so that sparse products are masked dense ones:%s name the implementation, or train '
        'with sparsity.kernels=auto, which measures the layers of a run.',
        block,
        device,
        how,
    )
