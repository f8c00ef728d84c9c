"""What a mask update reads and computes of the sparse leaves, a group of them at a time."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.core import criteria, numerics, selection
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core.masks import Layer


class Rule(NamedTuple):
    """What an update does; static."""

    prune: criteria.Criterion
    grow: criteria.Criterion | None  # None: nothing is grown, and what is pruned follows the density's schedule
    redistribute: criteria.Criterion | None
    prune_rate: Any  # schedule of the step
    globally: bool  # one threshold over all layers decides what is pruned
    granularity: granularity_lib.Granularity
    update_every: int
    budgets: np.ndarray | None  # units in all after each update, where the density follows a schedule
    final: tuple[int, ...]  # units that each layer has at the schedule's end

    @property
    def after_pruning(self) -> bool:
        """Whether shares depend on how many units each layer prunes."""
        return criteria.requirements(self.redistribute)['amount']


class Operands(NamedTuple):
    """What an update reads of one leaf, [depth, ...] with the layers of a stacked leaf first."""

    weight: jax.Array
    mask: jax.Array
    gradient: jax.Array
    momentum: Any
    ever_active: Any
    accumulated_gradient: Any


class Counts(NamedTuple):
    """Units of each layer, int32[layers]."""

    nonzeros: jax.Array
    missing: jax.Array
    prunable: jax.Array
    room: jax.Array  # missing ones that may be grown


Load = Callable[[Any, list[jax.Array], list[int]], list[Operands]]  # (operands, masks, which leaves)


# Keys of so many weights stay in a CPU's cache; and there are no more groups than this, as each is compiled.
GROUP_WEIGHTS = 2**22
MOST_GROUPS = 16


def groups(layers: list[Layer]) -> list[list[int]]:
    """Leaves that are next to each other and have few weights together, or one that has many."""
    sizes = [math.prod(layer.shape) * (layer.depth or 1) for layer in layers]
    limit = max(GROUP_WEIGHTS, sum(sizes) // MOST_GROUPS)
    found, filled = [[]], 0
    for i, size in enumerate(sizes):
        if found[-1] and filled + size > limit:
            found.append([])
            filled = 0
        found[-1].append(i)
        filled += size
    return found


# Leaves of one shape and type share one piece of the program where each has at most so many weights: it costs a copy.
BUNDLE_WEIGHTS = 2**18


def _bundles(layers: list[Layer]) -> list[list[int]]:
    """Which leaves are computed as one with more rows; on one CPU device, as a leaf that is sharded is not moved."""
    bundles: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        small = math.prod(layer.shape) <= BUNDLE_WEIGHTS and numerics.one_cpu_device()
        bundles.setdefault((layer.shape, layer.dtype) if small else i, []).append(i)
    return list(bundles.values())


class Group:
    """Some leaves, and what is computed of them: a bundle of small leaves of one shape as one leaf with all their rows.

    ``in_turn``: that this is one of several groups, and none is to be loaded before the one before it is done with.
    """

    def __init__(self, rule: Rule, layers: list[Layer], load: Load, members: list[int], keys: jax.Array, in_turn: bool):
        self.rule, self.load, self.members, self.in_turn = rule, load, members, in_turn
        self.own = [layers[i] for i in members]
        self.bundles = _bundles(self.own)
        self.layers = [self.own[b[0]] if len(b) == 1 else self._together([self.own[i] for i in b]) for b in self.bundles]
        self.keys = self.pick(keys)
        self.num_layers = self.own[-1].stop - self.own[0].start
        first = self.own[0].start
        rows = [np.arange(self.own[i].start - first, self.own[i].stop - first) for b in self.bundles for i in b]
        self.order = np.concatenate(rows)  # of the layers, as the bundles' rows have them
        self.inverse = np.argsort(self.order)

    @staticmethod
    def _together(layers: list[Layer]) -> Layer:
        return layers[0]._replace(depth=sum(layer.depth or 1 for layer in layers))

    def bundle(self, leaves):
        """Arrays [depth, ...] of each leaf as arrays of each bundle."""
        return [
            leaves[b[0]] if len(b) == 1 else jax.tree.map(lambda *rows: jnp.concatenate(rows), *(leaves[i] for i in b))
            for b in self.bundles
        ]

    def unbundle(self, bundles):
        """The reverse."""
        leaves = {}
        for b, rows in zip(self.bundles, bundles, strict=True):
            start = 0
            for i in b:
                depth = self.own[i].depth or 1
                leaves[i] = rows if len(b) == 1 else rows[start : start + depth]
                start += depth
        return [leaves[i] for i in range(len(self.own))]

    def in_layer_order(self, values):
        """One vector over the group's layers from a vector for each bundle."""
        return jnp.concatenate(values)[self.inverse]

    def of(self, leaves):
        return [leaves[i] for i in self.members]

    def pick(self, per_layer):
        return per_layer[self.own[0].start : self.own[-1].stop]

    def rows(self, per_layer):
        """The entries of a vector over the group's layers that belong to each bundle."""
        parts, start = [], 0
        for layer in self.layers:
            parts.append(per_layer[self.order[start : start + (layer.depth or 1)]])
            start += layer.depth or 1
        return parts

    def run(self, t, function, otherwise, operands, own):
        """function(operands, own), in turn: as a computation of its own.

        XLA on CPU orders operations for concurrency: it would compute what is read of all groups before it selects from the
        first, and hold all of it. The branch of a condition is one operation to it. The condition is always true.
        """
        if not self.in_turn:
            return function(operands, own)
        return lax.cond(t > 0, function, otherwise, operands, own)

    def leaves(self, operands, masks) -> list[Operands]:
        return self.bundle(
            [
                jax.tree.map(lambda x, layer=layer: _as_rows(layer, x), leaf)
                for layer, leaf in zip(self.own, self.load(operands, masks, self.members), strict=True)
            ]
        )

    def units(self, function, x):
        return jax.vmap(lambda row: function(self.rule.granularity, row))(x)

    def may_move(self, finite):
        return [self.units(granularity_lib.every, f) for f in finite]

    def measure(self, operands, masks):
        """Which weights are finite, the counts, and the shares."""
        leaves = self.leaves(operands, masks)
        # Behind a barrier, so that it is decided once: computed again elsewhere a weight might be rounded otherwise.
        finite = [lax.optimization_barrier(jnp.isfinite(leaf.weight)) for leaf in leaves]
        columns = []
        for leaf, may_move in zip(leaves, self.may_move(finite), strict=True):
            active = self.units(granularity_lib.active, leaf.mask)
            columns.append([jax.vmap(numerics.count)(x) for x in (active, active & may_move, may_move)])
        nonzeros, prunable, movable = (self.in_layer_order(column) for column in zip(*columns, strict=True))
        sizes = jnp.asarray(unit_counts(self.rule.granularity, self.own), jnp.int32)
        counts = Counts(nonzeros, sizes - nonzeros, prunable, movable - prunable)
        if self.rule.redistribute is None or self.rule.after_pruning:
            shares = jnp.zeros(self.num_layers, jnp.float32)
        else:
            shares = self.shares(leaves, jnp.zeros(self.num_layers, jnp.int32))
        return self.unbundle(finite), counts, shares

    def nothing_measured(self, operands, masks):
        zeros = jnp.zeros(self.num_layers, jnp.int32)
        finite = [_as_rows(layer, mask) for layer, mask in zip(self.own, masks, strict=True)]
        return finite, Counts(zeros, zeros, zeros, zeros), jnp.zeros(self.num_layers, jnp.float32)

    def shares(self, leaves, amounts):
        values = []
        for layer, leaf, keys, amount in zip(self.layers, leaves, self.rows(self.keys), self.rows(amounts), strict=True):
            value = self.evaluate(layer, self.rule.redistribute, leaf, keys, amount)
            _check_shape('redistribute', value, (len(leaf.mask),), layer)
            values.append(value.astype(jnp.float32))
        return self.in_layer_order(values)

    def share(self, operands, own):
        masks, pruned = own
        return self.shares(self.leaves(operands, masks), pruned)

    def no_share(self, operands, own):
        return jnp.zeros(self.num_layers, jnp.float32)

    def evaluate(self, layer, criterion, leaf, keys, amounts):
        """A criterion of each row of a leaf."""

        def one(leaf, key, amount):
            weight, mask, gradient, momentum, *kept = leaf
            info = criteria.LeafInfo(weight, mask, gradient, momentum, key, amount, self.rule.granularity, *kept)
            value = criterion(info)
            if value is None:
                raise ValueError(f'the criterion {criterion} returned None, not scores: does it return anything?')
            return jnp.asarray(value)

        if layer.depth is None:  # not by vmap: a criterion sees what it would see alone
            return one(jax.tree.map(lambda x: x[0], leaf), keys[0], amounts[0])[None]
        return jax.vmap(one)(leaf, keys, amounts)

    def scores(self, setting, criterion, leaves, keys, amounts):
        """A score for each unit of each leaf, [depth, ...]."""
        result = []
        for layer, leaf, key, amount in zip(self.layers, leaves, self.rows(keys), self.rows(amounts), strict=True):
            scores = self.evaluate(layer, criterion, leaf, key, amount)
            _check_shape(setting, scores, leaf.mask.shape, layer)
            result.append(jax.vmap(lambda row: unit_scores(self.rule.granularity, row))(scores))
        return result

    def prune_scores(self, leaves, amounts):
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(self.keys)
        return self.scores('prune', self.rule.prune, leaves, keys, amounts)

    def joint_keys(self, operands, masks, finite):
        """Pruning keys that compare across leaves."""
        leaves = self.leaves(operands, masks)
        scores = self.prune_scores(leaves, jnp.zeros(self.num_layers, jnp.int32))
        if len({s.dtype for s in scores}) > 1:
            scores = [s.astype(jnp.float32) for s in scores]
        where = [
            self.units(granularity_lib.active, leaf.mask) & m
            for leaf, m in zip(leaves, self.may_move(self.bundle(finite)), strict=True)
        ]
        keys = [selection.keys(s, w, smallest=True) for s, w in zip(scores, where, strict=True)]
        return self.unbundle(keys)

    def select(self, operands, own):
        """New masks and newly grown positions, and how many positions changed in each layer."""
        masks, _, finite, pruned, targets = own
        leaves, may_move = self.leaves(operands, masks), self.may_move(self.bundle(finite))
        active = [self.units(granularity_lib.active, leaf.mask) for leaf in leaves]
        scores = self.prune_scores(leaves, pruned)
        keys = [selection.keys(s, a & m, smallest=True) for s, a, m in zip(scores, active, may_move, strict=True)]
        after = [a & ~removed for a, removed in zip(active, selection.select(keys, pruned[self.order]), strict=True)]
        if self.rule.grow is not None:
            pruned_leaves = [
                leaf._replace(mask=self.expand(layer, a)) for layer, leaf, a in zip(self.layers, leaves, after, strict=True)
            ]
            scores = self.scores('grow', self.rule.grow, pruned_leaves, self.keys, targets)
            keys = [selection.keys(s, ~a & m) for s, a, m in zip(scores, after, may_move, strict=True)]
            after = [a | chosen for a, chosen in zip(after, selection.select(keys, targets[self.order]), strict=True)]
        new = self.in_layer_order([jax.vmap(numerics.count)(now & ~old) for now, old in zip(after, active, strict=True)])
        # n - pruned + targets = n - removed + new, so as many units as pruned - targets + new are now empty
        flipped = 2 * new + pruned - targets
        new_masks, grown, changed = [], [], []
        expanded = self.unbundle([self.expand(layer, now) for layer, now in zip(self.layers, after, strict=True)])
        for layer, mask, now in zip(self.own, masks, expanded, strict=True):
            now = now[0] if layer.depth is None else now
            if not isinstance(self.rule.granularity, granularity_lib.Unstructured):  # weights, not units
                changed.append(jax.vmap(numerics.count)(_as_rows(layer, now ^ mask)))
            # Written so that the old mask's buffer can become the new mask's: `grown` reads it first.
            grown.append(now & ~mask)
            new_masks.append((mask & now) | grown[-1])
        return new_masks, grown, jnp.concatenate(changed) if changed else flipped

    def as_before(self, operands, own):
        masks, grown, *_ = own
        return masks, grown, jnp.zeros(self.num_layers, jnp.int32)

    def expand(self, layer, units):
        return jax.vmap(lambda row: self.rule.granularity.expand(row, layer.shape))(units)


