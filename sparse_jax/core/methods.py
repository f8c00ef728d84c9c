"""Published methods: each one row of parts for :func:`sparse_jax.sparsify`, and a thin function that calls it with them.

ITOP (In-Time Over-Parameterization, Liu et al., https://arxiv.org/abs/2102.02887) needs no method: it is any of them with an
``update_every`` long enough to train what was grown, and as many updates as it takes for the exploration rate
(``sj.stats.exploration_rate``, with ``track_exploration=True``) to come near 1.

An inner optimizer's momentum is not touched by any of them: a new weight starts at 0, with the momentum that its gradients left while
it was missing, and moves with the next step. RigL's and SET's own programs start it without.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from sparse_jax.core import arguments, criteria, distributions, errors, schedules
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import sparsify as sparsify_lib
from sparse_jax.core.layers import PathPredicate
from sparse_jax.core.rule import Rule
from sparse_jax.core.schedules import Timing


def _gradual(initial: float, density: float, update_every: int, total_steps: int, options: Mapping[str, Any]) -> optax.Schedule:
    start, stop = options.get('start_step', 0), options.get('stop_step')
    last = ((total_steps if stop is None else min(stop, total_steps)) - 1) // update_every * update_every
    if last <= start:
        raise ValueError(
            f'update_every={update_every} leaves no mask update after start_step={start} and before '
            f'{"total_steps" if stop is None else "stop_step"}={total_steps if stop is None else stop}, so the density would never '
            'fall: update more often, or train longer.'
        )
    return schedules.cubic(initial, density, start, last)


def _three_quarters(total_steps: int) -> int:
    return max(1, round(0.75 * total_steps))


# name -> the parts of sparsify that make the method, by (density, update_every, total_steps, the caller's own options)
_ROWS: dict[str, Callable[[float, int, int, Mapping[str, Any]], dict[str, Any]]] = {
    'sparse_momentum': lambda density, every, total, options: dict(
        prune=criteria.magnitude, grow=criteria.momentum, redistribute=criteria.mean_momentum, prune_rate=0.5
    ),
    'set': lambda density, every, total, options: dict(
        prune=criteria.signed_magnitude,
        grow=criteria.random,
        redistribute=None,
        prune_rate=schedules.constant(0.3),
        distribution='erdos_renyi',
    ),
    'rigl': lambda density, every, total, options: dict(
        prune=criteria.magnitude,
        grow=criteria.gradient,
        redistribute=None,
        prune_rate=schedules.cosine(0.3, options.get('stop_step') or _three_quarters(total), final=0.0),
        stop_step=_three_quarters(total),
        distribution='erk',
    ),
    'snfs': lambda density, every, total, options: dict(
        prune=criteria.magnitude,
        grow=criteria.momentum,
        redistribute=None,
        momentum='gradient_average',
        prune_rate=0.5,
        distribution='erk',
    ),
    'dsr': lambda density, every, total, options: dict(
        prune=criteria.magnitude,
        prune_scope='global',
        grow=criteria.random,
        redistribute=criteria.nonzeros,
        prune_rate=schedules.constant(0.2),
    ),
    'static': lambda density, every, total, options: dict(grow=None, redistribute=None, distribution='erk'),
    'gmp': lambda density, every, total, options: dict(
        density=_gradual(1.0, density, every, total, options), prune=criteria.magnitude, grow=None, redistribute=None
    ),
    'granet': lambda density, every, total, options: dict(
        density=_gradual(max(options.get('initial_density', 0.5), density), density, every, total, options),
        prune=criteria.magnitude,
        prune_scope='global',
        grow=criteria.gradient,
        redistribute=None,
        prune_rate=0.5,
        distribution='erk',
    ),
}

NAMES = tuple(_ROWS)


def parts(name: str, density: float, update_every: int, total_steps: int, **options: Any) -> dict[str, Any]:
    """All arguments of ``sparsify`` that make a method, with those of one's own in their place.

    Args:
      name: ``sparse_momentum``, ``set``, ``rigl``, ``snfs``, ``dsr``, ``static``, ``gmp`` or ``granet``.
      density: share of the weights that exist, in (0, 1]; where the density follows a schedule, at its end.
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's; and granet's ``initial_density``.

    Returns:
      A dictionary: ``sparsify(inner, **parts(...))``.

    Raises:
      ValueError: for a name that does not exist, an argument out of range, or an ``initial_density`` below ``density``.

    Example:
      >>> chosen = parts('rigl', 0.1, update_every=100, total_steps=10_000, distribution='uniform')
      >>> chosen['stop_step'], chosen['distribution']
      (7500, 'uniform')
    """
    if name not in _ROWS:
        raise errors.unknown('method', name, _ROWS)
    if callable(density):
        raise ValueError(f'density={density!r}: {name} takes a number in (0, 1]; sparsify(density=...) takes a schedule.')
    arguments.check_numbers(density, 0.5, 0)
    Timing(update_every, total_steps, options.get('start_step', 0), options.get('stop_step'))
    begin = options.get('initial_density', 1)
    if name == 'granet' and not (isinstance(begin, (int, float)) and density <= begin <= 1):
        raise ValueError(f'initial_density={begin!r}: must be a number from density={density!r} to 1.')
    row = dict(density=density, update_every=update_every, total_steps=total_steps)
    given = {key: value for key, value in options.items() if key != 'initial_density' or name != 'granet'}
    return {**row, **_ROWS[name](density, update_every, total_steps, options), **given}


@arguments.stated_once(timing=('update_every', 'total_steps', 'start_step', 'stop_step'))
def rule(
    name: str,
    density: float,
    update_every: int | None = None,
    total_steps: int | None = None,
    *,
    timing: Timing | None = None,
    **options: Any,
) -> Rule:
    """The rule of a method, for ``sparsify(inner, rule=...)``.

    Args:
      name: as for :func:`parts`.
      density: share of the weights that exist, in (0, 1]; where the density follows a schedule, at its end.
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      timing: a :class:`sparse_jax.Timing` in place of these two, and of ``start_step`` and ``stop_step``.
      **options: as for :func:`parts`.

    Returns:
      A :class:`sparse_jax.Rule`.

    Raises:
      ValueError: as :func:`parts` and :func:`sparse_jax.sparsify`.

    Example:
      >>> rule('rigl', density=0.1, update_every=100, total_steps=10_000).timing.stop_step
      7500
    """
    if timing is not None:
        update_every, total_steps = timing.update_every, timing.total_steps
        options |= {'start_step': timing.start_step} | ({} if timing.stop_step is None else {'stop_step': timing.stop_step})
    every, total = arguments.required('update_every', update_every), arguments.required('total_steps', total_steps)
    keywords = parts(name, density, every, total, **options)
    steps = {field.name: keywords.pop(field.name) for field in dataclasses.fields(Timing) if field.name in keywords}
    return Rule(timing=Timing(**steps), **keywords)


def create(
    name: str, inner: optax.GradientTransformation, density: float, update_every: int, total_steps: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The method of that name around any optimizer; arguments as for :func:`parts`.

    >>> tx = create('set', optax.adam(1e-3), 0.1, update_every=100, total_steps=1000)
    """
    return sparsify_lib.sparsify(inner, **parts(name, density, update_every, total_steps, **options))


