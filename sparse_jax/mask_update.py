"""One mask update: how many units each layer prunes and grows, and which. Called by ``sparsify`` inside ``lax.cond``.

First everything that is counted: nonzeros, shares, how many each layer prunes and grows. None of it needs a selection: what is
pruned was active and may be grown again, so the room for growth is known beforehand. Then the selections, which need nothing but
their own leaf: group by group on one CPU device, all in one loop elsewhere (accelerators; several devices, where a leaf may be
sharded and one loop needs one small reduction a round).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax import _exact, _reduce, criteria, redistribution, selection
from sparse_jax import granularity as granularity_lib
from sparse_jax.masks import Layer, UpdateStats


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


class _Counts(NamedTuple):
    """Units of each layer, int32[layers]."""

    nonzeros: jax.Array
    missing: jax.Array
    prunable: jax.Array
    room: jax.Array  # missing ones that may be grown


Load = Callable[[Any, list[jax.Array], list[int]], list[Operands]]  # (operands, masks, which leaves)


def move(rule: Rule, layers: list[Layer], load: Load, operands: Any, masks: list[jax.Array], grown: list[jax.Array], t, rng_key):
    """The update.

    Args:
      rule: what to do.
      layers: the sparse leaves.
      load: computes what is read of some leaves; called anew for each group of leaves, so that none is held longer than needed.
      operands: what ``load`` computes them from.
      masks: masks of the sparse leaves.
      grown: where the last update grew, likewise; only their buffers are used.
      t: the step, 1-based.
      rng_key: of this run.

    Returns:
      For each sparse leaf the new mask and where it grew new weights, and the stats.
    """
    groups = _groups(rule, layers)
    keys = jax.random.split(jax.random.fold_in(rng_key, t), layers[-1].stop)
    parts = [_Group(rule, layers, load, group, keys) for group in groups]

    firsts = [part.run(t, part.measure, part.nothing_measured, operands, part.of(masks)) for part in parts]
    finite = [f[0] for f in firsts]
    counts = _Counts(*(jnp.concatenate(column) for column in zip(*(f[1] for f in firsts), strict=True)))
    nonzeros = counts.nonzeros
    none = jnp.zeros_like(nonzeros)
    most = jnp.maximum(jnp.minimum(counts.prunable, nonzeros - 1), 0)

    def one_threshold(amount):
        """One group, of all layers: see _groups."""
        return selection.joint_counts(parts[0].joint_keys(operands, masks, finite[0]), amount, most)

    fall, rise = _density_change(rule, t, nonzeros)
    given_up, moved, shares = none, none, None
    if rule.budgets is not None and rule.globally:
        given_up = one_threshold(fall)
    elif rule.budgets is not None:
        given_up = redistribution.decreases(fall, nonzeros, counts.prunable, jnp.asarray(rule.final, jnp.int32))
    if rule.grow is not None:
        if rule.redistribute is not None and not rule.after_pruning:
            shares = redistribution.weights(jnp.concatenate([f[2] for f in firsts]))
        rate = jnp.clip(jnp.nan_to_num(jnp.asarray(rule.prune_rate(t), jnp.float32)), 0, 1)
        moved = redistribution.prune_counts(rate, nonzeros - given_up, counts.missing + given_up, most - given_up, shares)
        if rule.globally and rule.budgets is None:
            moved = one_threshold(redistribution.total(moved))
    pruned = given_up + moved
    if rule.redistribute is not None and rule.after_pruning:
        late = [part.run(t, part.share, part.no_share, operands, (part.of(masks), part.pick(pruned))) for part in parts]
        shares = redistribution.weights(jnp.concatenate(late))
    targets = moved
    if rule.grow is not None:
        if rule.budgets is not None:
            free = counts.room + given_up  # what is left of the room when each layer has regrown its own
            targets = moved + redistribution.share_out(rise, redistribution.weights(free.astype(jnp.float32)), free)
        amount = redistribution.add(redistribution.total(moved), rise)
        targets = redistribution.growth_targets(amount, targets, shares, counts.room + pruned)

    results = [
        part.run(
            t, part.select, part.as_before, operands, (part.of(masks), part.of(grown), f, part.pick(pruned), part.pick(targets))
        )
        for part, f in zip(parts, finite, strict=True)
    ]
    new_masks, new_grown = ([x for r in results for x in r[i]] for i in (0, 1))
    new = jnp.concatenate([r[2] for r in results])
    if shares is None:
        share = jnp.zeros(len(nonzeros), jnp.float32)
    else:
        share = redistribution.divide(shares.weight.astype(jnp.float32), jnp.maximum(shares.total, 1).astype(jnp.float32))
    # n - pruned + targets = n - removed + new, so as many as pruned - targets + new units are now empty
    return new_masks, new_grown, UpdateStats(share, pruned, targets, 2 * new + pruned - targets)


# On one CPU device: keys of so many weights stay in the cache, and no more than a sixteenth of all is held at a time.
GROUP_WEIGHTS = 2**22
MOST_GROUPS = 16


def _groups(rule: Rule, layers: list[Layer]) -> list[list[int]]:
    """Which leaves are loaded, and selected from, together."""
    everyone = list(range(len(layers)))
    if rule.globally or not _reduce.one_cpu_device():
        return [everyone]
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


class _Group:
    """Some leaves, and what is computed of them."""

    def __init__(self, rule: Rule, layers: list[Layer], load: Load, members: list[int], keys: jax.Array):
        self.rule, self.load, self.members = rule, load, members
        self.layers = [layers[i] for i in members]
        self.keys = keys[self.layers[0].start : self.layers[-1].stop]
        self.alone = _reduce.one_cpu_device()
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
        """function(operands, own), on one CPU device as a computation of its own.

        There XLA orders operations for concurrency: it would compute what is read of all groups before it selects from the
        first, and hold all of it. The branch of a condition is one operation to it. The condition is always true.
        """
        if not self.alone:
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
            columns.append([jax.vmap(selection.count)(x) for x in (active, ~active, active & may_move, ~active & may_move)])
        counts = _Counts(*(jnp.concatenate(column) for column in zip(*columns, strict=True)))
        if self.rule.redistribute is None or self.rule.after_pruning:
            shares = jnp.zeros(self.num_layers, jnp.float32)
        else:
            shares = self.shares(leaves, jnp.zeros(self.num_layers, jnp.int32))
        return finite, counts, shares

    def nothing_measured(self, operands, masks):
        zeros = jnp.zeros(self.num_layers, jnp.int32)
        finite = [_as_rows(layer, mask) for layer, mask in zip(self.layers, masks, strict=True)]
        return finite, _Counts(zeros, zeros, zeros, zeros), jnp.zeros(self.num_layers, jnp.float32)

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
            info = criteria.LeafInfo(*leaf[:4], key, amount, self.rule.granularity, *leaf[4:])
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
        new = jnp.concatenate([jax.vmap(selection.count)(now & ~old) for now, old in zip(after, active, strict=True)])
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


def _density_change(rule: Rule, t, nonzeros):
    """By how many units the total is to fall, and by how many to rise."""
    zero = jnp.uint32(0), jnp.uint32(0)
    if rule.budgets is None:
        return zero, zero
    index = t // rule.update_every - 1  # beyond the table its last entry is read
    budget = tuple(jnp.asarray(part.astype(np.uint32))[index] for part in (rule.budgets >> 16, rule.budgets & 0xFFFF))
    present = redistribution.total(nonzeros)
    rise = redistribution.subtract(budget, present) if rule.grow is not None else zero
    return redistribution.subtract(present, budget), rise


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
