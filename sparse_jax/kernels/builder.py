"""Makes patterns: on the host, from concrete masks, whenever masks change; on a mesh each process makes its own devices' parts."""

import dataclasses
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_jax.core import errors
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.core.granularity import Block, Granularity, Unstructured
from sparse_jax.core.layers import Layer
from sparse_jax.kernels import backend, sharded
from sparse_jax.kernels.pattern import Pattern, capacity

NOT_GIVEN = Unstructured()


def as_granularity(function: str, granularity: str | Granularity, block: Sequence[int] | None) -> Granularity:
    """The granularity that a caller of `function` means by these two arguments, of which one may be given."""
    if block is None:
        return granularity_lib.get(granularity)
    if granularity is not NOT_GIVEN:
        raise ValueError(f'{function}: got both granularity={granularity!r} and block={block!r}: pass one of them.')
    return as_block(function, block)


def as_block(function: str, block: Sequence[int]) -> Granularity:
    """Blocks of these sides; of one by one: single weights."""
    try:
        rows, columns = (operator.index(side) for side in block)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise ValueError(f'{function}: block={block} must be two integers of at least 1: inputs and outputs, such as (64, 64).')
    return Unstructured() if rows == columns == 1 else Block(rows, columns)


def make_pattern(
    mask: Any,
    *,
    granularity: str | Granularity = NOT_GIVEN,
    block: tuple[int, int] | None = None,
    implementation: str | None = None,
    at_least: int = 0,
    name: str = '',
) -> Pattern:
    """The pattern of one weight's mask.

    Args:
      mask: concrete bool array of the weight's shape: [in, out], or [height, width, in, out] of a convolution.
      granularity: what a unit is, as in ``sj.sparsify``, such as ``'block:64x64'``: the mask consists of whole units (where a side does
        not divide, the last ones are smaller).
      block: inputs and outputs of a block: another way to say ``granularity=sj.granularity.Block(*block)``.
      implementation: which backend the layer is to take; None: by rule.
      at_least: smallest capacity in units; the capacity of the pattern before keeps the compiled step.
      name: name of the layer, for messages.

    Returns:
      The pattern, its arrays NumPy's: ``jax.device_put`` it once where many steps take it.

    Raises:
      ValueError: if the mask is traced, empty, not boolean, of another number of axes, or does not consist of whole units.

    Example:
      >>> import numpy as np
      >>> pattern = make_pattern(np.array([[True, False], [True, True]]))
      >>> pattern.pointers, pattern.indices[:3]
      (array([0, 2, 3], dtype=int32), array([0, 1, 1], dtype=int32))
    """
    granularity = granularity_lib.of_products(as_granularity('make_pattern', granularity, block))
    return _build(mask, granularity, implementation, name, at_least=at_least)


def _build(
    mask: Any, granularity: Granularity, implementation: str | None, name: str, *, at_least: int = 0, bound_before: float = 0.0
) -> Pattern:
    """:func:`make_pattern`, after a pattern whose capacity and density bound are kept where they suffice."""
    mask = _checked(mask, name)
    units = _whole_units(mask, granularity, name).reshape(-1, *granularity_lib.tap_units(granularity, mask.shape)[-2:])
    count = int(np.count_nonzero(units))
    if not isinstance(at_least, numbers.Integral) or not 0 <= at_least < 2**31:
        raise ValueError(f'make_pattern: at_least={at_least!r}{_called(name)} must be a whole number of units, from 0 to 2^31 - 1.')
    room = max(int(at_least), capacity(count, units.size))

    def listed(axes):
        """Units in compressed rows, in the order of these axes."""
        rows = np.ascontiguousarray(units.transpose(axes))  # of [taps, inputs, outputs]
        rows = rows.reshape(len(rows), -1)
        padded = np.zeros(room, np.int32)
        padded[:count] = np.flatnonzero(rows) % rows.shape[1]
        return padded, np.concatenate([[0], np.cumsum(np.count_nonzero(rows, axis=1))]).astype(np.int32)

    indices, pointers = listed((2, 1, 0))
    transposed, transposed_pointers = listed((1, 2, 0))
    return Pattern(
        indices=indices,
        pointers=pointers,
        transposed_indices=transposed,
        transposed_pointers=transposed_pointers,
        shape=mask.shape,
        granularity=granularity,
        implementation=implementation,
        density_bound=1.0 if implementation else backend.density_bound(count / units.size, granularity, before=bound_before),
        name=name,
    )


