"""What decides which weights are pruned, which are grown, and how much each layer is worth.

A criterion is a plain function of one layer's :class:`LeafInfo`. Prune and grow criteria return non-negative scores of the layer's
shape: the smallest scores are pruned, the largest grown; scores that are not finite count as 0, and of negative ones the
magnitude counts. In blocks the score of a
unit is the mean of its weights' scores. Redistribute criteria return one number, the layer's share, on any scale that the layers
have in common. Writing one takes a line::

    def magnitude_times_variance(info):
        return jnp.abs(info.weight) * jnp.square(info.momentum)

A criterion that reads one of the last two fields of ``LeafInfo`` says so with :func:`needs`, and ``sparsify`` keeps it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.core import errors, numerics, selection
from sparse_jax.core import granularity as granularity_lib


class LeafInfo(NamedTuple):
    """What a criterion sees of one layer. All arrays have the layer's shape; its last axis is its outputs."""

    weight: jax.Array  # after the inner optimizer's step: p + u, in p's dtype, on all positions
    mask: jax.Array  # bool, the active positions: before the pruning for prune and redistribute, after it for grow
    gradient: jax.Array  # as given to the optimizer
    momentum: jax.Array  # signed, dense: that of missing weights too
    key: Any  # a typed random key of this layer, update and use
    amount: Any = 0  # int32, how many units this update prunes (to prune and redistribute) or grows (to grow) in this layer
    granularity: granularity_lib.Granularity = granularity_lib.Unstructured()
    ever_active: Any = None  # bool, positions that have been active since the start; kept where a criterion needs it
    accumulated_gradient: Any = None  # float32, sum of the gradients of the last steps up to this one; kept likewise


Criterion = Callable[[LeafInfo], jax.Array]


@dataclasses.dataclass(frozen=True)
class Needs:
    """What criteria read that ``sparsify`` provides only on demand; see :func:`needs`."""

    ever_active: bool = False
    accumulated_gradient: int = 0
    amount: bool = False
    dense_gradients: int | None = None
    momentum: bool = True


def needs(
    *,
    ever_active: bool = False,
    accumulated_gradient: int = 0,
    amount: bool = False,
    dense_gradients: int | None = None,
    momentum: bool = True,
) -> Callable[[Criterion], Criterion]:
    """Marks a criterion that reads what ``sparsify`` provides only on demand: state in ``SparsifyState.method_state``, or an amount.

    Args:
      ever_active: whether it reads ``info.ever_active`` (one byte a weight).
      accumulated_gradient: of how many steps it reads ``info.accumulated_gradient`` (four bytes a weight).
      amount: whether it redistributes and reads ``info.amount``: it is then called once it is known how much each layer prunes.
      dense_gradients: in how many steps before an update it needs the gradients of missing weights to grow; None: in all.
      momentum: whether it reads ``info.momentum``; where no criterion does, and the optimizer has none, none is kept (it is then None).

    Returns:
      A decorator.

    Example:
      >>> @needs(accumulated_gradient=10)
      ... def score(info):
      ...     return jnp.abs(info.accumulated_gradient)
      >>> requirements(score).accumulated_gradient
      10
    """

    def mark(criterion: Criterion) -> Criterion:
        vars(criterion)['needs'] = Needs(ever_active, accumulated_gradient, amount, dense_gradients, momentum)
        return criterion

    return mark


def _needs_of(criterion: Criterion) -> Needs:
    return getattr(criterion, 'needs', Needs())


def requirements(*criteria: Criterion | None) -> Needs:
    """What the given criteria need together (see :func:`needs`); ``dense_gradients`` is that of growth alone."""
    marks = [_needs_of(criterion) for criterion in criteria if criterion is not None]
    steps = sorted({mark.accumulated_gradient for mark in marks if mark.accumulated_gradient})
    if len(steps) > 1:
        raise ValueError(f'criteria need gradients accumulated over {steps} steps: one sum is kept, so they must agree.')
    return Needs(
        ever_active=any(mark.ever_active for mark in marks),
        accumulated_gradient=max(steps, default=0),
        amount=any(mark.amount for mark in marks),
        momentum=any(mark.momentum for mark in marks),
    )


def dense_gradient_steps(grow: Criterion | None) -> int | None:
    """In how many steps up to an update a growth criterion needs the gradients of missing weights; None: in all.

    >>> dense_gradient_steps(gradient), dense_gradient_steps(random), dense_gradient_steps(momentum)
    (1, 0, None)
    """
    return 0 if grow is None else _needs_of(grow).dense_gradients


@needs(momentum=False)
def magnitude(info: LeafInfo) -> jax.Array:
    """Prune by |weight|; grow by the |value| that a missing weight would have after this step.

    >>> magnitude(LeafInfo(jnp.array([1.0, -2.0]), None, None, None, None)).tolist()
    [1.0, 2.0]
    """
    return jnp.abs(info.weight)


