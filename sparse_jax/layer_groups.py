"""What a mask update reads and computes of the sparse leaves, a group of them at a time."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax import _exact, _reduce, criteria, selection
from sparse_jax import granularity as granularity_lib
from sparse_jax.masks import Layer


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
    momentum: jax.Array
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


class Group:
    """Some leaves, and what is computed of them.

    ``in_turn``: that this is one of several groups, and none is to be loaded before the one before it is done with.
    """

    def __init__(self, rule: Rule, layers: list[Layer], load: Load, members: list[int], keys: jax.Array, in_turn: bool):
        self.rule, self.load, self.members = rule, load, members
        self.layers = [layers[i] for i in members]
        self.keys = keys[self.layers[0].start : self.layers[-1].stop]
        self.in_turn = in_turn
        self.num_layers = self.layers[-1].stop - self.layers[0].start

    def of(self, leaves):
        return [leaves[i] for i in self.members]

    def pick(self, per_layer):
        return per_layer[self.layers[0].start : self.layers[-1].stop]

    def rows(self, per_layer):
        """The entries of a vector over the group's layers that belong to each leaf."""
        first = self.layers[0].start
        return [per_layer[layer.start - first : layer.stop - first] for layer in self.layers]

    def run(self, t, function, otherwise, operands, own):
        """function(operands, own), in turn: as a computation of its own.

        XLA on CPU orders operations for concurrency: it would compute what is read of all groups before it selects from the
        first, and hold all of it. The branch of a condition is one operation to it. The condition is always true.
        """
        if not self.in_turn:
            return function(operands, own)
        return lax.cond(t > 0, function, otherwise, operands, own)

    def leaves(self, operands, masks) -> list[Operands]:
        return [
            jax.tree.map(lambda x, layer=layer: _as_rows(layer, x), leaf)
            for layer, leaf in zip(self.layers, self.load(operands, masks, self.members), strict=True)
        ]

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
            columns.append([jax.vmap(_reduce.count)(x) for x in (active, active & may_move, may_move)])
        nonzeros, prunable, movable = (jnp.concatenate(column) for column in zip(*columns, strict=True))
        sizes = jnp.asarray(unit_counts(self.rule.granularity, self.layers), jnp.int32)
        counts = Counts(nonzeros, sizes - nonzeros, prunable, movable - prunable)
        if self.rule.redistribute is None or self.rule.after_pruning:
            shares = jnp.zeros(self.num_layers, jnp.float32)
        else:
            shares = self.shares(leaves, jnp.zeros(self.num_layers, jnp.int32))
        return finite, counts, shares

    def nothing_measured(self, operands, masks):
        zeros = jnp.zeros(self.num_layers, jnp.int32)
        finite = [_as_rows(layer, mask) for layer, mask in zip(self.layers, masks, strict=True)]
        return finite, Counts(zeros, zeros, zeros, zeros), jnp.zeros(self.num_layers, jnp.float32)

    def shares(self, leaves, amounts):
        values = []
        for layer, leaf, keys, amount in zip(self.layers, leaves, self.rows(self.keys), self.rows(amounts), strict=True):
            value = self.evaluate(layer, self.rule.redistribute, leaf, keys, amount)
            _check_shape('redistribute', value, (len(leaf.mask),), layer)
            values.append(value.astype(jnp.float32))
        return jnp.concatenate(values)

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
            return jnp.asarray(criterion(info))

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
        where = [self.units(granularity_lib.active, leaf.mask) & m for leaf, m in zip(leaves, self.may_move(finite), strict=True)]
        return [selection.keys(s, w, smallest=True) for s, w in zip(scores, where, strict=True)]

    def select(self, operands, own):
        """New masks and newly grown positions, and how many units are new in each layer."""
        masks, _, finite, pruned, targets = own
        leaves, may_move = self.leaves(operands, masks), self.may_move(finite)
        active = [self.units(granularity_lib.active, leaf.mask) for leaf in leaves]
        scores = self.prune_scores(leaves, pruned)
        keys = [selection.keys(s, a & m, smallest=True) for s, a, m in zip(scores, active, may_move, strict=True)]
        after = [a & ~removed for a, removed in zip(active, selection.select(keys, pruned), strict=True)]
        if self.rule.grow is not None:
            pruned_leaves = [
                leaf._replace(mask=self.expand(layer, a)) for layer, leaf, a in zip(self.layers, leaves, after, strict=True)
            ]
            scores = self.scores('grow', self.rule.grow, pruned_leaves, self.keys, targets)
            keys = [selection.keys(s, ~a & m) for s, a, m in zip(scores, after, may_move, strict=True)]
            after = [a | chosen for a, chosen in zip(after, selection.select(keys, targets), strict=True)]
        new = jnp.concatenate([jax.vmap(_reduce.count)(now & ~old) for now, old in zip(after, active, strict=True)])
        new_masks, grown = [], []
        for layer, mask, now in zip(self.layers, masks, after, strict=True):
            now = self.expand(layer, now)
            now = now[0] if layer.depth is None else now
            # Written so that the old mask's buffer can become the new mask's: `grown` reads it first.
            grown.append(now & ~mask)
            new_masks.append((mask & now) | grown[-1])
        return new_masks, grown, new

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
    return _exact.mean_magnitude(
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
