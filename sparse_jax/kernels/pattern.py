"""Where a weight's nonzeros are, as lists that kernels walk: plain data, an argument of the jitted step. See builder.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core.granularity import Granularity, Unstructured
from sparse_jax.kernels import sharded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pattern:
    """The units of a weight that exist: single weights, or blocks of inputs by outputs at each tap.

    The units of a weight [taps..., in, out] form an array [taps..., ceil(in / rows), ceil(out / columns)]. They are listed twice in
    compressed rows: by output, and by input for the transposed product. Patterns of layers that are stacked have a first axis on each
    array.

    Attributes:
      indices: int32[capacity]: input * taps + tap of each unit of output 0, then of output 1, ..., ascending; what is beyond the last
        pointer is not used.
      pointers: int32[outputs + 1]: those of output o are indices[pointers[o]:pointers[o + 1]].
      transposed_indices: int32[capacity]: output * taps + tap of each unit of input 0, then of input 1, ...
      transposed_pointers: int32[inputs + 1].
      shape: shape of the weight: [in, out], or [height, width, in, out].
      granularity: what a unit is; one that spans all taps is listed at each of them.
      implementation: the backend that the layer takes; None: the one that backend.py's rule gives.
      density_bound: upper bound of the density, for that rule: see ``backend.density_bound``; 1 where a backend is named.
      dense_gradient: whether the weight's gradient is wanted at all positions.
      name: name of the layer, for messages.
      split: how the layer lies on a mesh, and then, where that divides the weight, each array has a row for each part; None: one device.
      observer: is called with (x, w, pattern, geometry) when a product with this pattern is traced: see ``measure.products_of``.
    """

    indices: jax.Array | np.ndarray
    pointers: jax.Array | np.ndarray
    transposed_indices: jax.Array | np.ndarray
    transposed_pointers: jax.Array | np.ndarray
    shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    granularity: Granularity = dataclasses.field(default=Unstructured(), metadata=dict(static=True))
    implementation: str | None = dataclasses.field(default=None, metadata=dict(static=True))
    density_bound: float = dataclasses.field(default=1.0, metadata=dict(static=True))
    dense_gradient: bool = dataclasses.field(default=False, metadata=dict(static=True))
    name: str = dataclasses.field(default='', metadata=dict(static=True))
    split: sharded.Split | None = dataclasses.field(default=None, metadata=dict(static=True))
    observer: Callable[..., None] | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def capacity(self) -> int:
        """Number of units there is room for."""
        return self.indices.shape[-1]

    @property
    def units(self) -> tuple[int, ...]:
        """Shape of the array of units."""
        return granularity_lib.tap_units(self.granularity, self.shape)

    def with_capacity(self, capacity: int) -> 'Pattern':
        """The same units with room for at least so many, on the host."""
        missing = max(0, capacity - self.capacity)
        wider = lambda x: np.pad(x, [(0, 0)] * (np.ndim(x) - 1) + [(0, missing)])
        return dataclasses.replace(self, indices=wider(self.indices), transposed_indices=wider(self.transposed_indices))


def is_pattern(x: Any) -> bool:
    """Whether a part of a tree is a pattern: for ``is_leaf``."""
    return isinstance(x, Pattern)


def capacity(count: int, most: int) -> int:
    """Room for so many units and as many again, in powers of two: a layer has to double before a step is compiled anew.

    Kernels do not visit what is beyond the last pointer: it costs 8 bytes a unit and no time (a GPU's weight gradient that is summed in
    parts reads it).

    >>> capacity(1000, 5000), capacity(1025, 2000), capacity(3, 9)
    (2048, 2000, 9)
    """
    return min(most, max(16, 1 << max(2 * count - 1, 0).bit_length()))


def with_dense_gradients(patterns: Any) -> Any:
    """The same patterns, with weight gradients at all positions: what growth needs before a mask update. Works on traced ones."""
    return jax.tree.map(lambda p: dataclasses.replace(p, dense_gradient=True), patterns, is_leaf=is_pattern)