def _checked(mask: Any, name: str) -> np.ndarray:
    """The mask on the host; ValueError where it is no weight's."""
    if isinstance(mask, Tracer):
        raise ValueError(
            'make_pattern: mask is traced. Patterns are made on the host from concrete masks, and passed to the jitted step.'
        )
    mask = np.asarray(mask)
    if mask.dtype != np.bool_ or mask.ndim not in (2, 4):
        raise ValueError(
            f'make_pattern: mask{_called(name)} must be a boolean array of 2 axes [in, out] or 4 [height, width, in, out], '
            f'got {mask.dtype}{list(mask.shape)}.'
        )
    if mask.size >= 2**31:
        raise ValueError(f'make_pattern: mask{_called(name)} of shape {mask.shape} has 2^31 elements or more: indices are int32.')
    if min(mask.shape) == 0:
        raise ValueError(f'make_pattern: mask{_called(name)} of shape {mask.shape} is empty.')
    return mask


def _called(name: str) -> str:
    return f' of {name}' if name else ''


def _whole_units(mask: np.ndarray, granularity: Granularity, name: str) -> np.ndarray:
    """The mask of units; ValueError where a unit is partly there."""
    rows, columns = granularity.sides
    if rows == columns == 1:
        return mask
    if mask.shape[-2] < rows or mask.shape[-1] < columns:
        raise ValueError(f'make_pattern: {granularity} do not fit into the mask{_called(name)} of shape {mask.shape}.')
    units = mask[..., ::rows, ::columns]
    whole = np.repeat(np.repeat(units, rows, axis=-2), columns, axis=-1)[..., : mask.shape[-2], : mask.shape[-1]]
    if not np.array_equal(whole, mask):
        where = tuple(int(i) for i in np.argwhere(whole != mask)[0])
        raise ValueError(
            f'make_pattern: mask{_called(name)} does not consist of whole {granularity}: the block around {where} is '
            "there in part. Pass the granularity that it was made with, or 'unstructured'."
        )
    return units


