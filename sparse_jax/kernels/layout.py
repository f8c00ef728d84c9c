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
class ByOutput:
    """The units of a layout by input once more, by output: for kernels that walk both ways. Where layers are stacked, with a first axis.

    Attributes:
      indices: int32[capacity]: input * taps + tap of each unit of output 0, then of output 1, ..., ascending.
      pointers: int32[outputs + 1]: the units of output o are those from pointers[o] to pointers[o + 1].
      numbers: int32[capacity]: which of the values each of them is.
    """

    indices: jax.Array
    pointers: jax.Array
    numbers: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Which units of a weight exist, in the order of its values: by output, of each output's by input and then by tap; or by input.

    Where layers are stacked, each array has a first axis.

    Attributes:
      indices: int32[capacity]: input * taps + tap of each unit of output 0, then of output 1, ..., ascending; what is beyond the last
        pointer is not used. Inputs and outputs are those of the array of units. By input: output * taps + tap of each unit of input 0, ...
      pointers: int32[outputs + 1]: the units of output o are those from pointers[o] to pointers[o + 1]. By input: int32[inputs + 1].
      shape: shape of the weight: [in, out], or [height, width, in, out].
      granularity: what a unit is; one that spans all taps is listed at each of them.
      implementation: the backend that multiplies; None: by rule.
      name: name of the layer, for messages.
      by_input: whether units are listed by input, as training takes them: the order in which a dense weight lies in memory. Frozen weights
        are listed by output.
      probe: zeros whose gradient is the score of each unit: see :func:`sparse_jax.compact.with_probes`; None: there is none.
      by_output: the same units by output, for kernels that need both: see :func:`sparse_jax.compact.prepare`; None: they make it at each call.
    """

    indices: jax.Array | np.ndarray
    pointers: jax.Array | np.ndarray
    shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    granularity: Granularity = dataclasses.field(default=Unstructured(), metadata=dict(static=True))
    implementation: str | None = dataclasses.field(default=None, metadata=dict(static=True))
    name: str = dataclasses.field(default='', metadata=dict(static=True))
    by_input: bool = dataclasses.field(default=False, metadata=dict(static=True))
    probe: jax.Array | None = None
    by_output: ByOutput | None = None

    @property
    def capacity(self) -> int:
        """Number of units there is room for."""
        return self.indices.shape[-1]

    @property
    def units(self) -> tuple[int, ...]:
        """Shape of one layer's array of units: [taps..., inputs, outputs]; that of its probe."""
        return granularity_lib.tap_units(self.granularity, self.shape)

    @property
    def taps(self) -> tuple[int, int]:
        """Height and width of a convolution's kernel; of a matrix one and one."""
        return self.shape[:-2] or (1, 1)  # pyright: ignore[reportReturnType]

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the values: [units], or [units, inputs, outputs of a block]; after the number of layers where they are stacked."""
        sides = () if isinstance(self.granularity, Unstructured) else self.granularity.sides
        return (*self.indices.shape, *sides)

    def places(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The tap, input and output of each unit, int32[capacity]; of those that are not used one of the last two lies beyond the weight."""
        *taps, _, _ = self.units
        number = jnp.arange(self.capacity, dtype=jnp.int32)
        group = jnp.searchsorted(self.pointers, number, side='right').astype(jnp.int32) - 1
        other, tap = jnp.divmod(jnp.asarray(self.indices), jnp.int32(math.prod(taps)))
        return (tap, group, other) if self.by_input else (tap, other, group)


def is_layout(x: object) -> bool:
    """Whether a part of a tree is a layout: for ``is_leaf``."""
    return isinstance(x, Layout)


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
            return expand(self.values, self.layout)
        return jax.vmap(expand)(self.values, self.layout)


def is_compact(x: object) -> bool:
    """Whether a part of a tree is a compact weight: for ``is_leaf``."""
    return isinstance(x, CompactWeight)


@jax.jit
def weights(layout: Layout) -> jax.Array:
    """How many weights there are in the units of each layer, int32; blocks at the edge have fewer."""
    if jnp.ndim(layout.pointers) == 2:
        return jax.vmap(weights)(layout)
    (rows, columns), (*_, inputs, outputs) = layout.granularity.sides, layout.shape
    _, source, output = layout.places()
    sides = jnp.minimum(rows, inputs - rows * source) * jnp.minimum(columns, outputs - columns * output)
    return jnp.sum(jnp.where(jnp.arange(layout.capacity) < layout.pointers[-1], sides, 0), dtype=jnp.int32)


def expand(values: jax.Array | np.ndarray, layout: Layout) -> jax.Array:
    """The whole weight of one layer, zero where no unit exists, in plain XLA."""
    *taps, inputs, outputs = layout.units
    rows, columns = layout.granularity.sides
    tap, source, output = layout.places()
    values = jnp.asarray(values).reshape(-1, rows, columns)
    units = (
        jnp.zeros((math.prod(taps), inputs, outputs, rows, columns), values.dtype).at[tap, source, output].set(values, mode='drop')
    )
    whole = units.swapaxes(-3, -2).reshape(*taps, inputs * rows, outputs * columns)
    return whole[..., : layout.shape[-2], : layout.shape[-1]]


def gather(whole: jax.Array, layout: Layout) -> jax.Array:
    """The values of one layer at its units, zero beyond the weight's edge and beyond the last unit: the inverse of :func:`expand`."""
    *taps, inputs, outputs = layout.units
    rows, columns = layout.granularity.sides
    tap, source, output = layout.places()
    padded = jnp.pad(
        whole.reshape(math.prod(taps), *whole.shape[-2:]),
        [(0, 0), (0, inputs * rows - whole.shape[-2]), (0, outputs * columns - whole.shape[-1])],
    )
    units = padded.reshape(-1, inputs, rows, outputs, columns).swapaxes(-3, -2)
    values = units.at[tap, source, output].get(mode='fill', fill_value=0)
    return values.reshape(layout.values_shape)
