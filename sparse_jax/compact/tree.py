"""Trees of values and of layouts: which leaves are compact, and what a leaf of another tree belongs to."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.kernels.layout import Layout, is_layout

ROOM = 1.25  # capacity of a leaf against the units that it has, where its budget may change


class Compact(NamedTuple):
    """The compact leaves of a tree: their paths, joined by /, and their layouts, both in the tree's order."""

    paths: list[str]
    layouts: list[Layout]


def compact_leaves(layout: Any) -> Compact:
    """The compact leaves of a tree of layouts; ValueError where there is none."""
    rows = [(path, leaf) for path, leaf in layers_lib.leaf_paths(layout, is_layout) if is_layout(leaf)]
    if not rows:
        raise ValueError('layout has no compact leaf: give the second result of sj.compact.compress.')
    return Compact(*map(list, zip(*rows, strict=True)))


def is_stacked(layout: Layout) -> bool:
    """Whether a leaf holds layers along its first axis."""
    return np.ndim(layout.pointers) == 2


def per_row(function: Callable, layout: Layout) -> Callable:
    """A function of one layer's arrays as one of a leaf's."""
    return jax.vmap(function) if is_stacked(layout) else function


def most_units(layout: Layout) -> int:
    """Units of one layer that there can be, counted at each tap."""
    return math.prod(granularity_lib.tap_units(layout.granularity, layout.shape))


def capacity_for(units: int, most: int, room: float) -> int:
    """Capacity of a leaf whose fullest layer has so many units.

    >>> capacity_for(100, 1000, 1.25), capacity_for(900, 1000, 1.25), capacity_for(1, 9, 1.25)
    (125, 1000, 1)
    """
    return max(1, min(most, math.floor(units * room)))


def owners(tree: Any, compact: Compact) -> list[int | None]:
    """For each leaf of a tree (values, a state of any optimizer, an average of values) the number of the compact leaf that it belongs to.

    It belongs to the one whose path its own ends in, and must then have the shape of its values: ``.../mu/fc1/kernel`` in the state of an
    optimizer belongs to ``fc1/kernel``.

    Raises:
      ValueError: for a leaf that looks like one of units and belongs to none, or has another shape.
    """
    by_path = {path: i for i, path in enumerate(compact.paths)}
    shapes = {layout.values_shape for layout in compact.layouts}
    found: list[int | None] = []
    for path, leaf in layers_lib.leaf_paths(tree):
        parts, shape = path.split('/'), tuple(np.shape(leaf))
        candidates = (by_path.get('/'.join(parts[start:])) for start in range(len(parts)))
        number = next((i for i in candidates if i is not None), by_path.get('') if len(by_path) == 1 else None)
        if number is not None and shape == compact.layouts[number].values_shape:
            found.append(number)
        elif math.prod(shape) <= 1:
            found.append(None)
        elif number is not None or shape in shapes:
            which = (
                f'{compact.paths[number]}, whose values have {compact.layouts[number].values_shape}'
                if number is not None
                else 'no leaf'
            )
            raise ValueError(
                f'{path}: an array of shape {shape} belongs to {which}: units can be moved in what has the values’ tree and shapes, as the '
                'moments of optimizers that work element by element: see sj.compact.check.'
            )
        else:
            found.append(None)
    return found