def _as_rows(layer: Layer, x: jax.Array) -> jax.Array:
    return x[None] if layer.depth is None else x


def unit_scores(granularity: granularity_lib.Granularity, scores: jax.Array) -> jax.Array:
    """Each unit's score: the mean of its weights' scores, exact (scores that are not finite count as 0)."""
    if isinstance(granularity, granularity_lib.Unstructured):
        return scores
    return numerics.mean_magnitude(
        scores,
        jnp.ones(scores.shape, bool),
        granularity.collapse,
        lambda units: granularity.expand(units, scores.shape),
        granularity_lib.unit_size(granularity, scores.shape),
    )


def _check_shape(setting: str, value, shape: tuple[int, ...], layer: Layer) -> None:
    if jnp.shape(value) != shape:
        want, got = shape[1:], jnp.shape(value)[1:]
        what = 'one number' if setting == 'redistribute' else f"scores of the layer's shape {want}"
        raise ValueError(f'{setting}: the criterion must return {what}, but for {layer.name!r} it returned the shape {got}.')


def unit_counts(granularity: granularity_lib.Granularity, layers: list[Layer]) -> list[int]:
    """Units of each layer."""
    return [math.prod(granularity.unit_shape(layer.shape)) for layer in layers for _ in range(layer.depth or 1)]
