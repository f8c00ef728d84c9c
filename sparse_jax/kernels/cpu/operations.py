"""The C++ kernels behind XLA's foreign function interface: float32, unstructured and block patterns, any geometry."""

import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Sequence
from platform import libc_ver
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax._malloc import MALLOC
from sparse_jax.core import errors, target
from sparse_jax.core.granularity import Granularity, Unstructured
from sparse_jax.kernels.cpu import compiler
from sparse_jax.kernels.layout import CompactWeight, Layout
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.reference import Geometry

_logger = logging.getLogger('sparse_jax')
_HANDLERS = ('forward', 'frozen', 'input_gradient', 'weight_gradient', 'pool', 'pool_gradient')
_LARGE = 2**22  # elements of an array
LISTS = object()  # where a pattern's lists stand among the operands


def _load() -> None:
    """Registers the compiled kernels with XLA; the first process of a machine compiles them. CompilerError where it cannot."""
    library = compiler.library()
    for name in _HANDLERS:
        handler = getattr(library, f'sparse_jax_{name}')
        jax.ffi.register_ffi_target(f'sparse_jax_{name}', jax.ffi.pycapsule(handler), platform='cpu')


@functools.cache
def unavailable() -> str:
    """Tries to load the kernels, and says why that failed, to the log too; empty where they are loaded.

    It is known only by trying: the first process of a machine compiles for some seconds.
    """
    try:
        _load()
    except compiler.CompilerError as error:
        _logger.warning('sparse_jax: no CPU kernels, the reference runs instead: %s.', error)
        return str(error)
    return ''


def unsupported(dtype, granularity: Granularity) -> str:
    """Why they cannot take a layer, and what would work; empty where they can."""
    del granularity
    platform = target.platform()
    if platform != 'cpu':
        return f'it runs on CPU, not on {platform}'
    if jnp.dtype(dtype) != jnp.float32:
        return f'it computes in float32, got x of {dtype} and w of {dtype}'
    return unavailable()


def call(name: str, shapes: Sequence[tuple[int, ...]], *operands, pattern: Pattern | Layout | None, geometry: Geometry):
    """Results of these shapes from a kernel; a layout: the weight is compact; None: it is dense, and the images must lie by lanes."""
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if max(map(math.prod, shapes)) >= _LARGE and _malloc_returns_memory():
        errors.say_once(
            'CPU kernels: malloc maps large arrays anew in each step, which can cost a quarter of it. Start Python with '
            f'GLIBC_TUNABLES={MALLOC} in the environment, as the launcher does.'
        )
    empty = jnp.zeros(0, jnp.int32)
    # by input, also for the product by output: the order in which the weight lies in memory
    lists, taps = (empty, empty), ()
    if isinstance(pattern, Layout):
        lists, taps = (pattern.indices, pattern.pointers), pattern.taps
    elif pattern is not None:
        lists = pattern.transposed_indices, pattern.transposed_pointers
    numbers = (*_numbers(geometry, (Unstructured() if pattern is None else pattern.granularity).sides), *taps)
    arguments = [lists if operand is LISTS else [operand] for operand in operands]
    return kernel(name, results, geometry=np.array(numbers, np.int64))(*itertools.chain(*arguments))


def _numbers(geometry: Geometry, sides: tuple[int, int]) -> tuple[int, ...]:
    return (*geometry.strides, *(low for low, _ in geometry.padding), *geometry.dilation, *sides)


@functools.cache
def _malloc_returns_memory() -> bool:
    """Whether this is glibc's malloc, as it comes."""
    return libc_ver()[0] == 'glibc' and 'GLIBC_TUNABLES' not in os.environ and 'LD_PRELOAD' not in os.environ


def kernel(name: str, results: Any, **attributes) -> Callable[..., Any]:
    """A C++ kernel as a function of arrays."""
    # one row a call under vmap: patterns differ from row to row
    run = jax.ffi.ffi_call(f'sparse_jax_{name}', results, vmap_method='sequential')
    function = jax.custom_jvp(lambda *operands: run(*operands, **attributes))

    @function.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(
            f'the C++ kernel {name} has no derivative of its own: networks by lanes and products of compact values have first derivatives '
            "only. Gradients of gradients are those of sparse_dot and sparse_conv with a pattern, or with implementation='reference'."
        )

    return function


def nothing() -> jax.Array:
    """In the place of an operand that is left out."""
    return jnp.zeros(0, jnp.float32)


def forward(x: jax.Array, w: jax.Array, pattern: Pattern, geometry: Geometry) -> jax.Array:
    """As in reference.py."""
    shapes = geometry.output_shape(x.shape, w.shape), (0,)
    return call('forward', shapes, x, nothing(), w, LISTS, nothing(), pattern=pattern, geometry=geometry)[0]


def frozen(x: jax.Array, weight: CompactWeight, geometry: Geometry) -> jax.Array:
    """As in reference.py."""
    layout = weight.layout
    taps = layout.shape[:-2] or (1, 1)
    result = jax.ShapeDtypeStruct(geometry.output_shape(x.shape, (*taps, *layout.shape[-2:])), jnp.float32)
    numbers = np.array((*taps, *_numbers(geometry, layout.granularity.sides)), np.int64)
    return kernel('frozen', result, geometry=numbers)(x, weight.values, layout.indices, layout.pointers)


def input_gradient(dy: jax.Array, w: jax.Array, pattern: Pattern, geometry: Geometry, x_shape: tuple[int, ...]) -> jax.Array:
    """As in reference.py."""
    operands = dy, nothing(), nothing(), w, LISTS
    return call('input_gradient', (x_shape, (0,)), *operands, pattern=pattern, geometry=geometry)[0]


def weight_gradient(x: jax.Array, dy: jax.Array, pattern: Pattern, geometry: Geometry, w_shape: tuple[int, ...]) -> jax.Array:
    """As in reference.py."""
    return call('weight_gradient', (w_shape,), x, nothing(), dy, LISTS, pattern=pattern, geometry=geometry)[0]


def compact_forward(x: jax.Array, values: jax.Array, layout: Layout, geometry: Geometry) -> jax.Array:
    """As in reference.py."""
    shapes = geometry.output_shape(x.shape, layout.taps + layout.shape[-2:]), (0,)
    return call('forward', shapes, x, nothing(), values, LISTS, nothing(), pattern=layout, geometry=geometry)[0]


def compact_input_gradient(
    dy: jax.Array, values: jax.Array, layout: Layout, geometry: Geometry, x_shape: tuple[int, ...]
) -> jax.Array:
    """As in reference.py."""
    operands = dy, nothing(), nothing(), values, LISTS
    return call('input_gradient', (x_shape, (0,)), *operands, pattern=layout, geometry=geometry)[0]


def compact_weight_gradient(x: jax.Array, dy: jax.Array, layout: Layout, geometry: Geometry) -> jax.Array:
    """As in reference.py."""
    return call('weight_gradient', (layout.values_shape,), x, nothing(), dy, LISTS, pattern=layout, geometry=geometry)[0]
