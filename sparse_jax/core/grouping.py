"""Groups of leaves that a mask update works through in turn: what keeps its memory small, and its compilation short, on one CPU device.

Three tricks, of which elsewhere none is used. Leaves are read and selected from a few million weights at a time, so that keys stay in
the cache and nothing is held for all of them. Small leaves of one shape are bundled as one leaf with all their rows, so that they share
one piece of the program. And each group is computed in the branch of a condition, so that XLA finishes one before it begins the next.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.core import numerics
from sparse_jax.core.layers import Layer

# Keys of so many weights stay in a CPU's cache; and there are no more groups than this, as each is compiled.
GROUP_WEIGHTS = 2**22
MOST_GROUPS = 16

# Leaves of one shape and type share one piece of the program where each has at most so many weights: it costs a copy.
BUNDLE_WEIGHTS = 2**18


class Group(NamedTuple):
    """Some leaves next to each other, and how they are bundled; static.

    Vectors over the group's layers have them in the order of the leaves. Lists over its bundles have one array ``[rows, ...]`` for each.
    """

    leaves: list[Layer]
    members: list[int]  # the leaves' numbers among all sparse leaves
    bundles: list[list[int]]  # numbers of leaves within the group
    layers: list[Layer]  # each bundle as one leaf with the rows of all its leaves
    order: np.ndarray  # of the group's layers, as the bundles' rows have them
    inverse: np.ndarray  # its inverse
    in_turn: bool  # whether it is one of several groups, and none is to be loaded before the one before it is done with

    @property
    def num_layers(self) -> int:
        """How many layers its leaves hold."""
        return self.leaves[-1].stop - self.leaves[0].start

    def leaves_of(self, all_leaves: Sequence[Any]) -> list[Any]:
        """The entries of a list over all sparse leaves that belong to this group."""
        return [all_leaves[i] for i in self.members]

    def layers_of(self, all_layers: jax.Array) -> jax.Array:
        """The entries of a vector over all layers that belong to this group."""
        return all_layers[self.leaves[0].start : self.leaves[-1].stop]

    def bundle(self, leaves: Sequence[Any]) -> list[Any]:
        """Arrays ``[rows, ...]`` (or trees of them) of each leaf as arrays of each bundle."""
        return [
            leaves[b[0]] if len(b) == 1 else jax.tree.map(lambda *rows: jnp.concatenate(rows), *(leaves[i] for i in b))
            for b in self.bundles
        ]

    def unbundle(self, bundled: Sequence[jax.Array]) -> list[jax.Array]:
        """The inverse of :meth:`bundle`."""
        leaves = {}
        for b, rows in zip(self.bundles, bundled, strict=True):
            start = 0
            for i in b:
                depth = self.leaves[i].depth or 1
                leaves[i] = rows if len(b) == 1 else rows[start : start + depth]
                start += depth
        return [leaves[i] for i in range(len(self.leaves))]

    def split(self, per_layer: jax.Array) -> list[jax.Array]:
        """The entries of a vector over the group's layers that belong to each bundle's rows."""
        parts, start = [], 0
        for layer in self.layers:
            parts.append(per_layer[self.order[start : start + (layer.depth or 1)]])
            start += layer.depth or 1
        return parts

    def join(self, per_bundle: Sequence[jax.Array]) -> jax.Array:
        """The inverse of :meth:`split`."""
        return jnp.concatenate(per_bundle)[self.inverse]

    def run(self, t: jax.Array, function: Callable, otherwise: Callable, operands: Any, arguments: Any) -> Any:
        """``function(operands, arguments)``, where groups go in turn as a computation of its own.

        XLA on CPU orders operations for concurrency: it would compute what is read of all groups before it selects from the
        first, and hold all of it. The branch of a condition is one operation to it. The condition is always true.
        """
        if not self.in_turn:
            return function(operands, arguments)
        return lax.cond(t > 0, function, otherwise, operands, arguments)


def divide(layers: list[Layer], *, in_turn: bool) -> list[Group]:
    """The sparse leaves as groups to be worked through in turn, or as one group."""
    members = _members(layers) if in_turn else [list(range(len(layers)))]
    return [_group(layers, m, in_turn) for m in members]


def _group(layers: list[Layer], members: list[int], in_turn: bool) -> Group:
    leaves = [layers[i] for i in members]
    bundles = _bundles(leaves)
    first = leaves[0].start
    rows = [np.arange(leaves[i].start - first, leaves[i].stop - first) for b in bundles for i in b]
    bundled = [leaves[b[0]] if len(b) == 1 else _together([leaves[i] for i in b]) for b in bundles]
    order = np.concatenate(rows)
    return Group(leaves, members, bundles, bundled, order, np.argsort(order), in_turn)


def _members(layers: list[Layer]) -> list[list[int]]:
    """Leaves that are next to each other and have few weights together, or one that has many."""
    sizes = [math.prod(layer.shape) * (layer.depth or 1) for layer in layers]
    limit = max(GROUP_WEIGHTS, sum(sizes) // MOST_GROUPS)
    groups, filled = [[]], 0
    for i, size in enumerate(sizes):
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += size
    return groups


def _bundles(leaves: list[Layer]) -> list[list[int]]:
    """Which leaves are computed as one with more rows; on one CPU device, as a leaf that is sharded is not moved."""
    bundles: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        small = math.prod(leaf.shape) <= BUNDLE_WEIGHTS and numerics.one_cpu_device()
        bundles.setdefault((leaf.shape, leaf.dtype) if small else i, []).append(i)
    return list(bundles.values())


def _together(leaves: list[Layer]) -> Layer:
    return leaves[0]._replace(depth=sum(leaf.depth or 1 for leaf in leaves), axes=None)
