"""Which axes of a leaf are a layer's inputs and which its outputs, where they are not the last two.

Everything that knows of inputs and outputs (distributions, blocks, equal numbers of inputs, dead neurons, patterns of kernels) sees a layer as
[taps..., inputs, outputs]. A leaf that lies otherwise is told once, by a function of its path, and is transposed and reshaped for them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_jax.core import errors

# Maps a leaf's path, joined by /, and the leaf (of one layer) to its axes of inputs and of outputs; None: the last two.
MatrixAxes = Callable[[str, Any], tuple[Sequence[int], Sequence[int]] | None]

_ATTENTION = {'query': ((0,), (1, 2)), 'key': ((0,), (1, 2)), 'value': ((0,), (1, 2)), 'out': ((0, 1), (2,))}


def flax(path: str, leaf: Any) -> tuple[Sequence[int], Sequence[int]] | None:
    """The axes of flax's layers: those of ``MultiHeadDotProductAttention`` (linen) and ``MultiHeadAttention`` (nnx) in particular.

    Their ``query``, ``key`` and ``value`` kernels are [inputs, heads, features of a head], ``out`` is [heads, features of a head, outputs].
    All other kernels are [taps..., inputs, outputs]. A ``DenseGeneral`` of one's own, which can have any axes, takes a function of one's own.

    Args:
      path: of the leaf, joined by ``/``.
      leaf: an array, or its shape and dtype.

    Returns:
      The axes of inputs and of outputs; None: the last two.

    Example:
      >>> import jax.numpy as jnp
      >>> flax('encoder/attention/query/kernel', jnp.ones((512, 8, 64)))
      ((0,), (1, 2))
    """
    parts = path.split('/')
    if np.ndim(leaf) != 3 or len(parts) < 2 or parts[-1] != 'kernel':
        return None
    return _ATTENTION.get(parts[-2])


def torch(path: str, leaf: Any) -> tuple[Sequence[int], Sequence[int]] | None:
    """The axes of PyTorch's and Equinox's layers: [outputs, inputs, taps...].

    Args:
      path: of the leaf, joined by ``/``.
      leaf: an array, or its shape and dtype.

    Returns:
      The axes of inputs and of outputs; None for a leaf of one axis.

    Example:
      >>> import jax.numpy as jnp
      >>> torch('conv1/weight', jnp.ones((64, 3, 7, 7)))
      ((1,), (0,))
    """
    del path
    return ((1,), (0,)) if np.ndim(leaf) >= 2 else None


_NAMED = {'flax': flax, 'torch': torch}


def get(matrix_axes: str | MatrixAxes | None) -> MatrixAxes | None:
    """The function of that name, or the given one; ValueError where there is none.

    >>> get('torch') is torch, get(None) is None
    (True, True)
    """
    if matrix_axes is None:
        return None
    if callable(matrix_axes):
        errors.check_takes('matrix_axes', matrix_axes, '(path, leaf) -> (axes of inputs, axes of outputs), or None')
        return matrix_axes
    if not isinstance(matrix_axes, str) or matrix_axes not in _NAMED:
        raise errors.unknown('matrix_axes', matrix_axes, _NAMED)
    return _NAMED[matrix_axes]


class Axes(NamedTuple):
    """How one layer's array lies: its shape, and which of its axes are inputs and outputs, in rising order."""

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """All axes: taps, inputs, outputs."""
        taps = tuple(i for i in range(len(self.shape)) if i not in self.inputs + self.outputs)
        return taps + self.inputs + self.outputs

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape [taps..., inputs, outputs].

        >>> Axes((512, 8, 64), (0,), (1, 2)).matrix_shape, Axes((64, 3, 7, 7), (1,), (0,)).matrix_shape
        ((512, 512), (7, 7, 3, 64))
        """
        side = lambda axes: math.prod(self.shape[i] for i in axes)
        taps = tuple(n for i, n in enumerate(self.shape) if i not in self.inputs + self.outputs)
        return *taps, side(self.inputs), side(self.outputs)

    def to_matrix(self, x: jax.Array) -> jax.Array:
        """An array [rows, *shape] as [rows, taps..., inputs, outputs]."""
        return x.transpose(0, *(i + 1 for i in self.order)).reshape(len(x), *self.matrix_shape)

    def from_matrix(self, x: jax.Array) -> jax.Array:
        """The inverse of :meth:`to_matrix`."""
        x = x.reshape(len(x), *(self.shape[i] for i in self.order))
        return x.transpose(0, *(i + 1 for i in np.argsort(self.order).tolist()))


def as_matrix(leaf: jax.Array, axes: tuple[Sequence[int], Sequence[int]] | None) -> jax.Array:
    """A leaf of one layer as [taps..., inputs, outputs]: how its pattern and its kernels see it.

    Args:
      leaf: an array, such as a weight; gradients pass through.
      axes: its axes of inputs and of outputs, as a ``matrix_axes`` function gives them; None: the last two.

    Returns:
      The array, transposed and reshaped.

    Raises:
      ValueError: for axes that the leaf does not have.

    Example:
      >>> import jax.numpy as jnp
      >>> as_matrix(jnp.ones((512, 8, 64)), flax('attention/query/kernel', jnp.ones((512, 8, 64)))).shape
      (512, 512)
    """
    found = axes_of(lambda path, leaf: axes, '', leaf)
    return leaf if found is None else found.to_matrix(leaf[None])[0]


def axes_of(matrix_axes: MatrixAxes | None, path: str, layer: Any) -> Axes | None:
    """The axes of one layer; None where they are the last two. ValueError for what are no axes of it."""
    given = None if matrix_axes is None else matrix_axes(path, layer)
    if given is None:
        return None
    shape = tuple(np.shape(layer))
    try:
        inputs, outputs = (tuple(map(int, axes)) for axes in given)
    except (TypeError, ValueError):
        inputs, outputs = (), ()
    together = inputs + outputs
    rising = all(list(axes) == sorted(axes) for axes in (inputs, outputs))
    if not (inputs and outputs and rising and len(set(together)) == len(together) and set(together) <= set(range(len(shape)))):
        raise ValueError(
            f'matrix_axes: of {path!r} with the shape {shape} it gave {given!r}; it must give a pair, the axes of inputs and the axes of '
            f'outputs, different numbers from 0 to {len(shape) - 1} in rising order such as ((0,), (1, 2)), or None for the last two.'
        )
    usual = inputs == (len(shape) - 2,) and outputs == (len(shape) - 1,)
    return None if usual else Axes(shape, inputs, outputs)


def encode(axes: Axes | None) -> int:
    """The axes as one integer, 0 for None: a 1, then for each axis 0 (tap), 1 (inputs) or 2 (outputs), in base 3.

    >>> encode(Axes((512, 8, 64), (0,), (1, 2)))
    44
    """
    code = 0 if axes is None else 1
    for i in range(0 if axes is None else len(axes.shape)):
        code = 3 * code + (1 if i in axes.inputs else 2 if i in axes.outputs else 0)  # pyright: ignore[reportOptionalMemberAccess]
    return code


def decode(code: int, shape: tuple[int, ...]) -> Axes | None:
    """The inverse of :func:`encode`, for a layer of that shape.

    >>> decode(44, (512, 8, 64))
    Axes(shape=(512, 8, 64), inputs=(0,), outputs=(1, 2))
    """
    if code == 0:
        return None
    roles = []
    while code > 1:
        code, role = divmod(code, 3)
        roles.insert(0, role)
    where = lambda role: tuple(i for i, r in enumerate(roles) if r == role)
    return Axes(tuple(shape), where(1), where(2))