def sparse_momentum(
    learning_rate: optax.ScalarOrSchedule,
    density: optax.ScalarOrSchedule,
    update_every: int,
    total_steps: int,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    prune_rate: optax.ScalarOrSchedule = 0.5,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    distribution: str | Mapping[str, float] | distributions.Distribution = 'uniform',
    granularity: str | granularity_lib.Granularity = granularity_lib.Unstructured(),
    sparsifiable: PathPredicate | None = None,
    dense: Sequence[str] = (),
    stacked: PathPredicate | None = None,
    track_exploration: bool = False,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse momentum: SGD with momentum, weights pruned by magnitude, grown and redistributed by momentum.

    It is ``sparsify(chain(add_decayed_weights(weight_decay), sgd(learning_rate, momentum, nesterov)), ...)``: with L2 coupled into
    the gradient, as in the paper's code. Every layer prunes the same rate of its weights; what was pruned goes to the layers in
    proportion to the mean \|momentum\| of their weights; and there it grows where the momentum of missing weights is largest.

    Args:
      learning_rate: a number, or an optax schedule of the step.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates; the paper's is one epoch.
      total_steps: length of the training, in steps.
      momentum: decay of the momentum, in [0, 1).
      nesterov: whether to use Nesterov momentum.
      weight_decay: L2 coefficient, added to the gradient as ``weight_decay * params``.
      prune_rate: start of a cosine that ends at 0.005, or a schedule of the step.
      start_step: no mask update up to this step.
      stop_step: no mask update from this step on; None: ``total_steps``.
      distribution: initial nonzeros of each layer; see :func:`sparse_jax.sparsify`, as for the arguments below.
      granularity: what one unit of selection is.
      sparsifiable: which leaves are sparse.
      dense: path patterns of leaves that stay dense.
      stacked: which leaves hold layers along their first axis.
      track_exploration: whether to keep which weights have ever been active.
      seed: of the first masks: an integer, or a typed random key.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> import jax, jax.numpy as jnp, sparse_jax as sj
      >>> tx = sj.sparse_momentum(0.1, density=0.05, update_every=100, total_steps=1000)
      >>> state = tx.init({'kernel': jnp.ones((20, 10))})
      >>> int(sj.get_masks(state)['kernel'].sum())
      10

    Reference:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch: Faster Training without Losing Performance
      <https://arxiv.org/abs/1907.04840>`_, 2019.
    """
    if isinstance(momentum, str) or (isinstance(momentum, int | float) and not 0 <= momentum < 1):
        raise ValueError(f'momentum={momentum!r}: must be a number in [0, 1), the decay of the momentum.')
    inner = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum, nesterov))
    return sparsify_lib.sparsify(
        inner,
        density=density,
        update_every=update_every,
        total_steps=total_steps,
        prune_rate=prune_rate,
        start_step=start_step,
        stop_step=stop_step,
        distribution=distribution,
        granularity=granularity,
        sparsifiable=sparsifiable,
        dense=dense,
        stacked=stacked,
        track_exploration=track_exploration,
        seed=seed,
    )


def set_(
    inner: optax.GradientTransformation, density: float, update_every: int, total_steps: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """SET: the smallest positive and the largest negative weights go, and as many grow at random in the same layer.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates; the paper's is one epoch.
      total_steps: length of the training, in steps.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a prune rate of 0.3 throughout, an
        Erdős-Rényi distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = set_(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000)

    Reference:
      Mocanu et al., `Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
      <https://arxiv.org/abs/1707.04780>`_, 2018.
    """
    return create('set', inner, density, update_every, total_steps, **options)


def rigl(
    inner: optax.GradientTransformation,
    density: float,
    update_every: int,
    total_steps: int,
    *,
    accumulate_steps: int = 1,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""RigL: the smallest weights go, and as many grow in the same layer where the \|gradient\| of missing weights is largest.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates; the paper's is 100.
      total_steps: length of the training, in steps.
      accumulate_steps: grow by the sum of the gradients of so many steps, for small batches; 1: the update's own step alone.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a prune rate that falls from 0.3 by a cosine to
        0 at three quarters of the training, where updates stop; an ERK distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = rigl(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000, accumulate_steps=10)

    Reference:
      Evci et al., `Rigging the Lottery: Making All Tickets Winners <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    if accumulate_steps != 1:
        options = {'grow': criteria.accumulated_gradient(accumulate_steps), **options}
    return create('rigl', inner, density, update_every, total_steps, **options)


def snfs(
    inner: optax.GradientTransformation,
    density: float,
    update_every: int,
    total_steps: int,
    *,
    redistribute: str | criteria.Criterion | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """SNFS as RigL's paper compares against: sparse momentum on an average of the gradients of its own, without redistribution.

    Args:
      inner: any optax transformation; its momentum is not used.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      redistribute: ``'mean_momentum'`` for the original's redistribution; None: each layer regrows what it pruned.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a prune rate of 0.5 that falls by a cosine, an
        ERK distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = snfs(optax.sgd(0.1), 0.05, update_every=100, total_steps=1000, redistribute='mean_momentum')

    Reference:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch <https://arxiv.org/abs/1907.04840>`_, 2019, in the form of Evci et
      al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    return create('snfs', inner, density, update_every, total_steps, redistribute=redistribute, **options)


def dsr(
    inner: optax.GradientTransformation, density: float, update_every: int, total_steps: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """DSR: one threshold prunes over all layers, and what went grows at random, shared out by the weights that layers have left.

    The published threshold is adapted from update to update so that about the wanted number goes; here it is found exactly.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a prune rate of 0.2 throughout, a uniform
        distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = dsr(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000)

    Reference:
      Mostafa and Wang, `Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse Reparameterization
      <https://arxiv.org/abs/1902.05967>`_, 2019.
    """
    return create('dsr', inner, density, update_every, total_steps, **options)


def static(
    inner: optax.GradientTransformation, density: float, update_every: int = 1, total_steps: int = 1, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Static sparse training: the first mask, drawn at random, stays.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist, in (0, 1].
      update_every: not used: there are no updates.
      total_steps: not used.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: an ERK distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`; ``set_masks`` gives it a mask of one's own.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = static(optax.sgd(0.1, 0.9), 0.05)

    Reference:
      As the baseline ``Static`` of Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    return create('static', inner, density, update_every, total_steps, **options)


def gmp(
    inner: optax.GradientTransformation, density: float, update_every: int, total_steps: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Gradual magnitude pruning: dense at first, and the smallest weights go for good as a cubic schedule of the density asks.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist after the last update, in (0, 1].
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a density from 1 after ``start_step`` to the given
        one at the last update (before ``stop_step``, where that is given), a uniform distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = gmp(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000, stop_step=800)

    Reference:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017.
    """
    return create('gmp', inner, density, update_every, total_steps, **options)


def granet(
    inner: optax.GradientTransformation,
    density: float,
    update_every: int,
    total_steps: int,
    *,
    initial_density: float | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GraNet: gradual pruning by one threshold over all layers, and at each update some weights move as in RigL.

    Args:
      inner: any optax transformation.
      density: share of the sparse leaves' weights that exist after the last update, in (0, 1].
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      initial_density: where the density begins, from ``density`` to 1; None: 0.5 (or ``density``, if that is more), as the
        paper's sparse-to-sparse runs; its dense ones begin at 1.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's: a cubic schedule of the density, a prune rate of
        0.5 that falls by a cosine and moves weights within each layer, growth by \|gradient\|, an ERK distribution.

    Returns:
      An optax transformation whose state is a :class:`sparse_jax.SparsifyState`.

    Raises:
      ValueError: as :func:`sparse_jax.sparsify`.

    Example:
      >>> tx = granet(optax.sgd(0.1, 0.9), 0.05, update_every=100, total_steps=1000)

    Reference:
      Liu et al., `Sparse Training via Boosting Pruning Plasticity with Neuroregeneration <https://arxiv.org/abs/2106.10404>`_, 2021.
    """
    if initial_density is not None:
        options['initial_density'] = initial_density
    return create('granet', inner, density, update_every, total_steps, **options)
