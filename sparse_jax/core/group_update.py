"""What a mask update computes of one group of leaves: what it reads, what criteria say, which units go and which come."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.core import choice, criteria, numerics, selection
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.criteria import Criterion
from sparse_jax.core.granularity import Granularity
from sparse_jax.core.grouping import Group
from sparse_jax.core.layers import Layer
from sparse_jax.core.rule import Rule


class LeafOperands(NamedTuple):
    """What an update reads of one leaf, ``[depth, ...]`` with the layers of a stacked leaf first."""

    weight: jax.Array
    mask: jax.Array
    gradient: Any
    momentum: Any
    ever_active: Any
    accumulated_gradient: Any


class Counts(NamedTuple):
    """Units of each layer, int32[layers]."""

    nonzeros: jax.Array
    missing: jax.Array
    prunable: jax.Array
    growable: jax.Array  # missing ones that may be grown


class Selecting(NamedTuple):
    """What the selection within a group takes besides what is loaded."""

    masks: list[jax.Array]
    grown: list[jax.Array]  # of the update before; only their buffers are used
    finite: list[jax.Array]
    pruned: jax.Array  # how many units each layer prunes
    targets: jax.Array  # how many it grows


Load = Callable[[Any, list[jax.Array], list[int]], list[LeafOperands]]  # (operands, masks, which leaves)


class Part(NamedTuple):
    """One group's part of an update."""

    rule: Rule
    load: Load
    group: Group
    keys: jax.Array  # of the group's layers
    may_ablate: jax.Array  # bool, of the group's layers: whether outputs may lose all of their inputs
    budget: jax.Array  # int32, weights that the group's layers began with, where outputs may


# --- what is read of the leaves


def _leaves(part: Part, operands: Any, masks: list[jax.Array]) -> list[LeafOperands]:
    """What is read of the group's leaves, by bundle."""
    loaded = part.load(operands, masks, part.group.members)
    rows = [jax.tree.map(layer.rows, leaf) for layer, leaf in zip(part.group.leaves, loaded, strict=True)]
    return part.group.bundle(rows)


def _units(part: Part, function: Callable, x: jax.Array) -> jax.Array:
    """A function (granularity, layer's array) -> units of each row."""
    return jax.vmap(lambda row: function(part.rule.granularity, row))(x)


def _may_move(part: Part, finite: list[jax.Array]) -> list[jax.Array]:
    return [_units(part, granularity_lib.every, f) for f in finite]


def measure(part: Part, operands: Any, masks: list[jax.Array]):
    """Which weights are finite, the counts, and the shares."""
    rule = part.rule
    leaves = _leaves(part, operands, masks)
    # Behind a barrier, so that it is decided once: computed again elsewhere a weight might be rounded otherwise.
    finite = [lax.optimization_barrier(jnp.isfinite(leaf.weight)) for leaf in leaves]
    columns = []
    for leaf, may_move in zip(leaves, _may_move(part, finite), strict=True):
        active = _units(part, granularity_lib.active, leaf.mask)
        columns.append(_budget_counts(rule, active, active & may_move, ~active & may_move))
    nonzeros, prunable, growable = (part.group.join(column) for column in zip(*columns, strict=True))
    sizes = jnp.asarray(layers_lib.unit_counts(rule.granularity, part.group.leaves), jnp.int32)
    counts = Counts(nonzeros=nonzeros, missing=sizes - nonzeros, prunable=prunable, growable=growable)
    if rule.redistribute is None or rule.shares_after_pruning:
        shares = jnp.zeros(part.group.num_layers, jnp.float32)
    else:
        shares = _shares(part, leaves, jnp.zeros(part.group.num_layers, jnp.int32))
    return part.group.unbundle(finite), counts, shares


