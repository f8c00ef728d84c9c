"""The table of published methods: each one row of parts for :func:`sparse_jax.sparsify`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.core import arguments, criteria, errors, granularity, schedules
from sparse_jax.core import sparsify as sparsify_lib
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


def _rigl(total: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """RigL's parts: updates stop at three quarters of the training, where its prune rate has fallen to 0."""
    return dict(
        prune=criteria.magnitude,
        grow=criteria.gradient,
        redistribute=None,
        prune_rate=schedules.cosine(0.3, options.get('stop_step') or _three_quarters(total), final=0.0),
        stop_step=_three_quarters(total),
        distribution='erk',
    )


# All weights are pruned, and the largest of all positions come back with the values that they have.
_LARGEST_OF_ALL = dict(
    prune=criteria.magnitude, grow=criteria.magnitude, redistribute=None, prune_rate=schedules.constant(1.0), enters_with='value'
)


def _timing(every: int, total: int, options: Mapping[str, Any]) -> Timing:
    """The timing of a method whose density changes at its updates; ValueError where there is none."""
    timing = Timing(every, total, options.get('start_step', 0), options.get('stop_step'))
    if not timing.updates:
        raise ValueError(
            f'update_every={every} leaves no mask update in {total} steps, so the density would never change: update more often.'
        )
    return timing


def _soft_bound(density: float, extra: float, timing: Timing) -> dict[str, Any]:
    """A density of (1 + e) d, of which an update prunes e d and grows as many; e falls by a cosine to 0 at the last update."""
    last = timing.updates[-1]

    def more(t):
        xp = np if isinstance(t, int | np.ndarray | np.integer) else jnp
        part = extra * (1 + xp.cos(xp.pi * xp.clip(t / last, 0, 1))) / 2
        return xp.where(t >= last, 0.0, xp.minimum(part, 1 / density - 1))

    return dict(density=lambda t: density * (1 + more(t)), prune_rate=lambda t: more(t) / (1 + more(t)))


def _phases(density: float, timing: Timing) -> optax.Schedule:
    """Density 1 and d by turns, changing at each update; the last phase is sparse."""
    updates = timing.updates

    def schedule(t):
        xp = np if isinstance(t, int | np.ndarray | np.integer) else jnp
        phase = xp.clip((t - updates[0]) // timing.update_every + 1, 0, len(updates))
        return xp.where((phase % 2 == 0) & ((phase < len(updates)) | (phase == 0)), 1.0, density)

    return schedule


# of each method, the options that are its own and no arguments of sparsify
_OWN_OPTIONS = {'granet': ('initial_density',), 'mest': ('extra',), 'truncation': ('anneal',)}

# name -> the parts of sparsify that make the method, by (density, update_every, total_steps, the caller's own options)
_ROWS: dict[str, Callable[[float, int, int, Mapping[str, Any]], dict[str, Any]]] = {
    'sparse_momentum': lambda density, every, total, options: dict(
        prune=criteria.magnitude, grow=criteria.momentum, redistribute='default', prune_rate=0.5
    ),
    'set': lambda density, every, total, options: dict(
        prune=criteria.signed_magnitude,
        grow=criteria.random,
        redistribute=None,
        prune_rate=schedules.constant(0.3),
        distribution='erdos_renyi',
    ),
    'rigl': lambda density, every, total, options: _rigl(total, options),
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
    'srigl': lambda density, every, total, options: _rigl(total, options) | dict(granularity='fan_in', ablation=0.3),
    'top_kast': lambda density, every, total, options: dict(**_LARGEST_OF_ALL, backward_density=min(1.0, 2 * density)),
    'mest': lambda density, every, total, options: dict(
        **_soft_bound(density, options.get('extra', 0.3), _timing(every, total, options)),
        prune=criteria.magnitude_and_gradient,
        grow=criteria.random,
        redistribute=None,
        distribution='erk',
    ),
    'ac_dc': lambda density, every, total, options: dict(
        density=_phases(density, _timing(every, total, options)),
        prune=criteria.magnitude,
        grow=criteria.random,
        redistribute=None,
        prune_rate=schedules.constant(0.0),
    ),
    'truncation': lambda density, every, total, options: dict(
        **_LARGEST_OF_ALL,
        density=schedules.linear_density(
            1.0, density, min(round(options.get('anneal', 0.5) * total), _timing(every, total, options).updates[-1])
        ),
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
      name: one of ``NAMES``, such as ``sparse_momentum``, ``rigl`` or ``static``.
      density: share of the weights that exist, in (0, 1]; where the density follows a schedule, at its end.
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      **options: arguments of :func:`sparse_jax.sparsify` that replace the method's; and those of the method's own function, such as granet's
        ``initial_density``.

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
    if name == 'top_kast' and options.get('backward_density', 1) is None:
        del options['backward_density']
    begin = options.get('initial_density', 1)
    if name == 'granet' and not (isinstance(begin, (int, float)) and density <= begin <= 1):
        raise ValueError(f'initial_density={begin!r}: must be a number from density={density!r} to 1.')
    for option, most in (('extra', math.inf), ('anneal', 1.0)):
        value = options.get(option, 0.5)
        if option in _OWN_OPTIONS.get(name, ()) and not (isinstance(value, int | float) and 0 < value <= most):
            raise ValueError(f'{option}={value!r}: must be a number above 0{"" if most == math.inf else f", at most {most:g}"}.')
    row: dict[str, Any] = dict(density=density, update_every=update_every, total_steps=total_steps)
    row |= _ROWS[name](density, update_every, total_steps, options)
    if isinstance(granularity.get(options.get('granularity', row.get('granularity', 'unstructured'))), granularity.NOfM):
        row['distribution'] = 'uniform'  # every layer has n of m, whatever the method's own
    return {**row, **{key: value for key, value in options.items() if key not in _OWN_OPTIONS.get(name, ())}}


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
