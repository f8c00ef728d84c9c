"""Dense trees to compact ones and back, and a compact start that never makes a dense tree."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from sparse_jax.compact import tree as tree_lib
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import mask_update, numerics
from sparse_jax.core.granularity import Granularity
from sparse_jax.core.rule import Rule
from sparse_jax.kernels import builder, lists
from sparse_jax.kernels import layout as layout_lib
from sparse_jax.kernels.layout import Layout, is_layout


def compress(
    params: Any,
    masks: Any,
    *,
    granularity: str | Granularity = builder.NOT_GIVEN,
    stacked: Callable[[str, Any], bool] | None = None,
    capacity_factor: float = tree_lib.CAPACITY_FACTOR,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """The existing units of sparse leaves, and where they belong.

    Args:
      params: pytree of arrays, concrete, zero off the masks; or of anything that has its tree and shapes, such as an average of them.
      masks: state of an optimizer with one ``sparsify``, or masks as ``sj.get_masks`` gives them.
      granularity: with masks only: what a unit is, as in ``sj.sparsify``. A state knows it.
      stacked: likewise: which leaves hold a layer in each row.
      capacity_factor: capacity of a leaf against the units of its fullest layer: what a redistribution may add before all leaves are enlarged
        (:func:`reserve`). Where each layer keeps its number of units, 1 is enough.
      implementation: the backend that is to multiply, such as ``'reference'``; None: by rule.

    Returns:
      Values: a tree like params with ``[capacity]`` single weights, or ``[capacity, inputs, outputs]`` of blocks, at each sparse leaf,
      by input, then by output, then by tap, and padded with zeros. And the layout: a tree with a :class:`sparse_jax.kernels.Layout` at
      each sparse leaf and None elsewhere.

    Raises:
      ValueError: if the trees do not fit, a leaf is traced or has weights off its mask, or is no matrix and no 2D convolution.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'w': jnp.array([[1.0, 0.0], [2.0, 3.0]]), 'bias': jnp.zeros(2)}
      >>> values, layout = compress(params, {'w': params['w'] != 0, 'bias': jnp.array(True)}, capacity_factor=1)
      >>> values['w'], expand(values, layout)['w']
      (Array([1., 2., 3.], dtype=float32), Array([[1., 0.],
             [2., 3.]], dtype=float32))
    """
    masks, layers = builder.layers_of('compress', masks, granularity, None, stacked)
    _check_capacity_factor(capacity_factor)
    values, rows = layers_lib.leaf_paths(params), layers_lib.leaf_paths(masks)
    if [path for path, _ in values] != [path for path, _ in rows]:
        raise ValueError('compress: masks must be a tree like params, with a scalar True at dense leaves: see sj.get_masks.')
    pairs = [
        (jnp.copy(value), None) if path not in layers else _leaf(path, value, mask, *layers[path], capacity_factor, implementation)
        for (path, value), (_, mask) in zip(values, rows, strict=True)
    ]
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(treedef, [value for value, _ in pairs]), jax.tree.unflatten(treedef, [layout for _, layout in pairs])


def _check_capacity_factor(capacity_factor: float) -> None:
    if isinstance(capacity_factor, bool) or not isinstance(capacity_factor, int | float) or not 1 <= capacity_factor < math.inf:
        raise ValueError(
            f'capacity_factor={capacity_factor!r}: must be a number of at least 1: capacity of a leaf against the units that it has.'
        )


def _check_axes(name: str, path: str, shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 4):
        raise ValueError(
            f'{name}: {path} has layers of shape {shape}: compact leaves are matrices [in, out] and 2D convolutions [height, width, in, '
            f'out]. Keep it dense (dense=({path!r},)), reshape it, or say that it is stacked.'
        )


def _leaf(path: str, value: Any, mask: Any, stacked: bool, unit: Granularity, capacity_factor: float, implementation: str | None):
    if isinstance(value, Tracer) or isinstance(mask, Tracer):
        raise ValueError(f'compress: {path} is traced. The number of units decides shapes: compress on the host.')
    if np.shape(value) != np.shape(mask):
        raise ValueError(f'compress: {path} has shape {np.shape(value)}, its mask has shape {np.shape(mask)}.')
    shape = tuple(np.shape(mask)[1:] if stacked else np.shape(mask))
    _check_axes('compress', path, shape)
    value, mask = jnp.asarray(value), jnp.asarray(mask)
    if lost := int(_off_mask(value, mask)):
        raise ValueError(
            f'compress: {path} has {lost} weights off its mask that are not zero: apply it first, with sj.apply_masks(params, masks).'
        )
    most = math.prod(granularity_lib.tap_units(unit, shape))
    capacity = tree_lib.capacity_for(int(_most_units(mask, unit, stacked)), most, capacity_factor)
    layout = _layout(mask, shape, stacked, unit, capacity, implementation, path)
    if not _is_mask_of(mask, layout):
        raise ValueError(f'compress: the mask of {path} does not consist of whole {unit}.')
    return _gathered(value, layout), layout


def _first_capacity(units: int, shape: tuple[int, ...], unit: Granularity, capacity_factor: float) -> int:
    """The capacity of a leaf whose fullest layer has so many units, of which a list has one at each tap."""
    listed = math.prod(granularity_lib.tap_units(unit, shape))
    return tree_lib.capacity_for(units * (listed // math.prod(unit.unit_shape(shape))), listed, capacity_factor)


@jax.jit
def _off_mask(value: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(~mask & (value != 0), dtype=jnp.int32)


@jax.jit
def _is_mask_of(mask: jax.Array, layout: Layout) -> jax.Array:
    return jnp.all(_mask(layout) == mask)


@jax.jit
def _gathered(whole: jax.Array, layout: Layout) -> jax.Array:
    return tree_lib.per_row(layout_lib.gather, layout)(whole, layout)


@jax.jit
def _expanded(values: jax.Array, layout: Layout) -> jax.Array:
    return tree_lib.per_row(layout_lib.expand, layout)(values, layout)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _most_units(mask: jax.Array, unit: Granularity, stacked: bool) -> jax.Array:
    """Units of a leaf's fullest layer."""
    rows = mask if stacked else mask[None]
    return jnp.max(jax.vmap(lambda row: jnp.sum(lists.units_of(row, unit), dtype=jnp.int32))(rows))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _lists(mask: jax.Array, unit: Granularity, stacked: bool, capacity: int) -> tuple[jax.Array, jax.Array]:
    of_row = lambda row: lists.lists_of(lists.units_of(row, unit), capacity)
    return (jax.vmap(of_row) if stacked else of_row)(mask)


