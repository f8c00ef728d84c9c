"""The core: any optax optimizer, made to train a network that is sparse from its first step to its last."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparse_jax.core import allocation, arguments, criteria, distributions, grouping, mask_update, schedules, selection
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.core import momentum as momentum_lib
from sparse_jax.core.criteria import Criterion
from sparse_jax.core.masks import PathPredicate, SparsifyState, UpdateStats

_MASK_STREAM = 0x6D61736B  # 'mask' in ASCII
_AVERAGE_DECAY = 0.9  # of the gradient average that stands in for a missing momentum


def sparsify(
    inner: optax.GradientTransformation,
    *,
    density: optax.ScalarOrSchedule,
    update_every: int,
    total_steps: int,
    prune: str | Criterion = criteria.magnitude,
    grow: str | Criterion | None = criteria.momentum,
    redistribute: str | Criterion | None = criteria.mean_momentum,
    prune_rate: optax.ScalarOrSchedule = 0.5,
    prune_scope: str = 'layer',
    start_step: int = 0,
    stop_step: int | None = None,
    distribution: str | Mapping[str, float] | distributions.Distribution = 'uniform',
    granularity: str | granularity_lib.Granularity = granularity_lib.Unstructured(),
    sparsifiable: PathPredicate | None = None,
    dense: Sequence[str] = (),
    stacked: PathPredicate | None = None,
    momentum: momentum_lib.MomentumOption = None,
    track_exploration: bool = False,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that it trains a sparse network, moving weights every `update_every` steps.

    With the inner optimizer's update u and :math:`q = p + u`, an ordinary step is

    .. math:: \Delta p = u \text{ on the mask}, \quad -p \text{ off it}

    so that ``params + updates`` is exactly zero off the mask. At step t (1-based) with ``start_step < t``, ``t % update_every == 0``
    and ``t < (stop_step or total_steps)`` each layer prunes the :math:`\lceil \rho(t)\, n \rceil` of its n active weights with the
    smallest scores; the T weights pruned in all are shared out over the layers by ``redistribute``; and each layer grows its
    target at the missing positions with the largest scores, the just-pruned included. A weight pruned and regrown in one update
    keeps its value, a new one starts at 0. The number of nonzeros is exactly conserved at every step. Ties go to the lowest index.

    Where ``density`` is a schedule d, the update at t also brings the total to :math:`\mathrm{round}(d(t)\, n)` of the n units: when
    it falls, what the layers have above the distribution's counts for the last density is pruned first (with ``redistribute``: the
    same part of each layer), before the prune rate takes its part of the rest; when it rises, the surplus is shared out as the
    growth is (without ``redistribute``: by the room that layers have). With ``grow=None`` nothing is grown, the prune rate is not
    used, and the total only falls with its schedule; with a constant density the mask is then fixed.

    Gradients must be dense (never masked): the momentum of missing weights tells where to grow.

    In a chain nothing that changes updates may come after it; clipping and the like go before it or into ``inner``.
    ``check_sparse`` tells. Inside ``optax.MultiSteps`` and ``optax.apply_if_finite`` skipped steps do not count as steps;
    ``optax.lookahead`` is not supported (its slow weights are not sparse, and resetting the state is refused by the random key).
    Under ``optax.inject_hyperparams`` name all arguments but the learning rate in ``static_args``, or inject into ``inner``.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights (in blocks: units) that exist, in (0, 1], the total is exact; or a schedule of t.
      update_every: steps between mask updates.
      total_steps: length of the training, in steps; the prune rate is annealed over it.
      prune: scores of the active weights, the smallest are pruned; a name or function of :mod:`sparse_jax.criteria`, or your own.
      grow: scores of the missing weights, the largest are grown; likewise. None: nothing is grown.
      redistribute: a layer's share of the growth; likewise. None: each layer regrows what it pruned.
      prune_rate: part of a layer's weights that an update prunes: the start of a cosine that ends at 0.005, or a schedule of t.
      prune_scope: ``'layer'``, or ``'global'``: one threshold over all layers decides which weights go, as many as by layer. Under a
        density schedule it decides what the fall takes, and what the prune rate takes stays by layer. No layer loses its last unit.
      start_step: no update up to this step.
      stop_step: no update from this step on; None: ``total_steps``.
      distribution: initial nonzeros of each layer: ``'uniform'``, ``'erdos_renyi'``, ``'erk'``; a mapping of path patterns to
        densities; or a function, see :mod:`sparse_jax.distributions`.
      granularity: what one unit of selection is: ``'unstructured'``, ``'block:16x16'``, or see :mod:`sparse_jax.granularity`.
      sparsifiable: which leaves are sparse, by (path joined by ``/``, leaf); None: floating-point leaves with two or more axes
        whose path contains none of ``embed``, ``norm``, ``bias``, ``scale``.
      dense: path patterns (``*`` matches anything) of leaves that stay dense and count in no budget, such as a first or last layer.
      stacked: which leaves hold layers along their first axis, by (path, leaf); each slice is a layer of its own. None: none.
      momentum: where the inner state keeps its momentum: a NamedTuple field's name, or a function of the inner state. None: it is
        found (``trace``; Adam's ``mu / (sqrt(nu) + 1e-8)``; ``mu``), and where there is none, or several, an average of the
        gradients with decay 0.9 is kept beside it, as with ``'gradient_average'`` in any case.
      track_exploration: whether to keep which weights have ever been active, for ``sj.stats.exploration_rate``; a byte a weight.
      seed: of the first masks and of random criteria: an integer, or a typed random key that nothing else uses.

    Returns:
      An optax transformation whose state is a :class:`SparsifyState` and whose ``update`` requires ``params``.

    Raises:
      ValueError: for arguments out of range (here); for params without a sparsifiable leaf or a budget below one weight a layer
        (``init``); for missing params or those of another tree or shape, or what a criterion returns (``update``).

    Example:
      >>> import jax, optax, sparse_jax as sj
      >>> params = {'w': jnp.ones((8, 8)), 'bias': jnp.zeros(8)}
      >>> tx = sj.sparsify(optax.adamw(1e-3), density=0.25, update_every=2, total_steps=10)
      >>> state = tx.init(params)
      >>> params = sj.apply_masks(params, sj.get_masks(state))
      >>> for _ in range(4):
      ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int((params['w'] != 0).sum()), int(sj.get_masks(state)['w'].sum())
      (16, 16)

    Reference:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch: Faster Training without Losing Performance
      <https://arxiv.org/abs/1907.04840>`_, 2019.
    """
    prune_by, grow_by, share_by = (
        criteria.get(name, value) for name, value in (('prune', prune), ('grow', grow), ('redistribute', redistribute))
    )
    share_by = None if grow_by is None else share_by  # nothing is grown: nothing is shared out
    fixed = grow_by is None and not callable(density)  # the mask is
    arguments.check(density, update_every, total_steps, prune_rate, start_step, stop_step, seed)
    arguments.check_functions(inner, sparsifiable, stacked)
    arguments.check_criteria(prune=prune_by, grow=grow_by, redistribute=share_by)
    needed = criteria.requirements(*([] if fixed else [prune_by, grow_by, share_by]))
    assert prune_by is not None
    arguments.check_rule(prune_by, prune_scope, update_every, needed['accumulated_gradient'], dense)
    timing: dict[str, Any] = dict(update_every=update_every, total_steps=total_steps, start_step=start_step, stop_step=stop_step)
    last_density: Any = density
    least_density: Any = density
    if callable(density):
        last_density, least_density = arguments.check_density_schedule(density, can_grow=grow_by is not None, **timing)
    rate_schedule = prune_rate if callable(prune_rate) else schedules.cosine(prune_rate, total_steps)
    distribute = distributions.get(distribution)
    units = granularity_lib.get(granularity)
    inner = optax.with_extra_args_support(inner)
    keep_ever_active = needed['ever_active'] or track_exploration

    def initial_counts(layers, at_density):
        """Units of each layer at a density; checks it."""
        if at_density == 1:  # whatever the distribution
            return grouping.unit_counts(units, layers)
        names = masks_lib.names_of(layers)
        sizes = grouping.unit_counts(units, layers)
        shapes = [layer.shape for layer in layers for _ in range(layer.depth or 1)]
        table = [distributions.Layer(*row) for row in zip(names, shapes, sizes, strict=True)]
        return distributions.counts(distribute, table, at_density)

    def rule(layers) -> grouping.Rule:
        budgets, final = None, ()
        if callable(density):
            sizes = grouping.unit_counts(units, layers)
            budgets = schedules.budgets(density, sum(sizes), **timing)
            # With redistribution the layers keep the proportions that they have found.
            final = tuple(initial_counts(layers, last_density) if share_by is None else [0] * len(sizes))
        return grouping.Rule(
            prune_by, grow_by, share_by, rate_schedule, prune_scope == 'global', units, update_every, budgets, final
        )

    def init_masks(params, key):
        leaves, treedef = jax.tree.flatten(params)
        layers = masks_lib.layer_table(params, masks_lib.sparse_leaves(params, sparsifiable, dense), stacked)
        if leaves and not layers:
            raise ValueError(
                'no leaf of params is sparsifiable. By default that takes a floating-point leaf with two or more axes whose path '
                "contains none of 'embed', 'norm', 'bias', 'scale'; sparsifiable=lambda path, leaf: ... chooses others."
            )
        num_layers = layers[-1].stop if layers else 0
        if num_layers > allocation.MAX_LAYERS:
            raise ValueError(f'params has {num_layers} sparse layers; at most {allocation.MAX_LAYERS} are supported.')
        if callable(density) and layers:
            initial_counts(layers, last_density)
            distributions.budget([distributions.Layer('', (), n) for n in grouping.unit_counts(units, layers)], least_density)
        first = density if not callable(density) else float(schedules.densities(density, np.array([0]))[0])
        counts = jnp.asarray(initial_counts(layers, first), jnp.int32)
        keys = jax.random.split(key, max(num_layers, 1))
        scores = [
            jax.vmap(lambda key, shape=units.unit_shape(layer.shape): jnp.maximum(jax.random.bits(key, shape), 1))(
                keys[layer.start : layer.stop]
            )
            for layer in layers
        ]
        masks = [jnp.array(True) for _ in leaves]
        for layer, chosen in zip(layers, selection.select(scores, counts) if layers else [], strict=True):
            mask = jax.vmap(lambda row, layer=layer: units.expand(row, layer.shape))(chosen)
            masks[layer.leaf] = mask[0] if layer.depth is None else mask
        return jax.tree.unflatten(treedef, masks), num_layers

    def advance(grads, inner_state, average, params, extra_args):
        """One inner step: its updates, its state, the gradient average (None: not kept), and the momentum."""
        updates, inner_state = inner.update(grads, inner_state, params, **extra_args)
        found = momentum_lib.find(inner_state, jax.tree.structure(params), momentum)
        if found is not None or average is None:
            return updates, inner_state, None, found
        average = jax.tree.map(
            lambda a, g: a if a.ndim == 0 and g.ndim > 0 else _AVERAGE_DECAY * a + (1 - _AVERAGE_DECAY) * g.astype(jnp.float32),
            average,
            grads,
        )
        return updates, inner_state, average, average

    def move_weights(layers, t, rng_key, grads, inner_state, average, accumulated, params, masks, grown, ever_active, extra_args):
        """The mask update: new masks, newly grown positions, positions ever active, and stats."""
        treedef = jax.tree.structure(params)

        def load(operands, own_masks, members):
            grads, inner_state, average, accumulated, ever_active, params = operands
            updates, _, _, momenta = advance(grads, inner_state, average, params, extra_args)
            params, updates, grads = map(treedef.flatten_up_to, (params, updates, grads))
            momenta, ever, total = (
                [None] * len(params) if x is None else treedef.flatten_up_to(x) for x in (momenta, ever_active, accumulated)
            )
            return [
                grouping.Operands((params[i] + updates[i]).astype(params[i].dtype), mask, grads[i], momenta[i], ever[i], total[i])
                for mask, i in zip(own_masks, [layers[m].leaf for m in members], strict=True)
            ]

        masks, grown = map(treedef.flatten_up_to, (masks, grown))
        operands = grads, inner_state, average, accumulated, ever_active if needed['ever_active'] else None, params
        sparse = [layer.leaf for layer in layers]
        new_masks, new_grown, stats = mask_update.move(
            rule(layers), layers, load, operands, [masks[i] for i in sparse], [grown[i] for i in sparse], t, rng_key
        )
        ever = None if ever_active is None else treedef.flatten_up_to(ever_active)
        for layer, mask, new in zip(layers, new_masks, new_grown, strict=True):
            if ever is not None:
                ever[layer.leaf] = ever[layer.leaf] | mask
            masks[layer.leaf], grown[layer.leaf] = mask, new
        if ever is not None:
            ever_active = jax.tree.unflatten(treedef, ever)
        return jax.tree.unflatten(treedef, masks), jax.tree.unflatten(treedef, grown), ever_active, stats

    def init_fn(params):
        # An integer's key is folded with a constant: masks drawn from the very bits of the weights would keep the largest ones.
        rng_key = jnp.copy(seed) if arguments.is_key(seed) else jax.random.fold_in(jax.random.key(seed), _MASK_STREAM)
        masks, num_layers = init_masks(params, rng_key)
        inner_state = inner.init(params)
        if any(arguments.is_lookahead(x) for x in jax.tree.leaves(inner_state, is_leaf=arguments.is_lookahead)):
            raise ValueError(
                'inner: optax.lookahead is not supported: its slow weights are not sparse. Wrap its fast optimizer alone.'
            )
        method_state = {}
        if momentum_lib.find(inner_state, jax.tree.structure(params), momentum) is None and needed['momentum']:
            method_state['gradient_average'] = jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), masks)
        if keep_ever_active:
            method_state['ever_active'] = jax.tree.map(jnp.copy, masks)
        if needed['accumulated_gradient']:
            method_state['accumulated_gradient'] = jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), masks)
        zeros = [jnp.zeros(num_layers, dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32, jnp.int32)]  # each its own buffer
        return SparsifyState(
            count=jnp.zeros([], jnp.int32),
            rng_key=rng_key,
            masks=masks,
            grown=jax.tree.map(jnp.zeros_like, masks),
            inner_state=inner_state,
            stats=UpdateStats(*zeros),
            method_state=method_state,
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError('sparsify needs the current params: call tx.update(grads, state, params).')
        arguments.check_params(params, state.masks)
        grads = updates
        in_order = iter(jax.tree.leaves(state.masks))
        layers = masks_lib.layer_table(params, lambda path, leaf: next(in_order).ndim > 0, stacked)
        average, ever_active, accumulated = (
            state.method_state.get(name) for name in ('gradient_average', 'ever_active', 'accumulated_gradient')
        )
        t = jnp.asarray(optax.safe_increment(state.count))
        if not layers:
            raise ValueError('no leaf of params is sparse.')
        is_update = jnp.asarray(schedules.is_update(t, **timing))
        if accumulated is not None:
            phase = (t - 1) % update_every - (update_every - needed['accumulated_gradient'])
            accumulated = jax.tree.map(
                lambda a, g: a if a.ndim == 0 else jnp.where(phase < 0, a, jnp.where(phase == 0, 0, a) + g.astype(jnp.float32)),
                accumulated,
                grads,
            )

        # The ordinary step must not pay for the update it does not do. On a mask update the branch repeats the inner step rather
        # than take its results as operands: an operand is written to memory, and this way u never is on ordinary steps. The masks
        # and the last growth pass through the other branch in their own buffers. Both hold only if XLA knows that the branch
        # reads the optimizer's state before the step below overwrites it: hence the gradients are made to depend on the branch,
        # through a flag that is always True, which costs a comparison and no memory traffic.
        def move(operands):
            grads, inner_state, average, accumulated, params, masks, grown, ever_active, _, t, rng_key = operands
            moved = move_weights(
                layers, t, rng_key, grads, inner_state, average, accumulated, params, masks, grown, ever_active, extra_args
            )
            return *moved, t > 0

        def stay(operands):
            *_, masks, grown, ever_active, stats, t, _ = operands
            return masks, grown, ever_active, stats, t > 0

        moving = state.masks, state.grown, ever_active, state.stats
        if fixed:
            masks, grown, ever_active, stats = moving
        else:
            operands = (grads, state.inner_state, average, accumulated, params, *moving, t, state.rng_key)
            masks, grown, ever_active, stats, done = lax.cond(is_update, move, stay, operands)
            grads = jax.tree.map(lambda g: jnp.where(done, g, jnp.zeros((), g.dtype)), grads)
        updates, inner_state, average, _ = advance(grads, state.inner_state, average, params, extra_args)

        def finish(mask, new, u, p):  # a weight that is new in this update starts at 0, a regrown one keeps its value
            return u if mask.ndim == 0 else jnp.where(mask & ~(new & is_update), u, -p)

        updates = jax.tree.map(finish, masks, grown, updates, params)
        kept = {'gradient_average': average, 'ever_active': ever_active, 'accumulated_gradient': accumulated}
        method_state = {**state.method_state, **{name: tree for name, tree in kept.items() if tree is not None}}
        return updates, SparsifyState(t, state.rng_key, masks, grown, inner_state, stats, method_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
