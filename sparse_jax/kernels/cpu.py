"""The C++ kernels behind XLA's foreign function interface: float32, unstructured and block patterns, any geometry."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.kernels import compiler
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.reference import Geometry

_logger = logging.getLogger('sparse_jax')
_HANDLERS = ('forward', 'input_gradient', 'weight_gradient')


@functools.cache
def unavailable() -> str:
    """Why the kernels cannot be had on this machine, told once to the log; empty where they can. Compiles them if need be."""
    try:
        library = compiler.library()
        for name in _HANDLERS:
            handler = getattr(library, f'sparse_jax_{name}')
            jax.ffi.register_ffi_target(f'sparse_jax_{name}', jax.ffi.pycapsule(handler), platform='cpu')
    except compiler.CompilerError as error:
        _logger.warning('sparse_jax: no CPU kernels, the reference runs instead: %s.', error)
        return str(error)
    return ''


def unsupported(x_dtype, w_dtype) -> str:
    """Why these operands cannot be taken; empty where they can."""
    if jnp.dtype(x_dtype) != jnp.float32 or jnp.dtype(w_dtype) != jnp.float32:
        return f'it computes in float32, got x of {x_dtype} and w of {w_dtype}'
    return ''


def _call(name: str, shape: tuple[int, ...], a, b, indices, pointers, pattern: Pattern, geometry: Geometry) -> jax.Array:
    # one row a call under vmap: patterns differ from row to row
    call = jax.ffi.ffi_call(f'sparse_jax_{name}', jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method='sequential')
    numbers = (*geometry.strides, *(low for low, _ in geometry.padding), *geometry.dilation, *pattern.block)
    return call(a, b, indices, pointers, geometry=np.array(numbers, np.int64))


def forward(x: jax.Array, w: jax.Array, pattern: Pattern, geometry: Geometry) -> jax.Array:
    """As in reference.py."""
    shape = geometry.output_shape(x.shape, w.shape)
    return _call('forward', shape, x, w, pattern.indices, pattern.pointers, pattern, geometry)


def input_gradient(dy: jax.Array, w: jax.Array, pattern: Pattern, geometry: Geometry, x_shape: tuple[int, ...]) -> jax.Array:
    """As in reference.py."""
    lists = pattern.transposed_indices, pattern.transposed_pointers
    return _call('input_gradient', x_shape, dy, w, *lists, pattern, geometry)


def weight_gradient(x: jax.Array, dy: jax.Array, pattern: Pattern, geometry: Geometry, w_shape: tuple[int, ...]) -> jax.Array:
    """As in reference.py."""
    return _call('weight_gradient', w_shape, x, dy, pattern.indices, pattern.pointers, pattern, geometry)
