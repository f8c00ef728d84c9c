"""The sparse leaves of a tree as layers: which they are, their names, and what the state says of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core import distributions
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core.granularity import Granularity

PathPredicate = Callable[[str, Any], bool]  # of a leaf's path, joined by /, and the leaf or its shape

_DENSE_NAMES = ('embed', 'norm', 'bias', 'scale')


class Layer(NamedTuple):
    """Where one sparse leaf stands among the layers; a stacked leaf holds several."""

    leaf: int  # index among the params' leaves
    name: str
    shape: tuple[int, ...]  # of one layer
    start: int  # index of its first layer
    depth: int | None  # number of stacked layers, None where the leaf is one layer
    dtype: Any  # of the leaf

    @property
    def stop(self) -> int:
        return self.start + (1 if self.depth is None else self.depth)


def default_sparsifiable(path: str, leaf: Any) -> bool:
    """Whether a leaf is trained sparse unless told otherwise: floating point, two or more axes, no dense name in its path.

    >>> default_sparsifiable('dense/kernel', jnp.ones((2, 2))), default_sparsifiable('LayerNorm_0/kernel', jnp.ones((2, 2)))
    (True, False)
    """
    named_dense = any(part in path.lower() for part in _DENSE_NAMES)
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim >= 2 and not named_dense


def sparse_leaves(params: Any, sparsifiable: PathPredicate | None, dense: Sequence[str]) -> PathPredicate:
    """The predicate of the leaves that are trained sparse; ValueError for a dense pattern that matches none of them.

    >>> params = {'conv1': jnp.ones((3, 3)), 'conv2': jnp.ones((3, 3))}
    >>> [path for path in params if sparse_leaves(params, None, ['conv1'])(path, params[path])]
    ['conv2']
    """
    chosen = sparsifiable or default_sparsifiable
    names = [path for path, leaf in leaf_paths(params) if chosen(path, leaf)]
    kept_dense = {name for name, i in zip(names, distributions.matching(dense, names, 'dense'), strict=True) if i is not None}
    return lambda path, leaf: path not in kept_dense and chosen(path, leaf)


def leaf_paths(tree: Any) -> list[tuple[str, Any]]:
    """(path joined by /, leaf) of all leaves.

    >>> leaf_paths({'a': {'b': 1}})
    [('a/b', 1)]
    """
    return [
        (jax.tree_util.keystr(key_path, simple=True, separator='/'), leaf)
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def names_of(layers: Sequence[Layer]) -> list[str]:
    """A name for each layer; those of a stacked leaf end in [0], [1], ..."""
    names = []
    for layer in layers:
        names += [layer.name] if layer.depth is None else [f'{layer.name}[{i}]' for i in range(layer.depth)]
    return names


def layer_table(tree: Any, is_sparse: PathPredicate, stacked: PathPredicate | None) -> list[Layer]:
    """The sparse leaves of a tree (params, masks, or their shapes) in its order; ValueError for a leaf that cannot be sparse."""
    layers, start = [], 0
    for i, (path, leaf) in enumerate(leaf_paths(tree)):
        if not is_sparse(path, leaf):
            continue
        is_stacked = stacked is not None and stacked(path, leaf)
        shape = tuple(leaf.shape[1:] if is_stacked else leaf.shape)
        if not leaf.shape or math.prod(leaf.shape) == 0 or (is_stacked and not shape):
            raise ValueError(
                f'sparsifiable chose the leaf {path!r} of shape {tuple(leaf.shape)}; a sparse leaf needs at least one axis '
                '(two where it is stacked) and one element.'
            )
        if math.prod(leaf.shape) >= 2**31:
            raise ValueError(
                f'the leaf {path!r} has {math.prod(leaf.shape)} elements; a sparse leaf takes fewer than 2^31 = {2**31}.'
            )
        layers.append(Layer(i, path, shape, start, leaf.shape[0] if is_stacked else None, leaf.dtype))
        start = layers[-1].stop
    return layers


def unit_counts(granularity: Granularity, layers: Sequence[Layer]) -> list[int]:
    """Units of each layer."""
    return [math.prod(granularity.unit_shape(layer.shape)) for layer in layers for _ in range(layer.depth or 1)]


def encode(num_leaves: int, layers: Sequence[Layer], granularity: Granularity) -> np.ndarray:
    """What a state says of its leaves: int32[leaves, 4].

    The columns are the number of stacked layers (-1 where the leaf is dense, 0 where it is one layer), and the granularity's kind and
    two numbers (see :func:`sparse_jax.granularity.encode`).
    """
    codes = np.tile(np.array([-1, 0, 0, 0], np.int32), (num_leaves, 1))
    for layer in layers:
        codes[layer.leaf] = layer.depth or 0, *granularity_lib.encode(granularity)
    return codes


def decode(masks: Any, codes: Any) -> list[tuple[Layer, Granularity]]:
    """The layers of a tree of masks (or of their shapes) and their granularity, from what :func:`encode` wrote."""
    leaves, rows = leaf_paths(masks), np.asarray(codes)
    if rows.shape != (len(leaves), 4):
        raise ValueError(f'layers has the shape {rows.shape}, but the masks have {len(leaves)} leaves: it must be [leaves, 4].')
    depth = dict(zip((path for path, _ in leaves), rows[:, 0].tolist(), strict=True))
    layers = layer_table(masks, lambda path, _: depth[path] >= 0, lambda path, _: depth[path] > 0)
    return [(layer, granularity_lib.decode(*rows[layer.leaf, 1:].tolist())) for layer in layers]
