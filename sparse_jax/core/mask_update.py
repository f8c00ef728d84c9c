"""One mask update: how many units each layer prunes and grows, and which. Called by ``sparsify`` inside ``lax.cond``.

First everything that is counted: nonzeros, shares, how many each layer prunes and grows. None of it needs a selection: what is
pruned was active and may be grown again, so the room for growth is known beforehand. Then the selections, which need nothing but
their own leaf: group by group on one CPU device, all in one loop elsewhere (accelerators; several devices, where a leaf may be
sharded and one loop needs one small reduction a round).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.core import allocation, choice, group_update, grouping, numerics, schedules, selection, target
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import momentum as momentum_lib
from sparse_jax.core.allocation import Weights
from sparse_jax.core.granularity import FanIn
from sparse_jax.core.group_update import Counts, LeafOperands, Load, Part, Selecting
from sparse_jax.core.layers import Layer
from sparse_jax.core.masks import Masks, UpdateStats
from sparse_jax.core.momentum import Read
from sparse_jax.core.numerics import Amount
from sparse_jax.core.rule import Rule


class Operands(NamedTuple):
    """What the condition around an update is given: trees like the params, and None where something is not kept."""

    grads: Any
    inner_state: Any
    average: Any  # of the gradients
    accumulated: Any  # gradients, summed
    params: Any
    masks: Masks
    grown: Masks
    ever_active: Any
    backward: Masks | None  # which weights are trained; None: those of the masks
    budget: Any  # weights that each layer began with, where its units do not say; a tree of int32
    stats: UpdateStats
    t: jax.Array  # the step, 1-based
    rng_key: jax.Array


class Moved(NamedTuple):
    """What an update changes."""

    masks: Masks
    grown: Masks
    ever_active: Any
    backward: Masks | None
    stats: UpdateStats

    @staticmethod
    def unmoved(operands: Operands) -> 'Moved':
        """What it was before."""
        return Moved(operands.masks, operands.grown, operands.ever_active, operands.backward, operands.stats)


def first_masks(rule: Rule, layers: list[Layer], params: Any, key: jax.Array) -> Masks:
    """Masks of the rule's initial counts: random ones, or the largest weights where missing ones keep their values."""
    leaves, treedef = jax.tree.flatten(params)
    counts = jnp.asarray(rule.initial_counts(layers), jnp.int32)
    keys = jax.random.split(key, max(layers[-1].stop if layers else 0, 1))
    if rule.backward_density is None:
        scores = [_first_scores(rule, layer, keys[layer.start : layer.stop]) for layer in layers]
    else:
        scores = [_weight_keys(rule, layer, leaves[layer.leaf]) for layer in layers]
    masks = [jnp.array(True) for _ in leaves]
    for layer, chosen in zip(layers, choice.choose(rule.granularity, scores, counts) if layers else [], strict=True):
        masks[layer.leaf] = numerics.placed_like(leaves[layer.leaf], _mask_of_units(rule, layer, chosen))
    return jax.tree.unflatten(treedef, masks)


def first_mask(rule: Rule, layer: Layer, counts: jax.Array, keys: jax.Array) -> jax.Array:
    """That of one leaf: the one that :func:`first_masks` gives it, from its layers' counts and keys."""
    return _mask_of_units(rule, layer, choice.choose(rule.granularity, [_first_scores(rule, layer, keys)], counts)[0])


def _first_scores(rule: Rule, layer: Layer, keys: jax.Array) -> jax.Array:
    shape = rule.granularity.unit_shape(layer.shape)
    return jax.vmap(lambda key: jnp.maximum(jax.random.bits(key, shape), 1))(keys)


def _weight_keys(rule: Rule, layer: Layer, weight: jax.Array) -> jax.Array:
    """Keys of the units, the larger for the larger weights."""
    scores = jax.vmap(lambda row: group_update.unit_scores(rule.granularity, jnp.abs(row)))(layer.rows(weight))
    return selection.keys(scores, jnp.ones(scores.shape, bool))


def _mask_of_units(rule: Rule, layer: Layer, units: jax.Array) -> jax.Array:
    mask = jax.vmap(lambda row: rule.granularity.expand(row, layer.shape))(units)
    return layer.from_rows(mask)