def make_patterns(
    masks: Any,
    *,
    granularity: str | Granularity = NOT_GIVEN,
    block: tuple[int, int] | None = None,
    stacked: Callable[[str, Any], bool] | None = None,
    matrix_axes: Any = None,
    implementations: Mapping[str, str] | None = None,
    previous: Any = None,
    shardings: Any = None,
) -> Any:
    """Patterns of a tree of masks, for a model's ``apply(..., patterns=)``.

    Args:
      masks: state of an optimizer with one ``sparsify``, or masks as ``sj.get_masks`` gives them; concrete.
      granularity: with masks only: as in :func:`make_pattern`, for all of them. A state knows it.
      block: likewise.
      stacked: likewise: which leaves hold a layer in each row, as in ``sj.sparsify``; their patterns have a first axis, for
        ``lax.scan``.
      matrix_axes: likewise: which axes are inputs and outputs. The pattern is of the leaf as [taps..., inputs, outputs], and so must be the
        weight that it multiplies with: :func:`sparse_jax.matrix_axes.as_matrix`.
      implementations: backends by the leaf's path, such as ``{'conv1/kernel': 'cpu'}``; ``'dense'`` makes a leaf's pattern None.
      previous: the patterns before, whose capacities are kept where they suffice, so that nothing is compiled anew.
      shardings: where the weights lie on a mesh with the axes 'data' and 'model': a tree of NamedSharding like the masks. Each device
        then has the pattern of its own part, and the layers run under ``shard_map``, the batch divided over 'data'. None: one device.

    Returns:
      A tree like the masks with a :class:`Pattern` at sparse leaves; None at dense ones, and at those that are no matrix and no 2D
      convolution, or whose parts cut blocks.

    Raises:
      ValueError: as :func:`make_pattern`, and for a path in `implementations` that no leaf has.

    Example:
      >>> import jax.numpy as jnp
      >>> patterns = make_patterns({'fc': {'kernel': jnp.eye(4, dtype=bool), 'bias': jnp.array(True)}})
      >>> patterns['fc']['bias'], patterns['fc']['kernel'].shape
      (None, (4, 4))
    """
    masks, found = _layers_of('make_patterns', masks, granularity, block, stacked, matrix_axes)
    layers = {layer.name: (layer, unit) for layer, unit in found}
    is_leaf = lambda x: x is None or isinstance(x, Pattern)
    before = {p.name: p for p in jax.tree.leaves(previous, is_leaf=is_leaf) if p is not None}
    named, leaves = implementations or {}, layers_lib.leaf_paths(masks)
    placed = {} if shardings is None else dict(layers_lib.leaf_paths(shardings))
    for path in named:
        if path not in dict(leaves):
            raise errors.unknown('make_patterns: the leaf of implementations', path, dict(leaves))

    def make(path, mask):
        if path not in layers or named.get(path) == 'dense':
            return None
        layer, unit = layers[path]
        rows = layer.depth is not None
        if layer.axes is not None:
            if path in placed:
                errors.say_once(f'make_patterns: {path} is divided over a mesh and has matrix_axes: it stays dense (pattern None).')
                return None
            mask = layer.rows(np.asarray(mask)) if rows else layer.rows(np.asarray(mask))[0]
        if np.ndim(mask) - rows not in (2, 4):
            axes = f'{np.ndim(mask)} axes' + (', one of them of layers' if rows else '')
            errors.say_once(
                f'make_patterns: {path} has {axes}: it is no matrix and no 2D convolution, and stays dense (pattern None).'
            )
            return None
        old = before.get(path)
        kept = {}
        if old is not None and old.shape == mask.shape[int(rows) :]:
            kept = dict(at_least=old.capacity, bound_before=old.density_bound)
        one = lambda mask, **kept: _build(mask, unit, named.get(path), path, **kept)
        build = lambda mask: _stack(mask, one, kept) if rows else one(mask, **kept)
        if path not in placed:
            return build(mask)
        split = sharded.split_of(placed[path], mask.shape, unit)
        return None if split is None else _on_mesh(mask, split, build, rows)

    return jax.tree.unflatten(jax.tree.structure(masks), [make(p, m) for p, m in leaves])


def layers_of(
    function: str, masks: Any, granularity: Any, block: Any, stacked: Any, matrix_axes: Any = None, *, leave_others: bool = False
) -> tuple[Any, dict[str, tuple[bool, Granularity]]]:
    """Masks that a function was given as such or as a state, and of each sparse leaf by its path whether it holds a layer in each row, and the
    units of its products. ValueError where a leaf's inputs and outputs are not its last two axes, or such leaves are left out."""
    tree, layers = _layers_of(function, masks, granularity, block, stacked, matrix_axes)
    if leave_others:
        for layer, _ in layers:
            if layer.axes is not None:
                errors.say_once(
                    f'{function}: inputs and outputs of {layer.name} are not its last two axes (matrix_axes): it stays as it is.'
                )
        layers = [(layer, unit) for layer, unit in layers if layer.axes is None]
    if other := [layer.name for layer, _ in layers if layer.axes is not None]:
        raise ValueError(
            f'{function}: inputs and outputs of {other[0]} are not its last two axes (matrix_axes): reshape the params and masks before, or '
            'give masks and keep that leaf dense, with a scalar True.'
        )
    return tree, {layer.name: (layer.depth is not None, unit) for layer, unit in layers}


