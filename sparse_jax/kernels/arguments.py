"""Checks of what a sparse product is given: one line for each thing that does not fit."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from sparse_jax.core import errors
from sparse_jax.core.granularity import Unstructured
from sparse_jax.kernels import reference, sharded
from sparse_jax.kernels.layout import CompactWeight, Layout
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.reference import Geometry


def check_product(name: str, x: jax.Array | jax.ShapeDtypeStruct, w: jax.Array, pattern: Pattern | None, axes: int) -> Pattern:
    """The pattern; ValueError unless x, w of so many axes and its pattern fit together."""
    where = f' (layer {pattern.name})' if isinstance(pattern, Pattern) and pattern.name else ''
    if not isinstance(pattern, Pattern):
        dense = ' A leaf whose pattern is None is dense: multiply with jnp.dot or kernels.convolve.' if pattern is None else ''
        raise ValueError(f'{name}: pattern must come from make_pattern, got {type(pattern).__name__}.{dense}')
    if w.ndim != axes or tuple(w.shape) != tuple(pattern.shape):
        raise ValueError(f'{name}: w has shape {tuple(w.shape)}, its pattern is of shape {tuple(pattern.shape)}{where}.')
    split = pattern.split
    if pattern.indices.ndim != 1 + (split is not None and split.axis is not None):
        raise ValueError(f'{name}: the pattern holds several layers, one a row{where}: take one row, as lax.scan does.')
    listed = pattern.pointers
    concrete = not isinstance(listed, Tracer) and getattr(listed, 'is_fully_addressable', True)
    if concrete and (units := int(np.asarray(listed).max())) > pattern.capacity:
        raise ValueError(
            f'{name}: the pattern lists {units} units and has room for {pattern.capacity}{where}: make it anew with make_pattern, whose '
            'at_least= keeps a capacity that suffices.'
        )
    _check_operands(name, x, w, where)
    if split is not None and x.shape[0] % split.mesh.shape['data']:
        raise ValueError(
            f"{name}: x has {x.shape[0]} rows, which the mesh's data={split.mesh.shape['data']} does not divide{where}."
        )
    return pattern


def check_frozen(
    name: str, x: jax.Array, weight: CompactWeight, axes: int, pattern: Pattern | Layout | None, dense_gradient: bool
) -> None:
    """ValueError unless x and a compact weight of so many axes fit together."""
    layout = weight.layout
    where = f' (layer {layout.name})' if layout.name else ''
    if pattern is not None or dense_gradient:
        raise ValueError(
            f'{name}: a frozen weight knows its pattern and has no gradient{where}: pass neither pattern nor dense_gradient.'
        )
    if layout.pointers.ndim != 1:
        raise ValueError(f'{name}: the frozen weight holds several layers, one a row{where}: take one row, as lax.scan does.')
    *_, outputs = layout.units
    sides = () if isinstance(layout.granularity, Unstructured) else layout.granularity.sides
    if layout.pointers.shape != (outputs + 1,) or weight.values.shape != (*layout.indices.shape, *sides):
        raise ValueError(
            f'{name}: a frozen weight of shape {weight.shape} in {layout.granularity} has {outputs + 1} pointers and values of shape '
            f'{(*layout.indices.shape, *sides)}, got {layout.pointers.shape[0]} and {tuple(weight.values.shape)}{where}: make it with freeze.'
        )
    if len(weight.shape) != axes:
        raise ValueError(f'{name}: w must have {axes} axes, got shape {weight.shape}{where}.')
    _check_operands(name, x, weight, where)


def check_compact(
    name: str, x: jax.Array | jax.ShapeDtypeStruct, values: jax.Array, layout: Layout, axes: int, probe, dense_gradient: bool
) -> None:
    """ValueError unless x, the values of a compact weight of so many axes, its layout and a probe fit together."""
    where = f' (layer {layout.name})' if layout.name else ''
    if dense_gradient:
        raise ValueError(
            f'{name}: the gradient of compact values is compact{where}: pass probe= to get the scores of missing units.'
        )
    if layout.pointers.ndim != 1:
        raise ValueError(f'{name}: the layout holds several layers, one a row{where}: take one row, as lax.scan does.')
    if not layout.by_input:
        raise ValueError(f'{name}: the layout is that of a frozen weight{where}: those of sj.compact.compress can be trained.')
    if len(layout.shape) != axes:
        raise ValueError(f'{name}: w must have {axes} axes, its layout is of shape {layout.shape}{where}.')
    if tuple(values.shape) != layout.values_shape:
        raise ValueError(
            f'{name}: the values have shape {tuple(values.shape)}, their layout has room for {layout.values_shape}{where}: both must come '
            'from the same compress, plan or reserve.'
        )
    units = layout.units
    if probe is not None and (tuple(probe.shape) != units or not jnp.issubdtype(probe.dtype, jnp.floating)):
        raise ValueError(
            f'{name}: the probe is {probe.dtype}{list(probe.shape)}, it must be floating point of shape {units}{where}.'
        )
    _check_operands(name, x, jax.ShapeDtypeStruct(layout.shape, values.dtype), where)


def check_no_probe(name: str, probe) -> None:
    if probe is not None:
        raise ValueError(f'{name}: probe= goes with compact values and their layout: a dense weight has dense_gradient=.')


def _check_operands(
    name: str, x: jax.Array | jax.ShapeDtypeStruct, w: jax.Array | CompactWeight | jax.ShapeDtypeStruct, where: str
) -> None:
    """ValueError unless x has as many features as w takes, and its type."""
    if x.ndim == 0 or x.shape[-1] != w.shape[-2]:
        raise ValueError(
            f'{name}: x of shape {tuple(x.shape)} has {x.shape[-1] if x.ndim else "no"} features, w of shape {tuple(w.shape)} takes {w.shape[-2]}{where}.'
        )
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f'{name}: x and w must be of one floating-point type, got {x.dtype} and {w.dtype}{where}: cast one of them.'
        )


def check_zeros(w: jax.Array, pattern: Pattern) -> None:
    """With SPARSE_JAX_DEBUG=1, at run time: the kernels do not read what is off the pattern, so it must be zero."""
    if os.environ.get('SPARSE_JAX_DEBUG') != '1':
        return

    def check(count):
        if count:
            where = f' of {pattern.name}' if pattern.name else ''
            raise ValueError(
                f'the weight{where} of shape {pattern.shape} has {int(count)} nonzeros off its pattern: make the pattern of the same '
                'masks that the weight was multiplied with, again after each mask update.'
            )

    jax.debug.callback(check, jnp.sum((w != 0) & ~mask_of(pattern)))


def mask_of(pattern: Pattern) -> jax.Array:
    """The mask that a pattern stands for, also of one that is divided over a mesh."""
    return reference.mask_of(pattern) if pattern.split is None else sharded.mask(reference.mask_of, pattern)


def geometry_of(name: str, x: tuple[int, ...], w: tuple[int, ...], strides, padding, dilation) -> Geometry:
    """Checked; ValueError for strides, padding or dilation that make no convolution."""
    pairs = {'strides': strides, 'dilation': dilation}
    for key, value in pairs.items():
        if not isinstance(value, Sequence) or len(value) != 2 or not all(_is_integer(v) and v >= 1 for v in value):
            raise ValueError(f'{name}: {key}={value!r} must be two integers of at least 1, for rows and columns.')
    strides, dilation = tuple(map(int, strides)), tuple(map(int, dilation))
    if isinstance(padding, str):
        if padding.upper() not in ('SAME', 'VALID'):
            raise errors.unknown('padding', padding, ['SAME', 'VALID'])
        reach = [(taps - 1) * d + 1 for taps, d in zip(w[:2], dilation, strict=True)]
        padding = lax.padtype_to_pads(x[1:3], reach, strides, padding.upper())
    pads = tuple(tuple(pair) if isinstance(pair, Sequence) else () for pair in padding) if isinstance(padding, Sequence) else ()
    if len(pads) != 2 or not all(len(pair) == 2 and all(_is_integer(v) and v >= 0 for v in pair) for pair in pads):
        raise ValueError(f'{name}: padding={padding!r} must be pixels before and after in rows and columns, at least 0.')
    return Geometry(strides, tuple((int(low), int(high)) for low, high in pads), dilation)  # type: ignore[arg-type]


def _is_integer(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