def move_weights(
    inner: optax.GradientTransformationExtraArgs,
    rule: Rule,
    operands: Operands,
    extra_args: dict[str, Any],
    *,
    by_hand: bool = False,
) -> Moved:
    """The mask update, on trees like the params.

    ``by_hand`` says that it comes when the timing does not ask for it: a density schedule is then read at this very step, and outside
    of the steps whose gradients are summed the step's own gradient stands for the sum.
    """
    treedef, t = jax.tree.structure(operands.params), operands.t
    masks = treedef.flatten_up_to(operands.masks)
    layers = layers_lib.layers_of_masks(operands.params, operands.masks, rule.stacked, rule.matrix_axes)

    def load(read: Read, masks: list[jax.Array], members: list[int]) -> list[LeafOperands]:
        updates, _, _, momenta = momentum_lib.advance(inner, rule.momentum, read, extra_args)
        params, updates, grads = map(treedef.flatten_up_to, (read.params, updates, read.grads))
        momenta, ever_active, accumulated = (
            [None] * len(params) if x is None else treedef.flatten_up_to(x) for x in (momenta, read.ever_active, read.accumulated)
        )
        return [
            LeafOperands(
                weight=(params[i] + updates[i]).astype(params[i].dtype),
                mask=mask,
                gradient=grads[i],
                momentum=momenta[i],
                ever_active=ever_active[i],
                accumulated_gradient=accumulated[i],
            )
            for mask, i in zip(masks, [layers[m].leaf for m in members], strict=True)
        ]

    grown = treedef.flatten_up_to(operands.grown)
    keys = jax.random.split(jax.random.fold_in(operands.rng_key, t), layers[-1].stop)
    budget = None if operands.budget is None else treedef.flatten_up_to(operands.budget)
    if budget is not None:
        budget = jnp.concatenate([jnp.reshape(budget[layer.leaf], (-1,)) for layer in layers])
    update = Update(rule, layers, load, t, keys, by_hand, budget)
    read = _read(rule, operands, by_hand)
    new_masks, new_grown, stats = move(update, read, [masks[x.leaf] for x in layers], [grown[x.leaf] for x in layers])
    ever_active = None if operands.ever_active is None else treedef.flatten_up_to(operands.ever_active)
    for layer, mask, new in zip(layers, new_masks, new_grown, strict=True):
        if ever_active is not None:
            ever_active[layer.leaf] = ever_active[layer.leaf] | mask
        masks[layer.leaf], grown[layer.leaf] = mask, new
    backward = None
    if operands.backward is not None:
        weights = [leaf.weight for leaf in load(read, [masks[x.leaf] for x in layers], list(range(len(layers))))]
        backward = treedef.flatten_up_to(operands.backward)
        for layer, wider in zip(layers, backward_masks(rule, layers, weights, [masks[x.leaf] for x in layers]), strict=True):
            backward[layer.leaf] = wider
        backward = jax.tree.unflatten(treedef, backward)
    return Moved(
        masks=jax.tree.unflatten(treedef, masks),
        grown=jax.tree.unflatten(treedef, grown),
        ever_active=None if ever_active is None else jax.tree.unflatten(treedef, ever_active),
        backward=backward,
        stats=stats._replace(share=stats.share.astype(operands.stats.share.dtype)),  # a state may have been cast
    )


def _read(rule: Rule, operands: Operands, by_hand: bool) -> Read:
    """What ``load`` reads of the operands, and nothing else: what a condition is given is kept until it is done."""
    accumulated = operands.accumulated
    if by_hand and accumulated is not None:
        every = rule.timing.update_every
        summing = (operands.t - 1) % every >= every - rule.needs.accumulated_gradient
        accumulated = jax.tree.map(
            lambda a, g: a if a.ndim == 0 else jnp.where(summing, a, g.astype(jnp.float32)), accumulated, operands.grads
        )
    return Read(
        grads=operands.grads,
        inner_state=operands.inner_state,
        average=operands.average,
        accumulated=accumulated,
        ever_active=operands.ever_active if rule.needs.ever_active else None,
        params=operands.params,
        backward=operands.backward,
    )