def magnitude_times_momentum(info: LeafInfo) -> jax.Array:
    """Prune by |weight| |momentum|: small weights that nothing pulls at (a variant of Dettmers and Zettlemoyer's code)."""
    return jnp.abs(info.weight) * jnp.abs(info.momentum)


@needs(momentum=False)
def taylor(info: LeafInfo) -> jax.Array:
    r"""Prune by \|weight gradient\|, the first-order change of the loss (Molchanov et al., https://arxiv.org/abs/1906.10771)."""
    return jnp.abs(info.weight) * jnp.abs(info.gradient)


@needs(momentum=False)
def magnitude_and_gradient(info: LeafInfo) -> jax.Array:
    r"""Prune by \|weight\| + 0.5 \|gradient\| (MEST: Yuan et al., https://arxiv.org/abs/2110.14032)."""
    return jnp.abs(info.weight) + 0.5 * jnp.abs(info.gradient)


@needs(momentum=False)
def signed_magnitude(info: LeafInfo) -> jax.Array:
    r"""Prune the smallest positive and the largest negative weights, of both signs the same part: SET's rule as published.

    Of the k weights to prune, :math:`k_+ = \mathrm{round}(k n_+ / n)` (halves up) are positive and the others negative, where
    :math:`n_+` of the n active weights are not negative. A weight's score is its magnitude against the largest that goes of its
    sign, so that exactly those score at most 1.

    Reference:
      Mocanu et al., `Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
      <https://arxiv.org/abs/1707.04780>`_, 2018.
    """
    size, negative = jnp.abs(info.weight), info.weight < 0
    finite = info.mask & jnp.isfinite(info.weight)
    groups = jnp.stack([finite & ~negative, finite & negative])
    numbers = jax.vmap(numerics.count)(groups)
    active_units = granularity_lib.active(info.granularity, info.mask)
    # of a part amount / units of the weights, those that are not negative; in blocks units and weights are not the same number
    amount, units = (x.astype(jnp.uint32) for x in (jnp.asarray(info.amount), jnp.maximum(numerics.count(active_units), 1)))
    quotient, remainder = numerics.multiply_divide(
        (numbers[0].astype(jnp.uint32) >> 16, numbers[0].astype(jnp.uint32) & 0xFFFF), amount[None], units
    )
    positive = (quotient + (2 * remainder >= units))[0].astype(jnp.int32)
    weights = granularity_lib.unit_size(info.granularity, info.weight.shape) * amount.astype(jnp.int32)
    pruned = jnp.stack([positive, jnp.maximum(weights - positive, 0)])
    pruned = jnp.minimum(pruned, numbers)
    score = jnp.zeros_like(size, jnp.float32)
    for group, k in zip(groups, pruned, strict=True):
        goes = selection.select_smallest(size, k, group)
        limit = jnp.max(jnp.where(goes, size, 0)).astype(jnp.float32)
        ratio = numerics.divide(size.astype(jnp.float32), jnp.maximum(limit, jnp.finfo(jnp.float32).tiny))
        score = jnp.where(group, jnp.where(goes, jnp.minimum(ratio, 1.0), jnp.maximum(ratio, 1.0 + 2.0**-20)), score)
    return score


def momentum(info: LeafInfo) -> jax.Array:
    """Grow by |momentum|: the paper's rule (Dettmers and Zettlemoyer, https://arxiv.org/abs/1907.04840)."""
    return jnp.abs(info.momentum)


@needs(dense_gradients=1, momentum=False)
def gradient(info: LeafInfo) -> jax.Array:
    """Grow by |gradient| of the update's own step (RigL: Evci et al., https://arxiv.org/abs/1911.11134)."""
    return jnp.abs(info.gradient)


