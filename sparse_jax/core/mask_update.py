"""One mask update: how many units each layer prunes and grows, and which. Called by ``sparsify`` inside ``lax.cond``.

First everything that is counted: nonzeros, shares, how many each layer prunes and grows. None of it needs a selection: what is
pruned was active and may be grown again, so the room for growth is known beforehand. Then the selections, which need nothing but
their own leaf: group by group on one CPU device, all in one loop elsewhere (accelerators; several devices, where a leaf may be
sharded and one loop needs one small reduction a round).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core import allocation, grouping, numerics, selection, target
from sparse_jax.core.masks import Layer, UpdateStats


def move(
    rule: grouping.Rule,
    layers: list[Layer],
    load: grouping.Load,
    operands: Any,
    masks: list[jax.Array],
    grown: list[jax.Array],
    t,
    rng_key,
):
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
    keys = jax.random.split(jax.random.fold_in(rng_key, t), layers[-1].stop)

    def divided(into_groups: bool) -> list[grouping.Group]:
        groups = grouping.groups(layers) if into_groups else [list(range(len(layers)))]
        return [grouping.Group(rule, layers, load, group, keys, into_groups) for group in groups]

    measured = divided(target.platform() == 'cpu')
    parts = divided(numerics.one_cpu_device() and not rule.globally)

    firsts = [part.run(t, part.measure, part.nothing_measured, operands, part.of(masks)) for part in measured]
    finite = [leaf for f in firsts for leaf in f[0]]
    counts = grouping.Counts(*(jnp.concatenate(column) for column in zip(*(f[1] for f in firsts), strict=True)))
    nonzeros = counts.nonzeros
    none = jnp.zeros_like(nonzeros)
    most = jnp.maximum(jnp.minimum(counts.prunable, nonzeros - 1), 0)

    def one_threshold(amount):
        # one part, of all layers
        return selection.joint_counts(parts[0].joint_keys(operands, masks, finite), amount, most)

    fall, rise = _density_change(rule, t, nonzeros)
    given_up, moved, shares = none, none, None
    if rule.budgets is not None and rule.globally:
        given_up = one_threshold(fall)
    elif rule.budgets is not None:
        given_up = allocation.decreases(fall, nonzeros, counts.prunable, jnp.asarray(rule.final, jnp.int32))
    if rule.grow is not None:
        if rule.redistribute is not None and not rule.after_pruning:
            shares = allocation.weights(jnp.concatenate([f[2] for f in firsts]))
        rate = jnp.clip(jnp.nan_to_num(jnp.asarray(rule.prune_rate(t), jnp.float32)), 0, 1)
        moved = allocation.prune_counts(rate, nonzeros - given_up, counts.missing + given_up, most - given_up, shares)
        if rule.globally and rule.budgets is None:
            moved = one_threshold(numerics.total(moved))
    pruned = given_up + moved
    if rule.redistribute is not None and rule.after_pruning:
        late = [part.run(t, part.share, part.no_share, operands, (part.of(masks), part.pick(pruned))) for part in parts]
        shares = allocation.weights(jnp.concatenate(late))
    targets = moved
    if rule.grow is not None:
        if rule.budgets is not None:
            free = counts.room + given_up  # what is left of the room when each layer has regrown its own
            targets = moved + allocation.share_out(rise, allocation.weights(free.astype(jnp.float32)), free)
        amount = numerics.add(numerics.total(moved), rise)
        targets = allocation.growth_targets(amount, targets, shares, counts.room + pruned)

    results = [
        part.run(
            t,
            part.select,
            part.as_before,
            operands,
            (part.of(masks), part.of(grown), part.of(finite), part.pick(pruned), part.pick(targets)),
        )
        for part in parts
    ]
    new_masks, new_grown = ([x for r in results for x in r[i]] for i in (0, 1))
    flipped = jnp.concatenate([r[2] for r in results])
    if shares is None:
        share = jnp.zeros(len(nonzeros), jnp.float32)
    else:
        share = numerics.divide(shares.weight.astype(jnp.float32), jnp.maximum(shares.total, 1).astype(jnp.float32))
    return new_masks, new_grown, UpdateStats(share, pruned, targets, flipped)


def _density_change(rule: grouping.Rule, t, nonzeros):
    """By how many units the total is to fall, and by how many to rise."""
    zero = jnp.uint32(0), jnp.uint32(0)
    if rule.budgets is None:
        return zero, zero
    index = t // rule.update_every - 1  # beyond the table its last entry is read
    high, low = (jnp.asarray(part.astype(np.uint32))[index] for part in (rule.budgets >> 16, rule.budgets & 0xFFFF))
    budget = high, low
    present = numerics.total(nonzeros)
    rise = numerics.subtract(budget, present) if rule.grow is not None else zero
    return numerics.subtract(present, budget), rise