def backward_masks(rule: Rule, layers: list[Layer], weights: list[jax.Array], masks: list[jax.Array]) -> list[jax.Array]:
    """The weights that are trained: those of the masks, and the largest others, as many as the wider density says."""
    if not layers:
        return []
    units = [
        jax.vmap(lambda row: granularity_lib.active(rule.granularity, row))(x.rows(m)) for x, m in zip(layers, masks, strict=True)
    ]
    scores = [
        jax.vmap(lambda row: group_update.unit_scores(rule.granularity, jnp.abs(row)))(x.rows(w))
        for x, w in zip(layers, weights, strict=True)
    ]
    keys = [selection.keys(score, ~active) for score, active in zip(scores, units, strict=True)]
    wider = jnp.asarray(rule.counts(layers, rule.backward_density), jnp.int32)  # pyright: ignore[reportArgumentType]
    present = jnp.concatenate([jax.vmap(numerics.count)(active) for active in units])
    chosen = selection.select(keys, wider - present)
    return [_mask_of_units(rule, x, active | more) for x, active, more in zip(layers, units, chosen, strict=True)]


class Amounts(NamedTuple):
    """How many units each layer prunes and grows, int32[layers], and the shares by which growth was shared out; None: it was not."""

    pruned: jax.Array
    grown: jax.Array
    shares: Weights | None


class Update(NamedTuple):
    """What an update does, and with which leaves.

    ``load(operands, masks, members)`` computes what is read of some leaves: it is called anew for each group, so that none is held
    longer than needed.
    """

    rule: Rule
    layers: list[Layer]  # the sparse leaves
    load: Load
    t: jax.Array  # the step, 1-based
    keys: jax.Array  # random keys, one a layer
    by_hand: bool  # whether it comes when the timing does not ask for it
    budget: jax.Array | None = None  # int32[layers], weights that each layer began with; where equal inputs need them


def move(update: Update, operands: Any, masks: list[jax.Array], grown: list[jax.Array]):
    """Moves weights.

    Args:
      update: what to do.
      operands: what ``update.load`` computes from.
      masks: masks of the sparse leaves.
      grown: where the update before grew, likewise; only their buffers are used.

    Returns:
      For each sparse leaf the new mask and where it grew new weights, and the stats.
    """

    def divided(in_turn: bool) -> list[Part]:
        groups = grouping.divide(update.layers, in_turn=in_turn)
        may_ablate = (
            ~np.array(update.rule.kept_outputs(update.layers)) if update.rule.ablation else np.zeros(len(update.keys), bool)
        )
        budget = jnp.zeros(len(update.keys), jnp.int32) if update.budget is None else update.budget
        return [
            Part(
                update.rule,
                update.load,
                group,
                group.layers_of(update.keys),
                group.layers_of(jnp.asarray(may_ablate)),
                group.layers_of(budget),
            )
            for group in groups
        ]

    def run(part: Part, function: Callable, otherwise: Callable, arguments: Any) -> Any:
        bind = lambda f: lambda operands, arguments: f(part, operands, arguments)
        return part.group.run(update.t, bind(function), bind(otherwise), operands, arguments)

    measured_parts = divided(target.platform() == 'cpu')
    parts = divided(numerics.one_cpu_device() and not update.rule.is_global)
    measured = [
        run(part, group_update.measure, group_update.nothing_measured, part.group.leaves_of(masks)) for part in measured_parts
    ]
    finite = [leaf for m in measured for leaf in m[0]]
    counts = Counts(*(jnp.concatenate(column) for column in zip(*(m[1] for m in measured), strict=True)))

    def one_threshold(amount: Amount, most: jax.Array) -> jax.Array:  # there is one part, of all layers
        return selection.joint_counts(group_update.joint_keys(parts[0], operands, masks, finite), amount, most)

    def early_shares() -> jax.Array:
        return jnp.concatenate([m[2] for m in measured])

    def late_shares(pruned: jax.Array) -> jax.Array:
        arguments = [(part.group.leaves_of(masks), part.group.layers_of(pruned)) for part in parts]
        return jnp.concatenate(
            [run(part, group_update.late_shares, group_update.no_shares, a) for part, a in zip(parts, arguments, strict=True)]
        )

    amounts = _amounts(update, counts, one_threshold, early_shares, late_shares)
    results = []
    for part in parts:
        selecting = Selecting(
            masks=part.group.leaves_of(masks),
            grown=part.group.leaves_of(grown),
            finite=part.group.leaves_of(finite),
            pruned=part.group.layers_of(amounts.pruned),
            targets=part.group.layers_of(amounts.grown),
        )
        results.append(run(part, group_update.select, group_update.as_before, selecting))
    new_masks, new_grown = ([x for r in results for x in r[i]] for i in (0, 1))
    flipped = jnp.concatenate([r[2] for r in results])
    return new_masks, new_grown, UpdateStats(_share(amounts), amounts.pruned, amounts.grown, flipped)