def accumulated_gradient(steps: int) -> Criterion:
    """Grow by |sum of the gradients| of the last steps up to the update's own: RigL for small batches.

    Args:
      steps: how many, at most ``update_every``.

    Returns:
      A grow criterion.

    Raises:
      ValueError: if steps is not an integer of at least 1.

    Example:
      >>> requirements(accumulated_gradient(8)).accumulated_gradient
      8
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f'accumulated_gradient: steps={steps!r} must be an integer, at least 1.')

    @needs(accumulated_gradient=steps, dense_gradients=steps, momentum=False)
    def criterion(info: LeafInfo) -> jax.Array:
        return jnp.abs(info.accumulated_gradient)

    return criterion


@needs(dense_gradients=0, momentum=False)
def random(info: LeafInfo) -> jax.Array:
    """Grow (or prune) at random, by scores uniform in [0, 1), one a unit (SET: Mocanu et al., https://arxiv.org/abs/1707.04780)."""
    units = jax.random.uniform(info.key, info.granularity.unit_shape(info.weight.shape))
    return info.granularity.expand(units, info.weight.shape)


@needs(ever_active=True, dense_gradients=0, momentum=False)
def random_never_active(info: LeafInfo) -> jax.Array:
    """Grow at random among units that have never been active, and where there are none left among the others (ITOP's
    ``random_unfired``: Liu et al., https://arxiv.org/abs/2102.02887)."""
    fired = granularity_lib.active(info.granularity, info.ever_active)
    return random(info) + 1.0 - info.granularity.expand(fired, info.weight.shape)


def momentum_by_neuron(info: LeafInfo) -> jax.Array:
    r"""Grow at the output neurons with the largest mean \|momentum\|: the original's ``momentum_neuron``.

    Each output neuron is given a part of the layer's growth in proportion to the mean \|momentum\| of its weights, active and
    missing, and grows its largest; what does not fit or is left over by rounding goes to the layer's largest \|momentum\|.
    """
    scores = jnp.abs(info.momentum).astype(jnp.float32)
    columns = jnp.moveaxis(scores, -1, 0)
    room = jnp.moveaxis(~info.mask, -1, 0)
    axes = tuple(range(1, columns.ndim))
    means = numerics.mean_magnitude(
        columns,
        jnp.ones(columns.shape, bool),
        lambda x, initial, operation: lax.reduce(x, jnp.asarray(initial, x.dtype), operation, axes),
        lambda x: x.reshape(-1, *[1] * len(axes)),
        columns[0].size,
    )
    # integers whose sum stays below 2^31, however many outputs there are
    scale = 2.0 ** min(20, 30 - len(means).bit_length())
    weight = jnp.round(numerics.divide(means, jnp.maximum(jnp.max(means), jnp.finfo(jnp.float32).tiny)) * scale)
    weight = weight.astype(jnp.uint32)
    units = jnp.asarray(info.amount).astype(jnp.uint32) * granularity_lib.unit_size(info.granularity, info.weight.shape)
    share, _ = numerics.multiply_divide((units >> 16, units & 0xFFFF), weight, jnp.maximum(jnp.sum(weight, dtype=jnp.uint32), 1))
    chosen = jax.vmap(selection.select_largest)(columns, share.astype(jnp.int32), room)
    finite = jnp.where(jnp.isfinite(scores), scores, 0.0)
    relative = numerics.divide(finite, jnp.maximum(jnp.max(finite), jnp.finfo(jnp.float32).tiny))
    return jnp.moveaxis(chosen, 0, -1) + relative


def _mean(values: jax.Array, info: LeafInfo) -> jax.Array:
    return numerics.mean_magnitude(values, info.mask, numerics.reduce_all, lambda x: x, info.mask.size)


def mean_momentum(info: LeafInfo) -> jax.Array:
    r"""Redistribute by the mean \|momentum\| of a layer's active weights: the paper's rule, summed exactly.

    Args:
      info: the layer.

    Returns:
      float32 scalar; 0 for a layer without active weights. Terms that are not finite count as 0.

    Example:
      >>> mask = jnp.array([True, True, False])
      >>> float(mean_momentum(LeafInfo(None, mask, None, jnp.array([1.0, -3.0, 9.0]), None)))
      2.0
    """
    return _mean(info.momentum, info)


@needs(momentum=False)
def mean_magnitude(info: LeafInfo) -> jax.Array:
    """Redistribute by the mean |weight| of a layer's active weights (the original's ``magnitude``), summed exactly."""
    return _mean(info.weight, info)


@needs(momentum=False)
def mean_gradient(info: LeafInfo) -> jax.Array:
    """Redistribute by the mean |gradient| of a layer's active weights, summed exactly."""
    return _mean(info.gradient, info)


@needs(amount=True, momentum=False)
def nonzeros(info: LeafInfo) -> jax.Array:
    """Redistribute by the number of units that a layer has left after the pruning (DSR: https://arxiv.org/abs/1902.05967)."""
    left = numerics.count(granularity_lib.active(info.granularity, info.mask)) - info.amount
    return left.astype(jnp.float32)


PRUNE = {f.__name__: f for f in (magnitude, magnitude_and_gradient, magnitude_times_momentum, signed_magnitude, taylor, random)}
GROW = {f.__name__: f for f in (momentum, momentum_by_neuron, magnitude, gradient, random, random_never_active)}
REDISTRIBUTE = {f.__name__: f for f in (mean_momentum, mean_magnitude, mean_gradient, nonzeros)}


def get(setting: str, criterion: str | Criterion | None) -> Criterion | None:
    """The criterion of that name for the setting `prune`, `grow` or `redistribute`; a function or None as given.

    >>> get('grow', 'gradient').__name__
    'gradient'
    """
    choices = {'prune': PRUNE, 'grow': GROW, 'redistribute': REDISTRIBUTE}[setting]
    if criterion is None or callable(criterion):
        return criterion
    if not isinstance(criterion, str) or criterion not in choices:
        raise errors.unknown(setting, criterion, choices)
    return choices[criterion]
