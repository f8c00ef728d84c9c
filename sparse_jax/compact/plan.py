"""A mask update of compact weights: what is to move, decided by the same selections as the dense form's."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.compact import tree as tree_lib
from sparse_jax.compact.tree import Compact
from sparse_jax.core import arguments, criteria, group_update, mask_update, numerics
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.granularity import Unstructured
from sparse_jax.core.layers import Layer
from sparse_jax.core.masks import UpdateStats
from sparse_jax.core.rule import Rule
from sparse_jax.kernels import layout as layout_lib
from sparse_jax.kernels import lists
from sparse_jax.kernels.layout import Layout, is_layout


class Plan(NamedTuple):
    """What a mask update is to do; arrays, and trees like the layout."""

    layout: Any  # where units belong afterwards; as before where there is no capacity_factor: see fits
    sources: Any  # int32[capacity] of each compact leaf: which unit of the old list each of the new one is; -1: it is new
    units: Any  # int32 number of units of each layer afterwards, counted at each tap, whether there is room or not
    stats: UpdateStats  # of the layers that take part


def plan(values: Any, layout: Any, scores: Any, count: Any, key: jax.Array, rule: Rule) -> Plan:
    """Which units go and which come: a mask update of ``sj.sparsify``, by its selections, ties, budgets and redistribution.

    From the same weights and scores it gives the same masks, bit for bit. Whole arrays of weights are made on the way, of some leaves at
    a time, and are gone when it is done. Runs under jit.

    Args:
      values: tree of values, after the optimizer's step.
      layout: its layout.
      scores: gradients of :func:`probes`, or sums or averages of them: what the criteria of the rule read as gradient, as momentum and as
        accumulated gradient. A tree like layout with arrays of the probes' shapes, and None at leaves that stay as they are: growth and
        redistribution are then among the others. None: no criterion reads any, as with random growth, and all leaves take part.
      count: which step this is, 1-based: prune rate and random numbers follow from it. int, or int32 scalar.
      key: random key of the run; that of a step is folded in. The key of ``SparsifyState.rng_key`` gives the dense form's numbers.
      rule: a method's rule: see :func:`sparse_jax.methods.rule`.

    Returns:
      The plan. Where there is no room for it nothing moves: ask :func:`fits`, and :func:`reserve` first where it does not.

    Raises:
      ValueError: for a rule that needs dense state, whose density follows a schedule, whose masks are fixed or whose units are others than the
        layout's; for trees that do not fit; and where scores are missing that the rule reads.

    Example: see :mod:`sparse_jax.compact`.

    Reference: Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020, for growth by the gradients of missing weights.
    """
    arguments.check_type('rule', rule, Rule)
    check_rule(rule)
    return _plan(values, tree_lib.bare(layout), scores, jnp.asarray(count, jnp.int32), rule.key_of(key), rule)


@functools.partial(jax.jit, static_argnums=5)
@numerics.lenient
def _plan(values, layout, scores, t, key, rule: Rule) -> Plan:
    compact = tree_lib.compact_leaves(layout)
    for path, lists_of_leaf in compact.named:
        if lists_of_leaf.granularity != rule.granularity:
            raise ValueError(
                f'plan: the units of {path} are {lists_of_leaf.granularity}, those of the rule {rule.granularity}: they must be the same.'
            )
    by_leaf = _values_of(values, compact)
    score_of = _scores_of(scores, compact, rule)
    scored = [i for i, score in enumerate(score_of) if score is not None]
    members = scored or list(range(len(compact.paths)))
    layers, of_all = _layers(compact, members)
    keys = jax.random.split(jax.random.fold_in(key, t), of_all[-1].stop)
    keys = jnp.concatenate([keys[of_all[i].start : of_all[i].stop] for i in members])
    masks = [tree_lib.per_row(lists.mask_of, compact.layouts[i])(compact.layouts[i]) for i in members]
    operands = [(by_leaf[i], compact.layouts[i], score_of[i]) for i in members]
    update = mask_update.Update(rule, layers, _load, t, keys, by_hand=False)
    new_masks, _, stats = mask_update.move(update, operands, masks, [jnp.zeros_like(mask) for mask in masks])
    moved = {i: _moved(compact.layouts[i], mask) for i, mask in zip(members, new_masks, strict=True)}
    there_is_room = functools.reduce(jnp.logical_and, [jnp.all(new[2] <= compact.layouts[i].capacity) for i, new in moved.items()])

    def leaf(i: int) -> tuple[Layout, jax.Array, jax.Array]:
        old = compact.layouts[i]
        stay = jnp.broadcast_to(jnp.arange(old.capacity, dtype=jnp.int32), old.indices.shape)
        if i not in moved:
            return old, stay, jnp.asarray(old.pointers)[..., -1]
        new, where, units = moved[i]
        chosen = lambda a, b: jnp.where(there_is_room, a, b)
        return jax.tree.map(chosen, new, old), chosen(where, stay), units

    rows = [leaf(i) for i in range(len(compact.paths))]
    flat, treedef = jax.tree.flatten(layout, is_leaf=lambda x: x is None or is_layout(x))
    places = [i for i, x in enumerate(flat) if is_layout(x)]
    trees = []
    for column in zip(*rows, strict=True):
        whole: list[Any] = [None] * len(flat)
        for place, x in zip(places, column, strict=True):
            whole[place] = x
        trees.append(jax.tree.unflatten(treedef, whole))
    after, origins, units = trees
    return Plan(after, origins, units, stats)


def reads_scores(rule: Rule) -> bool:
    """Whether a criterion reads gradients or momentum."""
    silent = {None, criteria.magnitude, criteria.signed_magnitude, criteria.random, criteria.mean_magnitude, criteria.nonzeros}
    return any(part not in silent for part in (rule.prune, rule.grow, rule.redistribute))


def check_rule(rule: Rule) -> None:
    tree_lib.check_masks_of(rule, 'plan')
    if rule.is_fixed:
        raise ValueError(
            'plan: this rule has grow=None and a constant density, so its masks never change: there is nothing to plan.'
        )
    if callable(rule.density):
        raise ValueError(
            'plan: the rule’s density follows a schedule, and a network that begins dense takes the memory of a dense one: train it by '
            'sj.sparsify, or give a constant density.'
        )
    if rule.needs.ever_active or rule.track_exploration:
        raise ValueError(
            'plan: the rule reads which weights have ever been active, which is kept of all weights: train it by sj.sparsify, or take '
            'grow=sj.criteria.random and track_exploration=False.'
        )


def _values_of(values: Any, compact: Compact) -> list[jax.Array]:
    """The values of each compact leaf."""
    found = dict(zip(tree_lib.owners(values, compact), jax.tree.leaves(values), strict=True))
    missing = [path for i, path in enumerate(compact.paths) if i not in found]
    if missing:
        raise ValueError(f'plan: values has no leaf for {", ".join(missing)}: values and layout must come from the same compress.')
    return [found[i] for i in range(len(compact.paths))]


def _scores_of(scores: Any, compact: Compact, rule: Rule) -> list[jax.Array | None]:
    """The scores of each compact leaf, None where it has none."""
    given = dict(layers_lib.leaf_paths(scores))
    if unknown := sorted(given.keys() - set(compact.paths)):
        raise ValueError(
            f'plan: scores has the leaf {unknown[0]!r}, which is not compact: give the gradients of sj.compact.probes(layout).'
        )
    if not given and reads_scores(rule):
        raise ValueError(
            'plan: the rule’s criteria read gradients or momentum: give scores, the gradients of sj.compact.probes(layout).'
        )
    for path, layout in compact.named:
        wanted = (*layout.pointers.shape[:-1], *layout.units)
        if path in given and tuple(given[path].shape) != wanted:
            raise ValueError(f'plan: the scores of {path} have shape {tuple(given[path].shape)}, its units {wanted}.')
    return [given.get(path) for path in compact.paths]


def _layers(compact: Compact, members: list[int]) -> tuple[list[Layer], list[Layer]]:
    """The layers that take part, and those of all compact leaves."""

    def table(numbers) -> list[Layer]:
        rows, start = [], 0
        for i in numbers:
            layout = compact.layouts[i]
            depth = layout.pointers.shape[0] if tree_lib.is_stacked(layout) else None
            rows.append(Layer(i, compact.paths[i], layout.shape, start, depth, jnp.dtype(jnp.float32)))
            start = rows[-1].stop
        return rows

    return table(members), table(range(len(compact.paths)))


def _load(operands, masks: list[jax.Array], members: list[int]) -> list[group_update.LeafOperands]:
    """What criteria read of some leaves, as whole arrays."""

    def one(member: int, mask: jax.Array) -> group_update.LeafOperands:
        values, layout, scores = operands[member]
        weight = tree_lib.per_row(layout_lib.expand, layout)(values, layout)
        if scores is not None and not isinstance(layout.granularity, Unstructured):
            unit = granularity_lib.at_each_tap(layout.granularity)
            scores = tree_lib.per_row(lambda row: unit.expand(row, layout.shape), layout)(scores)
        return group_update.LeafOperands(weight, mask, scores, scores, None, scores)

    return [one(member, mask) for member, mask in zip(members, masks, strict=True)]


def _moved(layout: Layout, mask: jax.Array) -> tuple[Layout, jax.Array, jax.Array]:
    """The new layout of a leaf, where its units come from, and how many units each of its layers has."""

    def row(layout: Layout, mask: jax.Array):
        units = lists.units_of(mask, layout.granularity)
        indices, pointers = lists.lists_of(units, layout.capacity)
        new = dataclasses.replace(layout, indices=indices, pointers=pointers)
        return new, lists.sources(layout, new, units), pointers[-1]

    return tree_lib.per_row(row, layout)(layout, mask)
