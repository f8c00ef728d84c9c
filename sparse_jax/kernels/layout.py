"""A sparse weight as the units that exist: values, and lists that say where they belong."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core.granularity import Granularity, Unstructured


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Which units of a weight exist, in the order of its values: by output, of each output's by input and then by tap.

    Attributes:
      indices: int32[units]: input * taps + tap of each unit of output 0, then of output 1, ..., ascending; what is beyond the last
        pointer is not used. Inputs and outputs are those of the array of units.
      pointers: int32[outputs + 1]: the units of output o are those from pointers[o] to pointers[o + 1].
      shape: shape of the weight: [in, out], or [height, width, in, out].
      granularity: what a unit is; one that spans all taps is listed at each of them.
      implementation: the backend that multiplies; None: by rule.
      name: name of the layer, for messages.
    """

    indices: jax.Array | np.ndarray
    pointers: jax.Array | np.ndarray
    shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    granularity: Granularity = dataclasses.field(default=Unstructured(), metadata=dict(static=True))
    implementation: str | None = dataclasses.field(default=None, metadata=dict(static=True))
    name: str = dataclasses.field(default='', metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompactWeight:
    """A weight whose missing units take no memory. Where layers are stacked, each array has a first axis.

    Attributes:
      values: [units], or [units, inputs, outputs of a block], zero beyond the weight's edge and beyond the last unit.
      layout: where each unit belongs.
    """

    values: jax.Array | np.ndarray
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight."""
        return (*self.layout.pointers.shape[:-1], *self.layout.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the values."""
        return jnp.dtype(self.values.dtype)

    @property
    def ndim(self) -> int:
        """Axes of the whole weight."""
        return len(self.shape)

    def to_dense(self) -> jax.Array:
        """The whole array, zero where no unit exists."""
        if self.layout.pointers.ndim == 1:
            return expand(self)
        return jax.vmap(expand)(self)


def is_compact(x: object) -> bool:
    """Whether a part of a tree is a compact weight: for ``is_leaf``."""
    return isinstance(x, CompactWeight)


def expand(weight: CompactWeight) -> jax.Array:
    """:meth:`CompactWeight.to_dense` of one layer, in plain XLA."""
    layout, values = weight.layout, weight.values
    *taps, inputs, outputs = granularity_lib.tap_units(layout.granularity, layout.shape)
    rows, columns = layout.granularity.sides
    number = jnp.arange(layout.indices.shape[-1])
    output = jnp.searchsorted(layout.pointers, number, side='right') - 1  # of unused ones: too large, and dropped
    source, tap = jnp.divmod(layout.indices, math.prod(taps))
    values = jnp.asarray(values).reshape(-1, rows, columns)
    units = (
        jnp.zeros((math.prod(taps), inputs, outputs, rows, columns), values.dtype).at[tap, source, output].set(values, mode='drop')
    )
    whole = units.swapaxes(-3, -2).reshape(*taps, inputs * rows, outputs * columns)
    return whole[..., : layout.shape[-2], : layout.shape[-1]]
