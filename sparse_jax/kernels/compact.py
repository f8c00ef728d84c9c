"""Products with compact weights in training: the gradient of values is compact, and scores of missing units are the gradient of a probe."""

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state

from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core.granularity import Unstructured
from sparse_jax.kernels import backend, reference
from sparse_jax.kernels.layout import Layout
from sparse_jax.kernels.reference import Geometry

_CHUNK = 2**22  # weights of a layer whose dense gradient is made at a time, where scores by block are wanted
# Probes of blocks, by their ids, and what was being traced when they were used: the branches of a condition, say, are traced one by one.
_probes: weakref.WeakValueDictionary[int, Tracer] = weakref.WeakValueDictionary()
_traced: dict[int, Any] = {}


def apply(name: str, x: jax.Array, values: jax.Array, layout: Layout, geometry: Geometry, probe, implementation) -> jax.Array:
    """The product of x, [..., in] or images, with a compact weight.

    Raises:
      ValueError: if a probe of blocks is used for a second product.
      NotImplementedError: if the implementation that is named cannot run, or a probe of blocks is used inside of ``shard_map``.
    """
    shape = x.shape
    if len(layout.shape) == 2 or (layout.taps == (1, 1) and geometry == Geometry()):  # one tap: a matrix product of all pixels
        x = x.reshape(math.prod(shape[:-1]), 1, 1, shape[-1])
    y_shape = geometry.output_shape(x.shape, layout.taps + layout.shape[-2:])
    choice = backend.choose_compact(implementation, x.dtype, layout)
    check_probe(name, probe, layout)
    layout = dataclasses.replace(layout, probe=None)
    chosen = 'reference' if 0 in (x.size, *y_shape) else choice.implementation
    y: jax.Array = _product(x, values, probe, layout, geometry, chosen)  # pyright: ignore[reportAssignmentType]
    return y if x.shape == shape else y.reshape(*shape[:-1], layout.shape[-1])


def check_probe(name: str, probe: jax.Array | None, layout: Layout) -> None:
    """A block's score is no sum over its uses, nor over the parts of a batch: a second one would be added to the first."""
    if probe is None or isinstance(layout.granularity, Unstructured):
        return
    layer = f' of {layout.name}' if layout.name else ''
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise NotImplementedError(
            f'{name}: scores by block{layer} would be those of a part of the batch inside of shard_map: take jit with shardings.'
        )
    if isinstance(probe, Tracer):
        trace = get_opaque_trace_state()
        if _probes.get(id(probe)) is probe and _traced.get(id(probe)) == trace:
            raise ValueError(
                f'{name}: the probe{layer} is used for a second product, and mean magnitudes of blocks do not add up: score single '
                'weights, or multiply once, with both inputs in one batch.'
            )
        for gone in _traced.keys() - _probes.keys():
            _traced.pop(gone, None)
        _probes[id(probe)], _traced[id(probe)] = probe, trace


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _product(x, values, probe, layout: Layout, geometry: Geometry, implementation: str):
    del probe
    return backend.of_compact(implementation, x.shape[0]).compact_forward(x, values, layout, geometry)


def _forward(x, values, probe, layout, geometry, implementation):
    return _product(x, values, probe, layout, geometry, implementation), (x, values, probe, layout)


def _backward(geometry, implementation, residuals, dy):
    x, values, probe, layout = residuals
    kernels = backend.of_compact(implementation, x.shape[0])
    dx = kernels.compact_input_gradient(dy, values, layout, geometry, x.shape)
    d_values = kernels.compact_weight_gradient(x, dy, layout, geometry)
    scores = None
    if probe is not None:
        static = dataclasses.replace(layout, indices=None, pointers=None)  # what scores are made of
        score = lambda x, dy: _scores(x, dy, static, geometry)
        scores = (score if isinstance(layout.granularity, Unstructured) else of_whole_batches(score, probe))(x, dy).astype(
            probe.dtype
        )
    return dx, d_values, scores, None


_product.defvjp(_forward, _backward)


def of_whole_batches(score: Callable[..., jax.Array], probe: jax.Array) -> Callable[..., jax.Array]:
    """A function that makes scores by block, which refuses to be mapped over examples: one probe's scores would be sums of theirs."""

    @jax.custom_batching.custom_vmap
    def checked(probe, *operands):
        del probe
        return score(*operands)

    @checked.def_vmap
    def rule(axis_size, is_batched, probe, *operands):
        if not is_batched[0]:
            raise NotImplementedError(
                'scores by block under vmap would be sums over its axis: make the product with the whole batch, or score single weights.'
            )
        axes = [0 if batched else None for batched in is_batched[1:]]
        return jax.vmap(score, axes, axis_size=axis_size)(*operands), True

    return functools.partial(checked, probe)


def _scores(x: jax.Array, dy: jax.Array, layout: Layout, geometry: Geometry) -> jax.Array:
    """The dense gradient, or its mean magnitude in each block."""
    if isinstance(layout.granularity, Unstructured):
        return scores_of_gradient(reference.dense_weight_gradient(x, dy, layout.taps + layout.shape[-2:], geometry), layout)
    if layout.taps == (1, 1) and geometry == Geometry():
        sums = _block_sums(x, dy, layout)
    else:
        sums = reference.block_scores(x, dy, layout.taps + layout.shape[-2:], geometry, layout.granularity.sides)
    return (sums / _areas(layout)).reshape(layout.units)


def scores_of_gradient(dw: jax.Array, layout: Layout) -> jax.Array:
    """Scores from a dense gradient: itself, or its mean magnitude in each block."""
    if isinstance(layout.granularity, Unstructured):
        return dw.reshape(layout.shape)
    sums = granularity_lib.at_each_tap(layout.granularity).collapse(jnp.abs(dw).reshape(layout.shape), 0, lax.add)
    return sums / _areas(layout)


def _areas(layout: Layout) -> jax.Array:
    """Weights in each block of a tap, float32[blocks of inputs, blocks of outputs]: those at the edge have fewer."""
    (rows, columns), (*_, inputs, outputs) = layout.granularity.sides, layout.units
    sides = lambda count, side, size: jnp.minimum(side, size - side * jnp.arange(count)).astype(jnp.float32)
    return sides(inputs, rows, layout.shape[-2])[:, None] * sides(outputs, columns, layout.shape[-1])


def _block_sums(x: jax.Array, dy: jax.Array, layout: Layout) -> jax.Array:
    """Sums of a matrix's dense gradient by block, a few rows of blocks at a time: the gradient is never there as a whole."""
    rows, columns = layout.granularity.sides
    inputs, outputs = layout.units[-2:]
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    at_once = max(1, min(inputs, _CHUNK // (rows * dy.shape[-1])))
    chunks = -(-inputs // at_once)
    padded = jnp.pad(x, [(0, 0), (0, chunks * at_once * rows - x.shape[-1])])
    dy = jnp.pad(dy, [(0, 0), (0, outputs * columns - dy.shape[-1])])

    def some(start):
        part = lax.dynamic_slice_in_dim(padded, start * at_once * rows, at_once * rows, axis=1)
        gradient = jnp.abs(jnp.matmul(part.T, dy, preferred_element_type=jnp.float32))
        return gradient.reshape(at_once, rows, outputs, columns).sum((1, 3))

    return lax.map(some, jnp.arange(chunks)).reshape(chunks * at_once, outputs)[:inputs]
