"""Trees of values and of layouts: which leaves are compact, and what a leaf of another tree belongs to."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core import criteria
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.granularity import FanIn, NOfM
from sparse_jax.core.rule import Rule
from sparse_jax.kernels.layout import Layout, is_layout

CAPACITY_FACTOR = 1.25  # capacity of a leaf against the units that it has, where its budget may change


def bare(layout: Any) -> Any:
    """A tree of layouts without what products alone read beside the lists: probes, and lists by output."""
    strip = lambda x: dataclasses.replace(x, probe=None, by_output=None) if is_layout(x) else x
    return jax.tree.map(strip, layout, is_leaf=lambda x: x is None or is_layout(x))


class Compact(NamedTuple):
    """The compact leaves of a tree, in its order, and the paths of the others; paths are joined by /."""

    paths: list[str]
    layouts: list[Layout]
    dense: frozenset[str]

    @property
    def named(self) -> list[tuple[str, Layout]]:
        """Path and layout of each."""
        return list(zip(self.paths, self.layouts, strict=True))


def compact_leaves(layout: Any) -> Compact:
    """The compact leaves of a tree of layouts; ValueError where there is none."""
    rows = layers_lib.leaf_paths(layout, lambda x: x is None or is_layout(x))
    named = [(path, leaf) for path, leaf in rows if is_layout(leaf)]
    if not named:
        raise ValueError('layout has no compact leaf: give the second result of sj.compact.compress.')
    dense = frozenset(path for path, leaf in rows if not is_layout(leaf))
    return Compact([path for path, _ in named], [leaf for _, leaf in named], dense)


def is_stacked(layout: Layout) -> bool:
    """Whether a leaf holds layers along its first axis."""
    return np.ndim(layout.pointers) == 2


def per_row(function: Callable, layout: Layout) -> Callable:
    """A function of one layer's arrays as one of a leaf's."""
    return jax.vmap(function) if is_stacked(layout) else function


def factor_for(rule: Rule) -> float:
    """Capacity of leaves against the units that they have: room for more only where a rule may give a layer more."""
    return CAPACITY_FACTOR if rule.redistribute is not None or rule.is_global else 1.0


def capacity_for(units: int, most: int, factor: float) -> int:
    """Capacity of a leaf whose fullest layer has so many units: a number of four significant bits where there is to be more room.

    Few different capacities: few programs.

    >>> capacity_for(100, 1000, 1.25), capacity_for(103, 1000, 1.25), capacity_for(900, 1000, 1.25), capacity_for(9, 99, 1)
    (120, 128, 1000, 9)
    """
    wanted = math.floor(units * factor)
    step = 1 << max(0, wanted.bit_length() - 4)
    return max(1, units, min(most, wanted // step * step))


def owners(tree: Any, compact: Compact) -> list[int | None]:
    """For each leaf of a tree (values, a state of any optimizer, an average of values) the number of the compact leaf that it belongs to.

    It belongs to the one whose path its own ends in, and must then have the shape of its values: ``.../mu/fc1/kernel`` in the state of an
    optimizer belongs to ``fc1/kernel``.

    Raises:
      ValueError: for a leaf that looks like one of units and belongs to none, or has another shape.
    """
    by_path: dict[str, int | None] = dict.fromkeys(compact.dense) | {path: i for i, path in enumerate(compact.paths)}
    shapes = {layout.values_shape for layout in compact.layouts}
    found: list[int | None] = []
    for path, leaf in layers_lib.leaf_paths(tree):
        parts, shape = path.split('/'), tuple(np.shape(leaf))
        owner = next((name for name in ('/'.join(parts[i:]) for i in range(len(parts))) if name in by_path), '')
        number = by_path.get(owner)
        if number is not None and shape != compact.layouts[number].values_shape and math.prod(shape) > 1:
            raise ValueError(
                f'{path} has shape {shape}, and the values of {owner} have {compact.layouts[number].values_shape}: units can be moved in what '
                'has the values’ shapes, as the moments of optimizers that work element by element: see sj.compact.check.'
            )
        is_of_numbers = jnp.issubdtype(leaf.dtype, jnp.inexact) or shape in shapes
        if owner not in by_path and is_of_numbers and math.prod(shape) > 1:
            raise ValueError(
                f'{path} has shape {shape}, and its path ends with no leaf’s path: units can be moved in trees of the values’ names: see '
                'sj.compact.check.'
            )
        found.append(number if number is not None and shape == compact.layouts[number].values_shape else None)
    return found


def check_masks_of(rule: Rule, function: str) -> None:
    """Refuses a rule whose masks or values compact storage does not keep."""
    if isinstance(rule.granularity, NOfM | FanIn):
        raise ValueError(
            f'{function}: granularity: compact storage keeps single weights or blocks, not {rule.granularity}: train it by sj.sparsify.'
        )
    if rule.matrix_axes is not None:
        raise ValueError(
            f'{function}: matrix_axes: compact leaves are [taps..., inputs, outputs]: reshape the params, or train them by sj.sparsify.'
        )
    if rule.grow is criteria.magnitude:
        raise ValueError(
            f"{function}: grow='magnitude' reads the values of missing weights, which compact storage has not: train it by sj.sparsify."
        )
    if rule.enters_with != 'zero':
        raise ValueError(
            f'{function}: enters_with={rule.enters_with!r} needs the values of missing weights: train it by sj.sparsify.'
        )
