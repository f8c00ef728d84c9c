"""What one unit of selection is. Units are scored, pruned, redistributed and grown whole, and counted in units.

A granularity maps a layer's shape to its units' and back. Both kinds have the same four functions, and the last two axes of a leaf
are (input features or channels, output features or channels).
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.core import errors


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every weight is a unit of its own."""

    @property
    def sides(self) -> tuple[int, int]:
        """Inputs and outputs of a unit at one tap."""
        return 1, 1

    def __str__(self) -> str:
        return 'single weights'

    def unit_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array of units of a layer of that shape."""
        return tuple(shape)

    def collapse(self, x: jax.Array, initial, operation) -> jax.Array:
        """Each unit's weights reduced to one value."""
        del initial, operation
        return x

    def expand(self, units: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Each unit's value at all of its weights."""
        del shape
        return units

    def edges(self, shape: tuple[int, ...]) -> bool:
        """Whether some units are smaller than the others."""
        del shape
        return False


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Block:
    """Blocks of `rows` inputs by `columns` outputs.

    A matrix [in, out] is cut into blocks from its first row and column on; where a side does not divide, the last blocks are
    smaller (edge blocks) and units all the same. A convolution's kernel [height, width, in, out] has its blocks over (input
    channel, output channel), at each tap, or over all taps together with ``whole_kernel``. Where units differ in size (edge
    blocks; whole kernels of several sizes) the number of units is exact and that of weights follows from which units they are.

    Args:
      rows: input features of a block.
      columns: output features of a block.
      whole_kernel: whether a unit reaches over all axes before the last two.

    Example:
      >>> Block(4, 4).unit_shape((10, 8)), Block(4, 4).unit_shape((3, 3, 8, 8)), Block(4, 4, True).unit_shape((3, 3, 8, 8))
      ((3, 2), (3, 3, 2, 2), (2, 2))
    """

    rows: int
    columns: int
    whole_kernel: bool = False

    def __post_init__(self):
        for name in ('rows', 'columns'):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f'granularity: Block({self.rows}, {self.columns}) needs {name} to be an integer of at least 1.')

    @property
    def sides(self) -> tuple[int, int]:
        """Inputs and outputs of a unit at one tap."""
        return self.rows, self.columns

    def __str__(self) -> str:
        return f'blocks of {self.rows}x{self.columns}'

    def unit_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array of units of a layer of that shape; ValueError if the layer is smaller than a block."""
        if len(shape) < 2 or shape[-2] < self.rows or shape[-1] < self.columns:
            raise ValueError(
                f'granularity: a block of {self.rows}x{self.columns} (inputs x outputs) is larger than a leaf of shape '
                f'{tuple(shape)}. Take a smaller block, or keep that leaf dense (dense=, sparsity.dense).'
            )
        lead = () if self.whole_kernel else tuple(shape[:-2])
        return *lead, -(-shape[-2] // self.rows), -(-shape[-1] // self.columns)

    def collapse(self, x: jax.Array, initial, operation) -> jax.Array:
        """Each unit's weights reduced to one value by a lax operation with its initial value."""
        rows, columns = self.unit_shape(x.shape)[-2:]
        padding = [(0, 0, 0)] * (x.ndim - 2) + [
            (0, rows * self.rows - x.shape[-2], 0),
            (0, columns * self.columns - x.shape[-1], 0),
        ]
        initial = jnp.asarray(initial, x.dtype)
        x = lax.pad(x, initial, padding).reshape(*x.shape[:-2], rows, self.rows, columns, self.columns)
        lead = tuple(range(x.ndim - 4)) if self.whole_kernel else ()
        return lax.reduce(x, initial, operation, (*lead, x.ndim - 3, x.ndim - 1))

    def expand(self, units: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Each unit's value at all of its weights."""
        rows, columns = units.shape[-2:]
        lead = () if self.whole_kernel else units.shape[:-2]
        whole = jnp.broadcast_to(units[..., :, None, :, None], (*lead, rows, self.rows, columns, self.columns))
        whole = whole.reshape(*lead, rows * self.rows, columns * self.columns)[..., : shape[-2], : shape[-1]]
        return jnp.broadcast_to(whole, shape)

    def edges(self, shape: tuple[int, ...]) -> bool:
        """Whether some units are smaller than the others.

        >>> Block(4, 4).edges((10, 8)), Block(4, 4).edges((12, 8))
        (True, False)
        """
        return bool(shape[-2] % self.rows or shape[-1] % self.columns)


Granularity = Unstructured | Block


def unit_size(granularity: Granularity, shape: tuple[int, ...]) -> int:
    """Weights in the largest unit of a layer.

    >>> unit_size(Block(4, 4), (3, 3, 8, 8)), unit_size(Block(4, 4, True), (3, 3, 8, 8)), unit_size(Unstructured(), (8, 8))
    (16, 144, 1)
    """
    if isinstance(granularity, Unstructured):
        return 1
    return granularity.rows * granularity.columns * (math.prod(shape[:-2]) if granularity.whole_kernel else 1)


def tap_units(granularity: Granularity, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the array of a layer's units where each tap has its own, as kernels list them: [taps..., inputs, outputs].

    >>> tap_units(Block(4, 4, True), (3, 3, 10, 8)), tap_units(Unstructured(), (10, 8))
    ((3, 3, 3, 2), (10, 8))
    """
    rows, columns = granularity.sides
    return *shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)


def at_each_tap(granularity: Granularity) -> Granularity:
    """The same units, but one at each tap where they reach over all taps.

    >>> at_each_tap(Block(4, 4, whole_kernel=True))
    Block(rows=4, columns=4, whole_kernel=False)
    """
    return granularity if isinstance(granularity, Unstructured) else Block(granularity.rows, granularity.columns)


def active(granularity: Granularity, mask: jax.Array) -> jax.Array:
    """Which units have an active weight."""
    return granularity.collapse(mask, False, lax.bitwise_or)


def every(granularity: Granularity, condition: jax.Array) -> jax.Array:
    """Which units meet a condition with all of their weights."""
    return granularity.collapse(condition, True, lax.bitwise_and)


_TEXT = re.compile(r'block:(\d+)x(\d+)(:kernel)?')


def get(granularity: str | Granularity) -> Granularity:
    """The granularity that a config's text names, or the given one itself; ValueError where there is none.

    >>> get('unstructured'), get('block:64x64'), get('block:8x8:kernel')
    (Unstructured(), Block(rows=64, columns=64, whole_kernel=False), Block(rows=8, columns=8, whole_kernel=True))
    """
    if isinstance(granularity, Granularity):
        return granularity
    if granularity == 'unstructured':
        return Unstructured()
    if isinstance(granularity, str) and (match := _TEXT.fullmatch(granularity)):
        return Block(int(match[1]), int(match[2]), match[3] is not None)
    if isinstance(granularity, str) and granularity.startswith('block'):
        raise ValueError(
            f"granularity={granularity!r}: must be 'block:RxC' or 'block:RxC:kernel' with R inputs and C outputs, such as 'block:16x16'."
        )
    raise errors.unknown('granularity', granularity, ['unstructured', 'block:16x16', 'block:16x16:kernel'])


def encode(granularity: Granularity) -> tuple[int, int, int]:
    """The granularity as three integers: its kind and the two numbers of that kind.

    >>> encode(Unstructured()), encode(Block(8, 4)), encode(Block(8, 4, whole_kernel=True))
    ((0, 0, 0), (1, 8, 4), (2, 8, 4))
    """
    if isinstance(granularity, Unstructured):
        return 0, 0, 0
    return 2 if granularity.whole_kernel else 1, granularity.rows, granularity.columns


def decode(kind: int, first: int, second: int) -> Granularity:
    """The inverse of :func:`encode`.

    >>> decode(2, 8, 4)
    Block(rows=8, columns=4, whole_kernel=True)
    """
    return Unstructured() if kind == 0 else Block(first, second, whole_kernel=kind == 2)
