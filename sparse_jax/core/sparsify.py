"""The core: any optax optimizer, made to train a network that is sparse from its first step to its last."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_jax.core import arguments, criteria, distributions, initial, mask_update, numerics, values
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import inner as inner_lib
from sparse_jax.core import momentum as momentum_lib
from sparse_jax.core.criteria import Criterion
from sparse_jax.core.layers import PathPredicate
from sparse_jax.core.masks import SparsifyState
from sparse_jax.core.matrix_axes import MatrixAxes
from sparse_jax.core.rule import Rule
from sparse_jax.core.schedules import Timing


@arguments.stated_once(rule=None, timing=('update_every', 'total_steps', 'start_step', 'stop_step'))
def sparsify(
    inner: optax.GradientTransformation,
    *,
    density: optax.ScalarOrSchedule | None = None,
    update_every: int | None = None,
    total_steps: int | None = None,
    prune: str | Criterion = criteria.magnitude,
    grow: str | Criterion | None = criteria.momentum,
    redistribute: str | Criterion | None = 'default',
    prune_rate: optax.ScalarOrSchedule = 0.5,
    prune_scope: str = 'layer',
    start_step: int = 0,
    stop_step: int | None = None,
    distribution: str | Mapping[str, float] | distributions.Distribution = 'uniform',
    granularity: str | granularity_lib.Granularity = granularity_lib.Unstructured(),
    sparsifiable: PathPredicate | None = None,
    dense: Sequence[str] = (),
    stacked: PathPredicate | None = None,
    matrix_axes: str | MatrixAxes | None = None,
    ablation: float = 0.0,
    keep_outputs: Sequence[str] | None = None,
    enters_with: str = 'zero',
    backward_density: float | None = None,
    momentum: momentum_lib.MomentumOption = None,
    track_exploration: bool = False,
    seed: int | jax.Array = 0,
    rule: Rule | None = None,
    timing: Timing | None = None,
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
    ``optax.lookahead`` is not supported (its slow weights are not sparse, and resetting the state would average masks: both are refused).
    Under ``optax.inject_hyperparams`` name all arguments but the learning rate in ``static_args``, or inject into ``inner``.

    Args:
      inner: an optax transformation. Those that keep weights of their own, or evaluate at others, are refused by ``init``, and so are leaves
        that it freezes (see docs/optimizers.md).
      density: share of the sparse leaves' weights (in blocks: units) that exist, in (0, 1], the total is exact; or a schedule of t.
      update_every: steps between mask updates.
      total_steps: length of the training, in steps; the prune rate is annealed over it.
      prune: scores of the active weights, the smallest are pruned; a name or function of :mod:`sparse_jax.criteria`, or your own.
      grow: scores of the missing weights, the largest are grown; likewise. None: nothing is grown.
      redistribute: a layer's share of the growth; likewise. None: each layer regrows what it pruned. ``'default'``: ``'mean_momentum'``, and
        None where the granularity fixes how many weights each layer has.
      prune_rate: part of a layer's weights that an update prunes: the start of a cosine that ends at 0.005, or a schedule of t.
      prune_scope: ``'layer'``, or ``'global'``: one threshold over all layers decides which weights go, as many as by layer. Under a
        density schedule it decides what the fall takes, and what the prune rate takes stays by layer. No layer loses its last unit.
      start_step: no update up to this step.
      stop_step: no update from this step on; None: ``total_steps``.
      distribution: initial nonzeros of each layer: ``'uniform'``, ``'erdos_renyi'``, ``'erk'``; a mapping of path patterns to
        densities; or a function, see :mod:`sparse_jax.distributions`.
      granularity: what one unit of selection is: ``'unstructured'``; ``'block:16x16'``; ``'n_of_m:2:4'``, 2 of every 4 inputs, at the density 0.5;
        ``'fan_in'``, the same number of inputs for every output; or see :mod:`sparse_jax.granularity`.
      sparsifiable: which leaves are sparse, by (path joined by ``/``, leaf); None: floating-point leaves with two or more axes, unless
        a word of their path begins with ``embed``, ends in ``norm``, or is ``bias`` or ``scale``; or their own name has the word
        ``pos``, ``position`` or ``posemb``, or ends in ``token``.
      dense: path patterns (``*`` matches anything) of leaves that stay dense and count in no budget, such as a first or last layer.
      stacked: which leaves hold layers along their first axis, by (path, leaf); each slice is a layer of its own. None: none.
      matrix_axes: which axes of a leaf are inputs and which outputs, where they are not the last two: ``'flax'`` (its attention kernels),
        ``'torch'`` (PyTorch's and Equinox's layouts), or a function of (path, leaf of one layer), see :mod:`sparse_jax.matrix_axes`.
      ablation: with ``'fan_in'``, at an update: an output with fewer salient weights than this part of the layer's inputs (at least 1) loses
        all of its inputs to the others; see :func:`sparse_jax.methods.srigl`. 0: outputs stay.
      keep_outputs: path patterns of leaves that lose no outputs, such as the output layer; None: the last layer.
      enters_with: what a grown weight starts at: ``'zero'``, or ``'value'``: what the optimizer's step makes of it, so that with
        ``prune_rate=sj.schedules.constant(1.0)`` and ``'magnitude'`` for both criteria the largest weights of each layer stay.
      backward_density: with ``'value'``: share of the weights that are trained, whether they are in the forward pass or not. The values of
        those that are not are kept in ``method_state['stored']``; see :func:`sparse_jax.methods.top_kast`. None: those of the forward pass.
      momentum: where the inner state keeps its momentum: a NamedTuple field's name, or a function of the inner state. None: it is
        found (``trace``; Adam's ``mu / (sqrt(nu) + 1e-8)``; ``mu``), and where there is none, or several, or one that is scaled layer by
        layer, an average of the gradients with decay 0.9 is kept beside it, as with ``'gradient_average'`` in any case.
      track_exploration: whether to keep which weights have ever been active, for ``sj.stats.exploration_rate``; a byte a weight.
      seed: of the first masks and of random criteria: an integer, or a typed random key that nothing else uses.
      rule: a :class:`sparse_jax.Rule` in place of all arguments above but ``inner``.
      timing: a :class:`sparse_jax.Timing` in place of ``update_every``, ``total_steps``, ``start_step`` and ``stop_step``.

    Returns:
      An optax transformation whose state is a :class:`SparsifyState` and whose ``update`` requires ``params``. Its ``update`` also
      takes ``update_masks=True``, a Python bool that passes through chains: weights then move in this step, whatever the timing says
      (False: they do not; None: by the timing). The step's gradients must be dense.

    Raises:
      ValueError: for arguments out of range, or stated twice (here); for params without a sparsifiable leaf or a budget below one weight a layer
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
    arguments.check_inner(inner)
    if rule is None:
        required = arguments.required
        parts: dict[str, Any] = dict(
            prune=prune, grow=grow, redistribute=redistribute, prune_rate=prune_rate, prune_scope=prune_scope,
            distribution=distribution, granularity=granularity, sparsifiable=sparsifiable, dense=dense, stacked=stacked,
            matrix_axes=matrix_axes, ablation=ablation, keep_outputs=keep_outputs,
            enters_with=enters_with, backward_density=backward_density,
            momentum=momentum, track_exploration=track_exploration, seed=seed,
        )  # fmt: skip
        if timing is None:
            steps = required('update_every', update_every), required('total_steps', total_steps)
            timing = Timing(*steps, start_step, stop_step)
        rule = Rule(density=required('density', density), timing=timing, **parts)
    arguments.check_type('rule', rule, Rule)
    inner = optax.with_extra_args_support(inner)
    return optax.GradientTransformationExtraArgs(
        functools.partial(initial.initial_state, inner, rule),
        functools.partial(_update, inner, rule),  # pyright: ignore[reportArgumentType]
    )


@numerics.lenient
def _update(
    inner: optax.GradientTransformationExtraArgs,
    rule: Rule,
    updates: Any,
    state: Any,
    params: Any = None,
    *,
    update_masks: bool | None = None,
    **extra_args: Any,
) -> tuple[Any, SparsifyState]:
    arguments.check_params(params, state.masks)
    arguments.check_masks(state.masks)
    arguments.check_gradients(updates, params)
    inner_lib.check_state(inner, state.inner_state, updates, params, extra_args)
    rule = initial.resolved(inner, rule, params)
    arguments.check_state(state, params, rule, initial.kept(rule, state.inner_state, params))
    arguments.check_update_masks(rule, update_masks)
    t = jnp.asarray(optax.safe_increment(state.count))
    is_update = jnp.asarray(rule.timing.is_update(t)) if update_masks is None else update_masks
    grads = updates
    accumulated = momentum_lib.accumulate(
        state.method_state.get('accumulated_gradient'),
        grads,
        t,
        steps=rule.needs.accumulated_gradient,
        update_every=rule.timing.update_every,
    )
    operands = mask_update.Operands(
        grads=grads,
        inner_state=state.inner_state,
        average=state.method_state.get('gradient_average'),
        accumulated=accumulated,
        params=values.whole(params, state),
        masks=state.masks,
        grown=state.grown,
        ever_active=state.method_state.get('ever_active'),
        backward=state.method_state.get('backward'),
        budget=state.method_state.get('budget'),
        stats=state.stats,
        t=t,
        rng_key=rule.key_of(state.rng_key),
    )
    moved = mask_update.Moved.unmoved(operands)
    if not rule.is_fixed and update_masks is not False:
        moved, grads = _moved(inner, rule, operands, is_update, extra_args)
    read = momentum_lib.Read(
        grads, state.inner_state, operands.average, accumulated, operands.ever_active, operands.params, operands.backward
    )
    updates, inner_state, average, _ = momentum_lib.advance(inner, rule.momentum, read, extra_args)
    kept = {
        'gradient_average': average,
        'ever_active': moved.ever_active,
        'accumulated_gradient': accumulated,
        'backward': moved.backward,
        'stored': values.stored(moved.masks, updates, operands.params) if 'stored' in state.method_state else None,
    }
    updates = values.updates(rule, state, moved, is_update, updates, params)
    return updates, state._replace(
        count=t,
        masks=moved.masks,
        grown=moved.grown,
        inner_state=inner_state,
        stats=moved.stats,
        method_state={**state.method_state, **{name: tree for name, tree in kept.items() if tree is not None}},
    )


def _moved(inner, rule: Rule, operands: mask_update.Operands, is_update: Any, extra_args: Any) -> tuple[mask_update.Moved, Any]:
    """The masks after this step, and the gradients, which from here on depend on them.

    The ordinary step must not pay for the update it does not do. On a mask update the branch repeats the inner step rather
    than take its results as operands: an operand is written to memory, and this way u never is on ordinary steps. The masks
    and the last growth pass through the other branch in their own buffers. Both hold only if XLA knows that the branch
    reads the optimizer's state before the step itself overwrites it: hence the gradients are made to depend on the branch,
    through a flag that is always True, which costs a comparison and no memory traffic.
    """

    def move(operands: mask_update.Operands):
        return mask_update.move_weights(inner, rule, operands, extra_args), operands.t > 0

    def stay(operands: mask_update.Operands):
        return mask_update.Moved.unmoved(operands), operands.t > 0

    if isinstance(is_update, bool):
        moved, done = mask_update.move_weights(inner, rule, operands, extra_args, by_hand=True), operands.t > 0
    else:
        moved, done = lax.cond(is_update, move, stay, operands)
    return moved, jax.tree.map(lambda g: jnp.where(done, g, jnp.zeros((), jnp.result_type(g))), operands.grads)
