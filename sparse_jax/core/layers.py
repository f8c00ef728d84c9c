"""The sparse leaves of a tree as layers: which they are, their names, and what the state says of them."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core import distributions
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import matrix_axes as matrix_axes_lib
from sparse_jax.core.granularity import Granularity
from sparse_jax.core.matrix_axes import Axes, MatrixAxes

PathPredicate = Callable[[str, Any], bool]  # of a leaf's path, joined by /, and the leaf or its shape

_KINDS = 16  # more than there are kinds of granularity
_WORD = re.compile(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+')  # runs of letters, cut where their case changes


class Layer(NamedTuple):
    """Where one sparse leaf stands among the layers; a stacked leaf holds several."""

    leaf: int  # index among the params' leaves
    name: str
    shape: tuple[int, ...]  # of one layer, [taps..., inputs, outputs]
    start: int  # index of its first layer
    depth: int | None  # number of stacked layers, None where the leaf is one layer
    dtype: Any  # of the leaf
    axes: Axes | None = None  # how a layer lies in the leaf; None: as its shape says

    @property
    def stop(self) -> int:
        return self.start + (1 if self.depth is None else self.depth)

    def rows(self, x: Any) -> Any:
        """The leaf's array, or one like it, as [rows, taps..., inputs, outputs]: a row for each of its layers."""
        x = x[None] if self.depth is None else x
        return x if self.axes is None else self.axes.to_matrix(x)

    def from_rows(self, rows: jax.Array) -> jax.Array:
        """The inverse of :meth:`rows`."""
        x = rows if self.axes is None else self.axes.from_matrix(rows)
        return x[0] if self.depth is None else x


def default_sparsifiable(path: str, leaf: Any) -> bool:
    """Whether a leaf is trained sparse unless told otherwise: floating point, two or more axes, and not called like a dense one.

    Words of its path that name a dense leaf: ``bias``, ``scale``, and what begins with ``embed`` or ends in ``norm``; in its last name also
    ``pos``, ``position`` and ``posemb``, and ``token`` as the last word.

    >>> leaf = jnp.ones((2, 2))
    >>> [default_sparsifiable(path, leaf) for path in ('dense/kernel', 'normal_proj/kernel', 'LayerNorm_0/kernel', 'cls_token')]
    [True, True, False, False]
    """
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and np.ndim(leaf) >= 2 and not _is_named_dense(path)


def _is_named_dense(path: str) -> bool:
    if any(word.startswith('embed') or word in ('bias', 'scale') or word.endswith('norm') for word in _words(path)):
        return True
    own = _words(path.rpartition('/')[2])
    return any(word in ('pos', 'position', 'posemb') for word in own) or own[-1:] == ['token']


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


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


def leaf_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """(path joined by /, leaf) of all leaves; the attribute ``value``, in which every path of flax's nnx ends, is left out.

    >>> leaf_paths({'a': {'b': 1}})
    [('a/b', 1)]
    """
    rows = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    is_variable = lambda path: len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == 'value'
    if rows and all(is_variable(path) or (is_leaf is not None and is_leaf(leaf)) for path, leaf in rows):
        rows = [(path[:-1] if is_variable(path) else path, leaf) for path, leaf in rows]
    return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in rows]


def names_of(layers: Sequence[Layer]) -> list[str]:
    """A name for each layer; those of a stacked leaf end in [0], [1], ..."""
    names = []
    for layer in layers:
        names += [layer.name] if layer.depth is None else [f'{layer.name}[{i}]' for i in range(layer.depth)]
    return names


def layer_table(
    tree: Any, is_sparse: PathPredicate, stacked: PathPredicate | None, matrix_axes: MatrixAxes | None = None
) -> list[Layer]:
    """The sparse leaves of a tree (params, masks, or their shapes) in its order; ValueError for a leaf that cannot be sparse."""
    layers, start = [], 0
    for i, (path, leaf) in enumerate(leaf_paths(tree)):
        if not is_sparse(path, leaf):
            continue
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and jnp.result_type(leaf) != jnp.bool_:  # bool: masks
            raise ValueError(
                f'sparsifiable chose the leaf {path!r} of dtype {jnp.result_type(leaf)}; a sparse leaf is of real floating-point numbers.'
            )
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
        axes = matrix_axes_lib.axes_of(matrix_axes, path, jax.ShapeDtypeStruct(shape, leaf.dtype))
        shape = shape if axes is None else axes.matrix_shape
        layers.append(Layer(i, path, shape, start, leaf.shape[0] if is_stacked else None, leaf.dtype, axes))
        start = layers[-1].stop
    return layers


def layers_of_masks(params: Any, masks: Any, stacked: PathPredicate | None, matrix_axes: MatrixAxes | None = None) -> list[Layer]:
    """The layers of params that have a mask; the functions are asked about the params."""
    sparse = {path for (path, _), mask in zip(leaf_paths(params), jax.tree.leaves(masks), strict=True) if mask.ndim}
    return layer_table(params, lambda path, _: path in sparse, stacked, matrix_axes)


def unit_counts(granularity: Granularity, layers: Sequence[Layer]) -> list[int]:
    """Units of budget of each layer."""
    return [granularity.num_units(layer.shape) for layer in layers for _ in range(layer.depth or 1)]


def encode(num_leaves: int, layers: Sequence[Layer], granularity: Granularity) -> np.ndarray:
    """What a state says of its leaves: int32[leaves, 4].

    The columns are the number of stacked layers (-1 where the leaf is dense, 0 where it is one layer), and the granularity's kind and
    two numbers (see :func:`sparse_jax.granularity.encode`). To the kind is added, times 16, which axes are inputs and outputs
    (:func:`sparse_jax.core.matrix_axes.encode`; 0: the last two).
    """
    codes = np.tile(np.array([-1, 0, 0, 0], np.int32), (num_leaves, 1))
    for layer in layers:
        kind, *numbers = granularity_lib.encode(granularity)
        codes[layer.leaf] = layer.depth or 0, kind + _KINDS * matrix_axes_lib.encode(layer.axes), *numbers
    return codes


def decode(masks: Any, codes: Any) -> list[tuple[Layer, Granularity]]:
    """The layers of a tree of masks (or of their shapes) and their granularity, from what :func:`encode` wrote."""
    leaves, rows = leaf_paths(masks), np.asarray(codes)
    if rows.shape != (len(leaves), 4):
        raise ValueError(f'layers has the shape {rows.shape}, but the masks have {len(leaves)} leaves: it must be [leaves, 4].')
    row_of = dict(zip((path for path, _ in leaves), rows.tolist(), strict=True))

    def matrix_axes(path: str, layer: Any):
        axes = matrix_axes_lib.decode(row_of[path][1] // _KINDS, layer.shape)
        return None if axes is None else (axes.inputs, axes.outputs)

    layers = layer_table(masks, lambda path, _: row_of[path][0] >= 0, lambda path, _: row_of[path][0] > 0, matrix_axes)
    codes = [(kind % _KINDS, *numbers) for kind, *numbers in (row_of[layer.name][1:] for layer in layers)]
    return [(layer, granularity_lib.decode(*code)) for layer, code in zip(layers, codes, strict=True)]
