"""The core: any optax optimizer, made to train a network that is sparse from its first step to its last."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_jax import _arguments, criteria, distributions, redistribution, schedules, selection
from sparse_jax import granularity as granularity_lib
from sparse_jax import masks as masks_lib
from sparse_jax import momentum as momentum_lib
from sparse_jax.masks import Layer, PathPredicate, SparsifyState, UpdateStats

Criterion = Callable[[criteria.LeafInfo], jax.Array]

_MASK_STREAM = 0x6D61736B  # 'mask' in ASCII
_AVERAGE_DECAY = 0.9  # of the gradient average that stands in for a missing momentum


def _over(layer: Layer, function):
    """`function` of one layer's arrays, over all layers of a stacked leaf."""
    return function if layer.depth is None else jax.vmap(function)


def _pick(layer: Layer, per_layer):
    """The entries of a vector over all layers that belong to one leaf."""
    return per_layer[layer.start] if layer.depth is None else per_layer[layer.start : layer.stop]


def _join(values) -> jax.Array:
    """One value a leaf, scalars or (stacked) vectors, as one vector over all layers."""
    return jnp.concatenate([jnp.atleast_1d(v) for v in values])


def sparsify(
    inner: optax.GradientTransformation,
    *,
    density: float,
    update_every: int,
    total_steps: int,
    prune: Criterion = criteria.magnitude,
    grow: Criterion = criteria.momentum,
    redistribute: Criterion | None = criteria.mean_momentum,
    prune_rate: optax.ScalarOrSchedule = 0.5,
    start_step: int = 0,
    stop_step: int | None = None,
    distribution: str | distributions.Distribution = 'uniform',
    granularity: str | granularity_lib.Unstructured = granularity_lib.Unstructured(),
    sparsifiable: PathPredicate | None = None,
    stacked: PathPredicate | None = None,
    momentum: momentum_lib.MomentumOption = None,
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

    Gradients must be dense (never masked): the momentum of missing weights tells where to grow.

    In a chain nothing that changes updates may come after it; clipping and the like go before it or into ``inner``.
    ``check_sparse`` tells. Inside ``optax.MultiSteps`` and ``optax.apply_if_finite`` skipped steps do not count as steps;
    ``optax.lookahead`` is not supported (its slow weights are not sparse, and resetting the state is refused by the random key).
    Under ``optax.inject_hyperparams`` name all arguments but the learning rate in ``static_args``, or inject into ``inner``.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist, in (0, 1]; the total is exact.
      update_every: steps between mask updates.
      total_steps: length of the training, in steps; the prune rate is annealed over it.
      prune: scores of the active weights; the smallest are pruned.
      grow: scores of the missing weights; the largest are grown.
      redistribute: a layer's share of the growth; None: each layer regrows what it pruned.
      prune_rate: part of a layer's weights that an update prunes: the start of a cosine that ends at 0.005, or a schedule of t.
      start_step: no update up to this step.
      stop_step: no update from this step on; None: ``total_steps``.
      distribution: initial nonzeros of each layer: a name, or a function of (sizes, density).
      granularity: what one unit of selection is.
      sparsifiable: which leaves are sparse, by (path joined by ``/``, leaf); None: floating-point leaves with two or more axes
        whose path contains none of ``embed``, ``norm``, ``bias``, ``scale``.
      stacked: which leaves hold layers along their first axis, by (path, leaf); each slice is a layer of its own. None: none.
      momentum: where the inner state keeps its momentum: a NamedTuple field's name, or a function of the inner state. None: it is
        found (``trace``; Adam's ``mu / (sqrt(nu) + 1e-8)``; ``mu``), and where there is none, or several, an average of the
        gradients with decay 0.9 is kept beside it.
      seed: of the first masks and of random criteria: an integer, or a typed random key that nothing else uses.

    Returns:
      An optax transformation whose state is a :class:`SparsifyState` and whose ``update`` requires ``params``.

    Raises:
      ValueError: for arguments out of range (here); for params without a sparsifiable leaf or a budget below one weight a layer
        (``init``); for missing params or those of another tree or shape (``update``).

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
    _arguments.check(density, update_every, total_steps, prune_rate, start_step, stop_step, seed)
    rate_schedule = prune_rate if callable(prune_rate) else schedules.cosine(prune_rate, total_steps)
    distribute = distributions.get(distribution)
    granularity_lib.get(granularity)
    is_sparse = sparsifiable or masks_lib.default_sparsifiable
    last_step = total_steps if stop_step is None else stop_step
    inner = optax.with_extra_args_support(inner)

    def init_masks(params, key):
        leaves, treedef = jax.tree.flatten(params)
        layers = masks_lib.layer_table(params, is_sparse, stacked)
        if leaves and not layers:
            raise ValueError(
                'no leaf of params is sparsifiable. By default that takes a floating-point leaf with two or more axes whose path '
                "contains none of 'embed', 'norm', 'bias', 'scale'; sparsifiable=lambda path, leaf: ... chooses others."
            )
        sizes = [math.prod(layer.shape) for layer in layers for _ in range(layer.depth or 1)]
        if len(sizes) > redistribution.MAX_LAYERS:
            raise ValueError(f'params has {len(sizes)} sparse layers; at most {redistribution.MAX_LAYERS} are supported.')
        nonzeros = distribute(sizes, density) if sizes else []
        if len(nonzeros) != len(sizes) or not all(1 <= n <= size for n, size in zip(nonzeros, sizes, strict=True)):
            raise ValueError(
                f'distribution returned {nonzeros} for layers of {sizes} weights: it must give each layer 1 to all of them.'
            )
        nonzeros = jnp.asarray(nonzeros, jnp.int32)
        keys = jax.random.split(key, max(len(sizes), 1))
        masks = [jnp.array(True) for _ in leaves]
        for layer in layers:

            def choose(key, k, shape=layer.shape):
                return selection.select_largest(jax.random.bits(key, shape), k, jnp.ones(shape, bool))

            masks[layer.leaf] = _over(layer, choose)(_pick(layer, keys), _pick(layer, nonzeros))
        return jax.tree.unflatten(treedef, masks), len(sizes)

    def advance(grads, inner_state, average, params, extra_args):
        """One inner step: its updates, its state, the gradient average (None: not kept), and the momentum."""
        updates, inner_state = inner.update(grads, inner_state, params, **extra_args)
        found = momentum_lib.find(inner_state, jax.tree.structure(params), momentum)
        if found is not None:
            return updates, inner_state, None, found
        average = jax.tree.map(
            lambda a, g: a if a.ndim == 0 and g.ndim > 0 else _AVERAGE_DECAY * a + (1 - _AVERAGE_DECAY) * g.astype(jnp.float32),
            average,
            grads,
        )
        return updates, inner_state, average, average

    def move_weights(layers, t, rng_key, grads, inner_state, average, params, masks, extra_args):
        """The mask update: new masks, newly grown positions, and stats."""
        updates, _, _, momenta = advance(grads, inner_state, average, params, extra_args)
        treedef = jax.tree.structure(params)
        params, updates, grads, momenta, masks = map(treedef.flatten_up_to, (params, updates, grads, momenta, masks))
        keys = jax.random.split(jax.random.fold_in(rng_key, t), layers[-1].stop)

        infos, movable, counts = [], [], []
        for layer in layers:
            i = layer.leaf
            weight = (params[i] + updates[i]).astype(params[i].dtype)
            infos.append(criteria.LeafInfo(weight, masks[i], grads[i], momenta[i], _pick(layer, keys)))
            movable.append(jnp.isfinite(weight))
            count = _over(layer, selection.count)
            counts.append((count(masks[i]), count(~masks[i]), count(masks[i] & movable[-1])))
        nonzeros, missing, prunable = (_join(c) for c in zip(*counts, strict=True))

        shares = None
        if redistribute is not None:
            share = [_over(layer, redistribute)(info) for layer, info in zip(layers, infos, strict=True)]
            shares = redistribution.weights(_join(share).astype(jnp.float32))
        rate = jnp.clip(jnp.nan_to_num(jnp.asarray(rate_schedule(t), jnp.float32)), 0, 1)
        pruned = redistribution.prune_counts(rate, nonzeros, missing, prunable, shares)

        kept, room = [], []
        for layer, info, may_move in zip(layers, infos, movable, strict=True):

            def prune_layer(info, may_move, k):
                kept = info.mask & ~selection.select_smallest(selection.score_bits(prune(info)), k, info.mask & may_move)
                return kept, selection.count(~kept & may_move)

            kept_leaf, room_leaf = _over(layer, prune_layer)(info, may_move, _pick(layer, pruned))
            kept.append(kept_leaf)
            room.append(room_leaf)
        targets = redistribution.growth_targets(pruned, shares, _join(room))

        grown, new = [jnp.array(False) for _ in masks], []
        for layer, info, may_move, kept_leaf in zip(layers, infos, movable, kept, strict=True):

            def grow_layer(info, may_move, k):
                return info.mask | selection.select_largest(selection.score_bits(grow(info)), k, ~info.mask & may_move)

            old = masks[layer.leaf]
            active = _over(layer, grow_layer)(info._replace(mask=kept_leaf), may_move, _pick(layer, targets))
            # Written so that the old mask's buffer can become the new mask's: `grown` reads it first.
            grown[layer.leaf] = active & ~old
            masks[layer.leaf] = (old & active) | grown[layer.leaf]
            new.append(_over(layer, selection.count)(grown[layer.leaf]))

        if shares is None:
            share = jnp.zeros(len(nonzeros), jnp.float32)
        else:
            total = jnp.maximum(shares.total, 1).astype(jnp.float32)
            share = redistribution.divide(shares.weight.astype(jnp.float32), total)
        # n - pruned + targets = n - removed + new, so as many as pruned - targets + new positions are now empty
        flipped = 2 * _join(new) + pruned - targets
        stats = UpdateStats(share, pruned, targets, flipped)
        return jax.tree.unflatten(treedef, masks), jax.tree.unflatten(treedef, grown), stats

    def init_fn(params):
        # An integer's key is folded with a constant: masks drawn from the very bits of the weights would keep the largest ones.
        rng_key = jnp.copy(seed) if _arguments.is_key(seed) else jax.random.fold_in(jax.random.key(seed), _MASK_STREAM)
        masks, num_layers = init_masks(params, rng_key)
        inner_state = inner.init(params)
        if any(_arguments.is_lookahead(x) for x in jax.tree.leaves(inner_state, is_leaf=_arguments.is_lookahead)):
            raise ValueError(
                'inner: optax.lookahead is not supported: its slow weights are not sparse. Wrap its fast optimizer alone.'
            )
        method_state = {}
        if momentum_lib.find(inner_state, jax.tree.structure(params), momentum) is None:
            method_state['gradient_average'] = jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), masks)
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
        _arguments.check_params(params, state.masks)
        grads = updates
        in_order = iter(jax.tree.leaves(state.masks))
        layers = masks_lib.layer_table(params, lambda path, leaf: next(in_order).ndim > 0, stacked)
        average = state.method_state.get('gradient_average')
        t = jnp.asarray(optax.safe_increment(state.count))
        if not layers:
            raise ValueError('no leaf of params is sparse.')
        is_update = (start_step < t) & (t % update_every == 0) & (t < last_step)

        # The ordinary step must not pay for the update it does not do. On a mask update the branch repeats the inner step rather
        # than take its results as operands: an operand is written to memory, and this way u never is on ordinary steps. The masks
        # and the last growth pass through the other branch in their own buffers. Both hold only if XLA knows that the branch
        # reads the optimizer's state before the step below overwrites it: hence the gradients are made to depend on the branch,
        # through a flag that is always True, which costs a comparison and no memory traffic.
        def move(operands):
            grads, inner_state, average, params, masks, _, _, t, rng_key = operands
            masks, grown, stats = move_weights(layers, t, rng_key, grads, inner_state, average, params, masks, extra_args)
            return masks, grown, stats, t > 0

        def stay(operands):
            *_, masks, grown, stats, t, _ = operands
            return masks, grown, stats, t > 0

        operands = (grads, state.inner_state, average, params, state.masks, state.grown, state.stats, t, state.rng_key)
        masks, grown, stats, done = lax.cond(is_update, move, stay, operands)
        grads = jax.tree.map(lambda g: jnp.where(done, g, jnp.zeros((), g.dtype)), grads)
        updates, inner_state, average, _ = advance(grads, state.inner_state, average, params, extra_args)

        def finish(mask, new, u, p):  # a weight that is new in this update starts at 0, a regrown one keeps its value
            return u if mask.ndim == 0 else jnp.where(mask & ~(new & is_update), u, -p)

        updates = jax.tree.map(finish, masks, grown, updates, params)
        method_state = state.method_state if average is None else {**state.method_state, 'gradient_average': average}
        return updates, SparsifyState(t, state.rng_key, masks, grown, inner_state, stats, method_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