def _layout(
    mask: jax.Array, shape, stacked: bool, unit: Granularity, capacity: int, implementation: str | None, path: str
) -> Layout:
    """The layout of a leaf, by its mask."""
    indices, pointers = _lists(mask, unit, stacked, capacity)
    return Layout(indices, pointers, shape, unit, implementation, path, by_input=True)


def expand(values: Any, layout: Any) -> Any:
    """The whole arrays, zero where no unit exists: the inverse of :func:`compress`.

    Args:
      values: tree of values, or of anything that has their tree and shapes, such as moments.
      layout: their layout.

    Returns:
      A tree like values with whole arrays in the place of compact ones.

    Raises:
      ValueError: if the trees or shapes do not fit.

    Example: see :func:`compress`.
    """
    compact = tree_lib.compact_leaves(layout)
    numbers = tree_lib.owners(values, compact)
    if sorted(i for i in numbers if i is not None) != list(range(len(compact.paths))):
        raise ValueError('expand: values and layout must be trees of one shape, from the same compress, plan or reserve.')
    whole = [
        leaf if i is None else _expanded(leaf, compact.layouts[i]) for leaf, i in zip(jax.tree.leaves(values), numbers, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(values), whole)


def masks(layout: Any) -> Any:
    """The masks that a layout stands for: for ``sj.stats``, ``sj.export`` and ``sj.kernels.freeze``, beside :func:`expand`.

    Args:
      layout: tree of layouts.

    Returns:
      A tree like layout: a bool array at each compact leaf, scalar True at dense ones.

    Raises:
      ValueError: if layout has no compact leaf.

    Example:
      >>> import jax.numpy as jnp, sparse_jax as sj
      >>> eye = {'w': jnp.eye(4), 'bias': jnp.ones(4)}
      >>> values, layout = sj.compact.compress(eye, {'w': jnp.eye(4, dtype=bool), 'bias': jnp.array(True)})
      >>> sj.stats.nonzeros(masks(layout)), masks(layout)['bias']
      ({'w': 4}, Array(True, dtype=bool))
    """
    tree_lib.compact_leaves(layout)
    is_leaf = lambda x: x is None or is_layout(x)
    return jax.tree.map(lambda x: _mask(x) if is_layout(x) else jnp.array(True), layout, is_leaf=is_leaf)


@jax.jit
def _mask(layout: Layout) -> jax.Array:
    return tree_lib.per_row(lists.mask_of, layout)(layout)


def init(
    make: Callable[[], Any], rule: Rule, *, capacity_factor: float | None = None, implementation: str | None = None
) -> tuple[Any, Any]:
    """A sparse start: values and layout, a leaf at a time, so that a dense tree is never there.

    They are bit for bit the dense form's start: ``jax.jit(make)()`` under the first masks of the rule.

    Args:
      make: makes the dense params, without arguments. It is traced, and compiled once a sparse leaf, the others left out.
      rule: a method's rule: see :func:`sparse_jax.methods.rule`.
      capacity_factor: as in :func:`compress`; None: 1.25 where the rule redistributes, else 1.
      implementation: as in :func:`compress`.

    Returns:
      As :func:`compress`.

    Raises:
      ValueError: as ``sj.sparsify(...).init``, and for a sparse leaf that is no matrix and no 2D convolution.

    Example:
      >>> import jax, sparse_jax as sj
      >>> rule = sj.methods.rule('set', density=0.25, update_every=10, total_steps=100)
      >>> values, layout = init(lambda: {'w': jax.random.normal(jax.random.key(0), (8, 8))}, rule)
      >>> values['w'].shape
      (16,)
    """
    capacity_factor = tree_lib.factor_for(rule) if capacity_factor is None else capacity_factor
    _check_capacity_factor(capacity_factor)
    program, shapes = jax.make_jaxpr(make, return_shape=True)()  # traced once: networks take seconds
    evaluate = jaxpr_as_fun(program)
    layers = rule.sparse_layers(shapes)
    tree_lib.check_masks_of(rule, 'init')
    for layer in layers:
        _check_axes('init', layer.name, layer.shape)
    counts = np.asarray(rule.initial_counts(layers), np.int32)
    keys = jax.random.split(rule.first_key(), max(layers[-1].stop, 1))
    by_leaf = {layer.leaf: layer for layer in layers}
    leaves_of = lambda chosen: jax.jit(lambda: [evaluate()[i] for i in chosen])()
    dense = [i for i in range(len(jax.tree.leaves(shapes))) if i not in by_leaf]
    values: dict[int, Any] = dict(zip(dense, leaves_of(dense), strict=True))
    layouts: dict[int, Layout | None] = dict.fromkeys(dense)
    for i, layer in by_leaf.items():
        of_layer = slice(layer.start, layer.stop)
        first = jax.jit(numerics.lenient(functools.partial(mask_update.first_mask, rule, layer)))
        mask = first(jnp.asarray(counts[of_layer]), keys[of_layer])
        capacity = _first_capacity(int(counts[of_layer].max()), layer.shape, rule.granularity, capacity_factor)
        layout = _layout(mask, layer.shape, layer.depth is not None, rule.granularity, capacity, implementation, layer.name)
        [value] = leaves_of([i])
        values[i], layouts[i] = _gathered(value, layout), layout
    treedef = jax.tree.structure(shapes)
    in_order = lambda leaves: jax.tree.unflatten(treedef, [leaves[i] for i in sorted(leaves)])
    return in_order(values), in_order(layouts)
