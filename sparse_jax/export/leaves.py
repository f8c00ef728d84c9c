"""A sparse leaf as the units that exist, and back; which leaf belongs to which mask."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sparse_jax.core import layers as layers_lib
from sparse_jax.core.granularity import Block, Granularity, Unstructured
from sparse_jax.core.layers import PathPredicate


def masks_from(params: Any, *, sparsifiable: PathPredicate | None = None, dense: Sequence[str] = ()) -> Any:
    """Masks of the weights that are not exactly zero.

    Args:
      params: pytree of arrays.
      sparsifiable: which leaves are sparse; None: as :func:`sparse_jax.sparsify` decides.
      dense: patterns of paths that are dense all the same.

    Returns:
      Masks like the params: bool arrays, and a scalar True at dense leaves.

    Example:
      >>> masks_from({'kernel': np.array([[0.0, 2.0], [3.0, 0.0]]), 'bias': np.zeros(2)})['kernel'].tolist()
      [[False, True], [True, False]]
    """
    is_sparse = layers_lib.sparse_leaves(params, sparsifiable, dense)
    masks = [np.asarray(leaf) != 0 if is_sparse(path, leaf) else np.asarray(True) for path, leaf in layers_lib.leaf_paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), masks)


def unpack_masks(params: Any, packed: Any) -> Any:
    """Masks as a run's checkpoint stores them, eight weights a byte along the last axis, from what orbax restores without this package.

    Args:
      params: of the same checkpoint: their shapes say where a row ends.
      packed: the state's masks as stored: uint8, and a scalar True at dense leaves.

    Returns:
      Masks like the params.

    Raises:
      ValueError: where a mask is not that of its leaf.

    Example:
      >>> unpack_masks({'w': np.zeros((2, 3))}, {'w': np.array([[0b01000000], [0b10100000]], np.uint8)})['w'].tolist()
      [[False, True, False], [True, False, True]]
    """

    def unpack(path: str, leaf: Any, mask: Any) -> np.ndarray:
        mask, shape = np.asarray(mask), np.shape(leaf)
        if mask.dtype == np.bool_ and mask.shape in ((), shape):
            return mask
        if mask.dtype != np.uint8 or mask.shape != (*shape[:-1], -(-shape[-1] // 8)):
            raise ValueError(f'unpack_masks: {path} of shape {shape} has no packed mask: got {mask.dtype}{list(mask.shape)}.')
        return np.unpackbits(mask, axis=-1, count=shape[-1]).astype(bool)

    rows, masks = layers_lib.leaf_paths(params), layers_lib.leaf_paths(packed)
    if [path for path, _ in rows] != [path for path, _ in masks]:
        raise ValueError('unpack_masks: the masks must be a tree like params.')
    made = [unpack(path, leaf, mask) for (path, leaf), (_, mask) in zip(rows, masks, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), made)


def pairs(params: Any, masks: Any) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Path, values and mask of each leaf, on the host.

    Raises:
      ValueError: where the trees do not fit, or a weight exists that the mask says does not.
    """
    rows = layers_lib.leaf_paths(params)
    if jax.tree.structure(params) != jax.tree.structure(masks):
        raise ValueError('masks: must be a tree like params, with a scalar True at dense leaves: see get_masks.')
    found = []
    for (path, leaf), mask in zip(rows, jax.device_get(jax.tree.leaves(masks)), strict=True):
        value, mask = np.asarray(jax.device_get(leaf)), np.asarray(mask)
        if mask.dtype != np.bool_ or (mask.ndim and mask.shape != value.shape):
            raise ValueError(f'masks: {path!r} must be bool{list(value.shape)} or a scalar, got {mask.dtype}{list(mask.shape)}.')
        if mask.ndim and (lost := int(np.count_nonzero(value[~mask]))):
            raise ValueError(
                f'params: {path!r} has {lost} weights off its mask that are not zero: apply them first, with apply_masks(params, masks).'
            )
        found.append((path, value, mask))
    return found


def compress(value: np.ndarray, mask: np.ndarray, granularity: Granularity, path: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a leaf's existing units, and which these are.

    Args:
      value: the leaf: [..., in, out], or of any shape where units are single weights.
      mask: of the same shape.
      granularity: what a unit is; one that spans all taps is listed at each of them.
      path: of the leaf, for messages.

    Returns:
      Values, [units] or [units, inputs, outputs of a block] with zeros beyond an edge, and int32[units] (int64 where they do not
      suffice): the place of each in the flattened array of all units, ascending.

    >>> compress(np.diag([1.0, 2.0, 3.0, 4.0]), np.kron(np.eye(2), np.ones((2, 2))) > 0, Block(2, 2), 'kernel')[1]
    array([0, 3], dtype=int32)
    """
    values, exists = _units(value, granularity), _units(mask, granularity)
    chosen = exists if exists.ndim == 1 else exists.any((1, 2))
    indices = np.flatnonzero(chosen).astype(np.int32 if chosen.size <= 2**31 else np.int64)
    if not np.array_equal(expand(np.broadcast_to(True, values[indices].shape), indices, granularity, value.shape), mask):
        raise ValueError(f'granularity: the mask of {path!r} has units that exist in part, so it is not made of {granularity}.')
    return values[indices], indices


def expand(values: np.ndarray, indices: np.ndarray, granularity: Granularity, shape: Sequence[int]) -> np.ndarray:
    """The reverse of :func:`compress`: the whole leaf, zero where no unit exists."""
    if isinstance(granularity, Unstructured):
        whole = np.zeros(int(np.prod(shape)), values.dtype)
        whole[indices] = values
        return whole.reshape(shape)
    rows, columns = granularity.sides
    grid = *shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)
    whole = np.zeros((int(np.prod(grid)), rows, columns), values.dtype)
    whole[indices] = values
    whole = whole.reshape(*grid, rows, columns).swapaxes(-3, -2)
    return whole.reshape(*shape[:-2], grid[-2] * rows, grid[-1] * columns)[..., : shape[-2], : shape[-1]]


def _units(x: np.ndarray, granularity: Granularity) -> np.ndarray:
    """[units], or [units, inputs, outputs of a block]."""
    if not isinstance(granularity, Block):
        return x.reshape(-1)
    rows, columns = granularity.sides
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % rows), (0, -x.shape[-1] % columns)]
    x = np.pad(x, padding)
    x = x.reshape(*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)
    return x.swapaxes(-3, -2).reshape(-1, rows, columns)


def nested(rows: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from paths.

    >>> nested({'a/b': 1, 'a/c': 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, value in rows.items():
        *folders, name = path.split('/')
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return tree