def _budget_counts(rule: Rule, active: jax.Array, prunable: jax.Array, growable: jax.Array) -> list[jax.Array]:
    """Units of budget of each row, int32[rows]. An input for every output is there, or may move, where it is so of all outputs."""
    if not isinstance(rule.granularity, granularity_lib.FanIn):
        return [jax.vmap(numerics.count)(x) for x in (active, prunable, growable)]
    if rule.ablation:  # outputs without inputs say nothing
        of_layer = [jax.vmap(numerics.count)(x) // active.shape[-1] for x in (prunable, growable)]
        return [choice.fan_in(active), *of_layer]
    return [choice.fan_in(active), *(jnp.min(choice.by_output(x), axis=-1) for x in (prunable, growable))]


def nothing_measured(part: Part, operands: Any, masks: list[jax.Array]):
    zeros = jnp.zeros(part.group.num_layers, jnp.int32)
    finite = [layer.rows(mask) for layer, mask in zip(part.group.leaves, masks, strict=True)]
    return finite, Counts(zeros, zeros, zeros, zeros), jnp.zeros(part.group.num_layers, jnp.float32)


# --- what criteria say


def _evaluate(part: Part, setting: str, layer: Layer, leaf: LeafOperands, keys: jax.Array, amounts: jax.Array):
    """The criterion of a setting, of each row of a leaf."""
    criterion: Criterion = getattr(part.rule, setting)

    def one(leaf: LeafOperands, key, amount):
        info = criteria.LeafInfo(
            weight=leaf.weight,
            mask=leaf.mask,
            gradient=leaf.gradient,
            momentum=leaf.momentum,
            key=key,
            amount=amount,
            granularity=part.rule.granularity,
            ever_active=leaf.ever_active,
            accumulated_gradient=leaf.accumulated_gradient,
        )
        value = criterion(info)
        try:
            return jnp.asarray(value)
        except (TypeError, ValueError):
            what = 'one number' if setting == 'redistribute' else 'scores'
            raise ValueError(
                f'{setting}: the criterion must return {what}, but for {layer.name!r} it returned {value!r}.'
            ) from None

    if layer.depth is None:  # not by vmap: a criterion sees what it would see alone
        return one(jax.tree.map(lambda x: x[0], leaf), keys[0], amounts[0])[None]
    return jax.vmap(one)(leaf, keys, amounts)


def _shares(part: Part, leaves: list[LeafOperands], amounts: jax.Array) -> jax.Array:
    """Each layer's share of the growth."""
    values = []
    for layer, leaf, key, amount in zip(
        part.group.layers, leaves, part.group.split(part.keys), part.group.split(amounts), strict=True
    ):
        value = _evaluate(part, 'redistribute', layer, leaf, key, _selected(part, layer, amount))
        _check_shape('redistribute', value, (len(leaf.mask),), layer)
        values.append(value.astype(jnp.float32))
    return part.group.join(values)


def _selected(part: Part, layer: Layer, amounts: jax.Array) -> jax.Array:
    """Units of selection in so many units of budget."""
    number = part.rule.granularity.selected_per_unit(layer.shape)
    return amounts if number == 1 else amounts * number


def late_shares(part: Part, operands: Any, arguments: tuple[list[jax.Array], jax.Array]) -> jax.Array:
    masks, pruned = arguments
    return _shares(part, _leaves(part, operands, masks), pruned)


def no_shares(part: Part, operands: Any, arguments: Any) -> jax.Array:
    return jnp.zeros(part.group.num_layers, jnp.float32)


def _prune_scores(part: Part, leaves: list[LeafOperands], amounts: jax.Array) -> list[jax.Array]:
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(part.keys)
    return _scores(part, 'prune', leaves, keys, amounts)


def _scores(part: Part, setting: str, leaves: list[LeafOperands], keys: jax.Array, amounts: jax.Array):
    """A score for each unit of each bundle, ``[rows, ...]``, by the criterion of a setting."""
    scores_of_bundles = []
    for layer, leaf, key, amount in zip(part.group.layers, leaves, part.group.split(keys), part.group.split(amounts), strict=True):
        scores = _evaluate(part, setting, layer, leaf, key, _selected(part, layer, amount))
        _check_shape(setting, scores, leaf.mask.shape, layer)
        scores = numerics.sharded_like(leaf.mask, scores)  # random ones come without
        scores_of_bundles.append(_units(part, unit_scores, scores))
    return scores_of_bundles


def unit_scores(granularity: Granularity, scores: jax.Array) -> jax.Array:
    """Each unit's score: the mean of its weights' scores, exact (scores that are not finite count as 0)."""
    if granularity.of_single_weights:
        return scores
    return numerics.mean_magnitude(
        scores,
        jnp.ones(scores.shape, bool),
        granularity.collapse,
        lambda units: granularity.expand(units, scores.shape),
        granularity_lib.unit_size(granularity, scores.shape),
    )


def _check_shape(setting: str, value: jax.Array, shape: tuple[int, ...], layer: Layer) -> None:
    if jnp.shape(value) != shape:
        expected, returned = shape[1:], jnp.shape(value)[1:]
        what = 'one number' if setting == 'redistribute' else f"scores of the layer's shape {expected}"
        raise ValueError(f'{setting}: the criterion must return {what}, but for {layer.name!r} it returned the shape {returned}.')


# --- which


def joint_keys(part: Part, operands: Any, masks: list[jax.Array], finite: list[jax.Array]):
    """Pruning keys that compare across leaves."""
    leaves = _leaves(part, operands, masks)
    scores = _prune_scores(part, leaves, jnp.zeros(part.group.num_layers, jnp.int32))
    if len({s.dtype for s in scores}) > 1:
        scores = [s.astype(jnp.float32) for s in scores]
    where = [
        _units(part, granularity_lib.active, leaf.mask) & m
        for leaf, m in zip(leaves, _may_move(part, part.group.bundle(finite)), strict=True)
    ]
    keys = [selection.keys(s, w, smallest=True) for s, w in zip(scores, where, strict=True)]
    return part.group.unbundle(keys)


def select(part: Part, operands: Any, arguments: Selecting):
    """New masks and newly grown positions, and how many positions changed in each layer."""
    leaves = _leaves(part, operands, arguments.masks)
    may_move = _may_move(part, part.group.bundle(arguments.finite))
    active = [_units(part, granularity_lib.active, leaf.mask) for leaf in leaves]
    stay = _prune_scores(part, leaves, arguments.pruned)
    keys = [selection.keys(s, a & m, smallest=True) for s, a, m in zip(stay, active, may_move, strict=True)]
    pruned = [_selected(part, *x) for x in zip(part.group.layers, part.group.split(arguments.pruned), strict=True)]
    after = [a & ~removed for a, removed in zip(active, selection.select(keys, jnp.concatenate(pruned)), strict=True)]
    if part.rule.grow is not None:
        pruned_leaves = [
            leaf._replace(mask=_expand(part, layer, a)) for layer, leaf, a in zip(part.group.layers, leaves, after, strict=True)
        ]
        grow = _scores(part, 'grow', pruned_leaves, part.keys, arguments.targets)
        after = _regrown(
            part, [choice.Pruned(*x) for x in zip(active, after, may_move, stay, grow, strict=True)], pruned, arguments
        )
    new = part.group.join([jax.vmap(numerics.count)(now & ~old) for now, old in zip(after, active, strict=True)])
    # n - pruned + targets = n - removed + new, so as many units as pruned - targets + new are now empty
    flipped = 2 * new + arguments.pruned - arguments.targets
    expanded = part.group.unbundle([_expand(part, layer, now) for layer, now in zip(part.group.layers, after, strict=True)])
    new_masks, grown, changed = [], [], []
    for layer, mask, now in zip(part.group.leaves, arguments.masks, expanded, strict=True):
        now = layer.from_rows(now)
        if not isinstance(part.rule.granularity, granularity_lib.Unstructured):  # weights, not units of budget
            changed.append(jax.vmap(numerics.count)(layer.rows(now ^ mask)))
        # Written so that the old mask's buffer can become the new mask's: `grown` reads it first.
        grown.append(now & ~mask)
        new_masks.append((mask & now) | grown[-1])
    return new_masks, grown, jnp.concatenate(changed) if changed else flipped


def _regrown(part: Part, bundles: list[choice.Pruned], pruned: list[jax.Array], arguments: Selecting) -> list[jax.Array]:
    """The units after the growth; ``pruned`` counts units of selection."""
    granularity, split, inputs = part.rule.granularity, part.group.split, []
    if isinstance(granularity, granularity_lib.FanIn):
        change = split(arguments.targets - arguments.pruned)
        for x, gone, more, may_ablate, budget in zip(
            bundles, pruned, change, split(part.may_ablate), split(part.budget), strict=True
        ):
            of_output = jnp.broadcast_to((choice.fan_in(x.before) + more)[:, None], (len(x.grow), x.grow.shape[-1]))
            inputs.append(_of_survivors(part.rule, x, gone, budget, may_ablate) if part.rule.ablation else of_output)
    return choice.regrown(granularity, bundles, arguments.targets[part.group.order], inputs)


def _of_survivors(rule: Rule, bundle: choice.Pruned, pruned: jax.Array, budget: jax.Array, may_ablate: jax.Array) -> jax.Array:
    """Inputs of each output, int32[rows, outputs], where those with too few salient weights lose all of theirs to the others.

    Salient are the weights left after the pruning, and as many positions as were pruned, those with the largest growth scores of all. An
    output with a weight that is fixed stays, and none is to have more inputs than all that stay have room for.
    """
    outputs = bundle.grow.shape[-1]
    size = bundle.grow[0].size // outputs
    fixed = choice.by_output(bundle.after & ~bundle.may_move)
    room = size - choice.by_output(~bundle.after & ~bundle.may_move)
    grown = selection.select([selection.keys(bundle.grow, bundle.may_move)], pruned)[0]
    survives = (
        choice.surviving(bundle.after | grown, max(1, int(rule.ablation * size)), budget) | ~may_ablate[:, None] | (fixed > 0)
    )
    number = jnp.sum(survives, axis=-1, dtype=jnp.int32)[:, None]
    least_room = jnp.min(jnp.where(survives, room, size), axis=-1, keepdims=True)
    return jnp.where(survives, jnp.maximum(jnp.minimum(budget[:, None] // number, least_room), fixed), 0)


def as_before(part: Part, operands: Any, arguments: Selecting):
    return arguments.masks, arguments.grown, jnp.zeros(part.group.num_layers, jnp.int32)


def _expand(part: Part, layer: Layer, units: jax.Array) -> jax.Array:
    """Masks of weights from masks of units, row by row."""
    return jax.vmap(lambda row: part.rule.granularity.expand(row, layer.shape))(units)
