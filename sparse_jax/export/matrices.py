"""Sparse leaves as scipy's and jax's own sparse arrays. A weight that exists is kept there, even where it is zero."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jax_sparse

from sparse_jax.core import matrix_axes as matrix_axes_lib
from sparse_jax.core.layers import PathPredicate
from sparse_jax.core.matrix_axes import MatrixAxes
from sparse_jax.export import leaves


def to_scipy(params: Any, masks: Any, *, stacked: PathPredicate | None = None, matrix_axes: str | MatrixAxes | None = None) -> Any:
    """Each sparse leaf as a matrix in compressed rows, one for each output: ``matrix @ x`` for a column x of inputs.

    Args:
      params: pytree of arrays.
      masks: tree like the params: bool arrays, and a scalar True at dense leaves.
      stacked: which leaves hold one layer a row, as :func:`sparse_jax.sparsify` was told.
      matrix_axes: which axes are inputs and outputs, likewise.

    Returns:
      A tree like the params, numpy arrays at dense leaves. Of a leaf [..., in, out] a ``scipy.sparse.csr_matrix`` [out, ... * in]: a
      convolution's columns are in the order of a patch [height, width, in]. Of a stacked leaf a list of such. bfloat16, which scipy
      does not know, becomes float32.

    Example:
      >>> kernel = np.array([[0.0, 2.0], [3.0, 0.0]], np.float32)
      >>> matrix = to_scipy({'kernel': kernel}, {'kernel': kernel != 0})['kernel']
      >>> (matrix @ np.array([1.0, 10.0])).tolist()
      [30.0, 2.0]
    """

    def matrix(value: np.ndarray, mask: np.ndarray):
        from scipy import sparse

        value = value if value.dtype.isbuiltin == 1 and value.dtype != np.float16 else value.astype(np.float32)
        value, mask = (np.moveaxis(x, -1, 0).reshape(x.shape[-1], -1) for x in (value, mask))
        pointers = np.concatenate([[0], np.cumsum(mask.sum(1))])
        return sparse.csr_matrix((value[mask], np.nonzero(mask)[1], pointers), shape=value.shape)

    def convert(path: str, value: np.ndarray, mask: np.ndarray):
        if not mask.ndim:
            return value
        is_stacked = stacked is not None and stacked(path, value)
        rows = (value, mask) if is_stacked else (value[None], mask[None])
        axes = matrix_axes_lib.axes_of(matrix_axes_lib.get(matrix_axes), path, rows[0][0])
        if axes is not None:
            rows = tuple(np.asarray(axes.to_matrix(jnp.asarray(x))) for x in rows)
        matrices = [matrix(*row) for row in zip(*rows, strict=True)]
        return matrices if is_stacked else matrices[0]

    return _each(convert, params, masks)


def to_bcoo(params: Any, masks: Any) -> Any:
    """Each sparse leaf as a ``jax.experimental.sparse.BCOO`` of its shape.

    Args:
      params: pytree of arrays.
      masks: tree like the params: bool arrays, and a scalar True at dense leaves.

    Returns:
      A tree like the params, jax arrays at dense leaves.

    Example:
      >>> kernel = np.array([[0.0, 2.0], [3.0, 0.0]], np.float32)
      >>> leaf = to_bcoo({'kernel': kernel}, {'kernel': kernel != 0})['kernel']
      >>> leaf.nse, (jnp.array([1.0, 10.0]) @ leaf).tolist()
      (2, [30.0, 2.0])
    """

    def convert(_: str, value: np.ndarray, mask: np.ndarray):
        if not mask.ndim:
            return jnp.asarray(value)
        indices = np.argwhere(mask).astype(np.int32)
        options: Any = dict(shape=value.shape, indices_sorted=True, unique_indices=True)
        return jax_sparse.BCOO((jnp.asarray(value[mask]), jnp.asarray(indices)), **options)

    return _each(convert, params, masks)


def _each(convert, params: Any, masks: Any) -> Any:
    converted = [convert(*row) for row in leaves.pairs(params, masks)]
    return jax.tree.unflatten(jax.tree.structure(params), converted)
