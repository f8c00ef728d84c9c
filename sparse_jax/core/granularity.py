"""What one unit of selection is. Units are scored, pruned, redistributed and grown whole, and counted in units.

A granularity maps a layer's shape to its units' and back. All kinds have the same functions, and the last two axes of a layer are (input
features or channels, output features or channels). Kinds of single weights may ask more of a mask: n of every m inputs, or the same
number of inputs for every output (:mod:`sparse_jax.core.choice` says how such masks are made and moved).
"""

import dataclasses
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.core import errors


class _SingleWeights:
    """Kinds whose units of selection are single weights."""

    of_single_weights = True

    @property
    def sides(self) -> tuple[int, int]:
        """Inputs and outputs of a unit at one tap."""
        return 1, 1

    def unit_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array of units of a layer of that shape."""
        return tuple(shape)

    def num_units(self, shape: tuple[int, ...]) -> int:
        """Units of budget of a layer of that shape."""
        return math.prod(self.unit_shape(shape))

    def selected_per_unit(self, shape: tuple[int, ...]) -> int:
        """Units of selection in a unit of budget."""
        del shape
        return 1

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
class Unstructured(_SingleWeights):
    """Every weight is a unit of its own."""

    def __str__(self) -> str:
        return 'single weights'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NOfM(_SingleWeights):
    """n of every m weights along the inputs exist: the input features of a matrix, a convolution's input channels at each tap.

    The density is n / m in every layer, so there is no distribution and no redistribution. A mask update prunes a layer's smallest
    weights, and each group regrows as many as it lost. Products are those of single weights.

    Args:
      n: weights of a group that exist.
      m: weights of a group.

    Example:
      >>> NOfM(2, 4).num_units((8, 3))
      24

    Reference:
      Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks from Scratch <https://arxiv.org/abs/2102.04010>`_, 2021.
    """

    n: int
    m: int

    def __post_init__(self):
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in (self.n, self.m)) or not 1 <= self.n < self.m:
            raise ValueError(f'granularity: NOfM({self.n}, {self.m}) needs integers with 1 <= n < m, such as NOfM(2, 4).')

    def __str__(self) -> str:
        return f'{self.n} of every {self.m} inputs'

    def unit_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array of units of a layer of that shape; ValueError if its inputs do not divide into groups."""
        inputs = shape[-2] if len(shape) > 1 else 0
        if not inputs or inputs % self.m:
            divisors = [m for m in range(2, min(inputs, 64) + 1) if inputs % m == 0]
            would = f'm of {", ".join(map(str, divisors))} would; else keep' if divisors else 'Keep'
            raise ValueError(
                f'granularity: groups of {self.m} inputs do not divide the {inputs} inputs of a leaf of shape {tuple(shape)}. {would} '
                'that leaf dense (dense=, sparsity.dense).'
            )
        return tuple(shape)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FanIn(_SingleWeights):
    """Every output of a layer has the same number of inputs.

    A unit of budget is one input for every output: a layer's nonzeros are a multiple of its outputs, the nearest to what the density
    and the distribution ask for. A mask update prunes as many of the layer's smallest weights as it has outputs, times the number of
    inputs to go; then each output keeps the largest of what it has left, and grows, until it has as many as every other. Counts of
    pruned and grown units are of inputs. Products are those of single weights.

    Example:
      >>> FanIn().num_units((3, 3, 8, 16)), FanIn().selected_per_unit((3, 3, 8, 16))
      (72, 16)

    Reference:
      Lasby et al., `Dynamic Sparse Training with Structured Sparsity <https://arxiv.org/abs/2305.02299>`_, 2024.
    """

    def __str__(self) -> str:
        return 'equal numbers of inputs'

    def unit_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array of units of a layer of that shape; ValueError for a layer without inputs."""
        if len(shape) < 2:
            raise ValueError(
                f"granularity: 'fan_in' needs leaves with inputs and outputs, but one has the shape {tuple(shape)}: keep it dense (dense=)."
            )
        return tuple(shape)

    def num_units(self, shape: tuple[int, ...]) -> int:
        """Units of budget of a layer of that shape: inputs of an output."""
        return math.prod(self.unit_shape(shape)[:-1])

    def selected_per_unit(self, shape: tuple[int, ...]) -> int:
        """Units of selection in a unit of budget: one for each output."""
        return shape[-1]


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
    of_single_weights: ClassVar[bool] = False

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

    def num_units(self, shape: tuple[int, ...]) -> int:
        """Units of budget of a layer of that shape."""
        return math.prod(self.unit_shape(shape))

    def selected_per_unit(self, shape: tuple[int, ...]) -> int:
        """Units of selection in a unit of budget."""
        del shape
        return 1

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


Granularity = Unstructured | Block | NOfM | FanIn


def unit_size(granularity: Granularity, shape: tuple[int, ...]) -> int:
    """Weights in the largest unit of selection of a layer.

    >>> unit_size(Block(4, 4), (3, 3, 8, 8)), unit_size(Block(4, 4, True), (3, 3, 8, 8)), unit_size(Unstructured(), (8, 8))
    (16, 144, 1)
    """
    if not isinstance(granularity, Block):
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
    return Block(granularity.rows, granularity.columns) if isinstance(granularity, Block) else granularity


def of_products(granularity: Granularity) -> Granularity:
    """The units that kernels multiply by: blocks, or single weights for all that is made of them.

    >>> of_products(NOfM(2, 4)), of_products(Block(4, 4))
    (Unstructured(), Block(rows=4, columns=4, whole_kernel=False))
    """
    return granularity if isinstance(granularity, Block) else Unstructured()


def active(granularity: Granularity, mask: jax.Array) -> jax.Array:
    """Which units have an active weight."""
    return granularity.collapse(mask, False, lax.bitwise_or)


def every(granularity: Granularity, condition: jax.Array) -> jax.Array:
    """Which units meet a condition with all of their weights."""
    return granularity.collapse(condition, True, lax.bitwise_and)


def departure(granularity: Granularity, mask: np.ndarray) -> str:
    """What is wrong with a mask of one layer, [taps..., inputs, outputs], whose units are single weights; empty where nothing is.

    >>> departure(NOfM(1, 2), np.array([[True], [True], [False], [True]]))
    'a group of 2 inputs has 2 weights, not 1'
    """
    if isinstance(granularity, NOfM):
        groups = mask.reshape(*mask.shape[:-2], -1, granularity.m, mask.shape[-1]).sum(-2)
        wrong = groups[groups != granularity.n]
        return f'a group of {granularity.m} inputs has {wrong[0]} weights, not {granularity.n}' if wrong.size else ''
    if isinstance(granularity, FanIn):
        counts = mask.reshape(-1, mask.shape[-1]).sum(0)
        numbers = np.unique(counts[counts > 0])  # outputs without inputs were ablated
        return f'outputs have from {numbers[0]} to {numbers[-1]} inputs' if len(numbers) > 1 else ''
    return ''


_BLOCKS = re.compile(r'block:(\d+)x(\d+)(:kernel)?')
_GROUPS = re.compile(r'n_of_m:(\d+):(\d+)')


def get(granularity: str | Granularity) -> Granularity:
    """The granularity that a config's text names, or the given one itself; ValueError where there is none.

    >>> get('unstructured'), get('block:64x64'), get('block:8x8:kernel')
    (Unstructured(), Block(rows=64, columns=64, whole_kernel=False), Block(rows=8, columns=8, whole_kernel=True))
    >>> get('n_of_m:2:4'), get('fan_in')
    (NOfM(n=2, m=4), FanIn())
    """
    if isinstance(granularity, Granularity):
        return granularity
    if granularity in ('unstructured', 'fan_in'):
        return Unstructured() if granularity == 'unstructured' else FanIn()
    if isinstance(granularity, str) and (match := _BLOCKS.fullmatch(granularity)):
        return Block(int(match[1]), int(match[2]), match[3] is not None)
    if isinstance(granularity, str) and (match := _GROUPS.fullmatch(granularity)):
        return NOfM(int(match[1]), int(match[2]))
    if isinstance(granularity, str) and granularity.startswith('block'):
        raise ValueError(
            f"granularity={granularity!r}: must be 'block:RxC' or 'block:RxC:kernel' with R inputs and C outputs, such as 'block:16x16'."
        )
    if isinstance(granularity, str) and granularity.startswith('n_of_m'):
        raise ValueError(f"granularity={granularity!r}: must be 'n_of_m:N:M', such as 'n_of_m:2:4' for 2 of every 4 inputs.")
    raise errors.unknown('granularity', granularity, ['unstructured', 'block:16x16', 'block:16x16:kernel', 'n_of_m:2:4', 'fan_in'])


def encode(granularity: Granularity) -> tuple[int, int, int]:
    """The granularity as three integers: its kind and the two numbers of that kind.

    >>> encode(Unstructured()), encode(Block(8, 4)), encode(Block(8, 4, whole_kernel=True)), encode(NOfM(2, 4)), encode(FanIn())
    ((0, 0, 0), (1, 8, 4), (2, 8, 4), (3, 2, 4), (4, 0, 0))
    """
    match granularity:
        case Unstructured():
            return 0, 0, 0
        case Block():
            return 2 if granularity.whole_kernel else 1, granularity.rows, granularity.columns
        case NOfM():
            return 3, granularity.n, granularity.m
        case FanIn():
            return 4, 0, 0


def decode(kind: int, first: int, second: int) -> Granularity:
    """The inverse of :func:`encode`.

    >>> decode(2, 8, 4)
    Block(rows=8, columns=4, whole_kernel=True)
    """
    if kind in (1, 2):
        return Block(first, second, whole_kernel=kind == 2)
    return NOfM(first, second) if kind == 3 else FanIn() if kind == 4 else Unstructured()