def _amounts(update: Update, counts: Counts, one_threshold: Callable, early_shares: Callable, late_shares: Callable) -> Amounts:
    """How much each layer prunes and grows. The functions compute what is not always needed, from the leaves."""
    rule, nonzeros = update.rule, counts.nonzeros
    none = jnp.zeros_like(nonzeros)
    keep_one = rule.enters_with == 'zero'  # no layer loses its last unit; where all may come back the last may go with the others
    most = jnp.maximum(jnp.minimum(counts.prunable, nonzeros - 1), 0)
    fall, rise = _density_change(update, nonzeros)
    given_up, moved, shares = none, none, None
    follows_schedule = callable(rule.density)
    if follows_schedule and rule.is_global:
        given_up = one_threshold(fall, most)
    elif follows_schedule:
        final = jnp.asarray(tuple(rule.final_counts(update.layers)), jnp.int32)
        given_up = allocation.decreases(fall, nonzeros, counts.prunable, final)
    if rule.grow is not None:
        if rule.redistribute is not None and not rule.shares_after_pruning:
            shares = allocation.weights(early_shares())
        rate = jnp.clip(jnp.nan_to_num(jnp.asarray(rule.prune_rate_schedule(update.t), jnp.float32)), 0, 1)
        movable = (most if keep_one else counts.prunable) - given_up
        moved = allocation.prune_counts(rate, nonzeros - given_up, counts.missing + given_up, movable, shares, keep_one=keep_one)
        if rule.is_global and not follows_schedule:
            moved = one_threshold(numerics.total(moved), most)
    pruned = given_up + moved
    if rule.redistribute is not None and rule.shares_after_pruning:
        shares = allocation.weights(late_shares(pruned))
    targets = moved
    if rule.grow is not None:
        if follows_schedule:
            free = counts.growable + given_up  # what is left of the room when each layer has regrown its own
            targets = moved + allocation.share_out(rise, allocation.weights(free.astype(jnp.float32)), free)
        amount = numerics.add(numerics.total(moved), rise)
        room = counts.growable + pruned
        if shares is None or not isinstance(rule.granularity, FanIn):
            targets = allocation.growth_targets(amount, targets, shares, room)
        else:
            targets = _grown_inputs(update, nonzeros - pruned, targets, shares, room)
    return Amounts(pruned, targets, shares)


def _grown_inputs(update: Update, kept: jax.Array, regrown: jax.Array, shares: Weights, room: jax.Array) -> jax.Array:
    """How many inputs for all outputs each layer grows, where the budget of all weights is what the layers began with."""
    rule = update.rule
    outputs = [rule.granularity.selected_per_unit(layer.shape) for layer in update.layers for _ in range(layer.depth or 1)]
    outputs = jnp.asarray(outputs, jnp.int32)
    assert update.budget is not None
    amount = numerics.subtract(numerics.total(update.budget), numerics.total(kept * outputs))
    return jnp.where(shares.total > 0, allocation.whole_units(amount, shares, room, outputs), regrown)


def _share(amounts: Amounts) -> jax.Array:
    """The part of all growth that each layer was to have, float32[layers]."""
    if amounts.shares is None:
        return jnp.zeros(len(amounts.pruned), jnp.float32)
    weight, total = amounts.shares
    return numerics.divide(weight.astype(jnp.float32), jnp.maximum(total, 1).astype(jnp.float32))


def _density_change(update: Update, nonzeros: jax.Array) -> tuple[Amount, Amount]:
    """By how many units the total is to fall, and by how many to rise."""
    rule, timing = update.rule, update.rule.timing
    zero = jnp.uint32(0), jnp.uint32(0)
    if not callable(rule.density):
        return zero, zero
    every = 1 if update.by_hand else timing.update_every
    size = sum(layers_lib.unit_counts(rule.granularity, update.layers))
    budgets = schedules.budgets(rule.density, size, timing, every=every)
    index = update.t // every - 1  # beyond the table its last entry is read
    high, low = (jnp.asarray(part.astype(np.uint32))[index] for part in (budgets >> 16, budgets & 0xFFFF))
    budget = high, low
    present = numerics.total(nonzeros)
    rise = numerics.subtract(budget, present) if rule.grow is not None else zero
    return numerics.subtract(present, budget), rise