def units_of(function: str, masks: Any, granularity: Any, stacked: Any, matrix_axes: Any) -> set[Granularity]:
    """The units of the products of masks, or of a state."""
    return {unit for _, unit in _layers_of(function, masks, granularity, None, stacked, matrix_axes)[1]}


def _layers_of(
    function: str, masks: Any, granularity: Any, block: Any, stacked: Any, matrix_axes: Any
) -> tuple[Any, list[tuple[Layer, Granularity]]]:
    """The masks, and their layers with the units of their products."""
    tree = masks_lib.masks_in(masks)
    if tree is masks:
        unit = granularity_lib.of_products(as_granularity(function, granularity, block))
        return tree, [(layer, unit) for layer in masks_lib.layers_of(tree, stacked, matrix_axes)]
    if granularity is not NOT_GIVEN or block is not None or stacked is not None or matrix_axes is not None:
        raise ValueError(f'{function}: the state knows granularity, block, stacked and matrix_axes; give them with masks only.')
    return tree, [(layer, granularity_lib.of_products(unit)) for layer, unit in masks_lib.layers_in(masks)]


def _stack(masks: Any, build: Callable[..., Pattern], kept: dict[str, Any]) -> Pattern:
    """The pattern of layers in rows: rows of one array have one length, and take one backend, those of the densest."""
    masks = np.asarray(masks)
    densest = build(max(masks, key=np.count_nonzero), **kept)
    rows = [build(row, **(kept | dict(at_least=densest.capacity))) for row in masks]
    rows = [dataclasses.replace(row, density_bound=densest.density_bound) for row in rows]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


def _on_mesh(mask: Any, split: sharded.Split, build: Callable[[np.ndarray], Pattern], rows: bool) -> Pattern:
    """A pattern of arrays on the mesh, each process making the parts of its own devices.

    Args:
      mask: a weight's, concrete; on several processes a jax array.
      split: how it lies.
      build: makes one part's pattern on the host.
      rows: whether the first axis holds layers.
    """
    placed = jax.jit(lambda x: x, out_shardings=NamedSharding(split.mesh, split.weight(np.ndim(mask))))(mask)
    parts: dict[int, Pattern] = {}  # by the part's first input or output
    for shard in placed.addressable_shards:
        start = 0 if split.axis is None else (shard.index[split.axis].start or 0)
        if start not in parts:
            parts[start] = build(np.asarray(shard.data))
    parts = _alike(parts)
    width = 1 if split.axis is None else np.shape(mask)[split.axis] // split.parts
    lead = 1 if rows else 0
    spec = P() if split.axis is None else P(*[None] * lead, 'model')
    sharding = NamedSharding(split.mesh, spec)

    def spread(*arrays: np.ndarray) -> jax.Array:
        if split.axis is None:
            return jax.make_array_from_callback(arrays[0].shape, sharding, lambda index: arrays[0][index])
        by_start = dict(zip(parts, arrays, strict=True))
        shape = (*arrays[0].shape[:lead], split.parts, *arrays[0].shape[lead:])
        pick = lambda index: np.expand_dims(by_start[(index[lead].start or 0) * width], lead)
        return jax.make_array_from_callback(shape, sharding, pick)

    pattern = jax.tree.map(spread, *parts.values())
    return dataclasses.replace(pattern, shape=tuple(np.shape(mask)[lead:]), split=split)


def _alike(parts: dict[int, Pattern]) -> dict[int, Pattern]:
    """The parts with the largest capacity and density bound of all, on all processes: one program runs on all devices."""
    millionths = 1_000_000  # integers, as all processes' floats may be gathered in single precision
    largest = np.array([max(p.capacity for p in parts.values()), max(round(millionths * p.density_bound) for p in parts.values())])
    if jax.process_count() > 1:
        largest = np.asarray(multihost_utils.process_allgather(largest)).reshape(-1, 2).max(0)
    room, bound = int(largest[0]), int(largest[1]) / millionths
    return {start: dataclasses.replace(p.with_capacity(room), density_bound=bound) for start, p in parts.items()}
