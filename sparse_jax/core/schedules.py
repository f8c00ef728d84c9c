"""Prune rates and densities over time, as plain optax schedules of the 1-based step, and when masks are updated."""

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.core import errors

_FINAL = 0.005  # the original's eta_min


def cosine(initial: jax.typing.ArrayLike, total_steps: int, final: float = _FINAL) -> optax.Schedule:
    r"""Cosine annealing: :math:`p(t) = p_T + (p_0 - p_T) (1 + \cos(\pi t / T)) / 2`, and :math:`p_T` from step T on.

    Args:
      initial: rate at step 0, in [0, 1].
      total_steps: T, in steps.
      final: rate at step T, in [0, 1].

    Returns:
      A schedule: step (int, or an int32 array) to rate (float32).

    Example:
      >>> rate = cosine(0.5, total_steps=1000)
      >>> [round(float(rate(t)), 4) for t in (0, 500, 1000)]
      [0.5, 0.2525, 0.005]

    Reference:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch <https://arxiv.org/abs/1907.04840>`_, 2019.
    """

    def schedule(count):
        progress = jnp.minimum(jnp.asarray(count, jnp.float32), total_steps) / total_steps
        return final + (initial - final) * (1 + jnp.cos(jnp.pi * progress)) / 2

    return schedule


def linear(initial: float, total_steps: int) -> optax.Schedule:
    r"""Linear decay to nothing: :math:`p(t) = p_0 (1 - t / T)`, and 0 from step T on; the published code's ``linear``.

    >>> float(linear(0.5, total_steps=1000)(500))
    0.25
    """
    return optax.linear_schedule(initial, 0.0, total_steps)


def constant(value: float) -> optax.Schedule:
    """The same rate, in [0, 1], at every update.

    >>> float(constant(0.25)(10))
    0.25
    """
    return optax.constant_schedule(value)


def cubic(initial: float, final: float, start_step: int, end_step: int) -> optax.Schedule:
    r"""Density for gradual pruning: :math:`d(t) = d_f + (d_i - d_f) (1 - \frac{t - t_0}{t_1 - t_0})^3`, and constant outside.

    Args:
      initial: density up to the start step, in (0, 1].
      final: density from the end step on, in (0, 1].
      start_step: :math:`t_0`, in steps.
      end_step: :math:`t_1`, in steps.

    Returns:
      A schedule; of a Python integer or a NumPy array it is computed in float64, so that counts of large networks are exact.

    Raises:
      ValueError: for a density out of range, or an end that is not after the start.

    Example:
      >>> density = cubic(1.0, 0.1, start_step=0, end_step=100)
      >>> [round(float(density(t)), 6) for t in (0, 50, 100)]
      [1.0, 0.2125, 0.1]

    Reference:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017.
    """
    for name, value in {'initial': initial, 'final': final}.items():
        if not 0 < value <= 1:
            raise ValueError(f'cubic: {name}={value!r} must be a density in (0, 1].')
    if end_step <= start_step:
        raise ValueError(f'cubic: end_step={end_step} must be after start_step={start_step}.')

    def schedule(count):
        xp = jnp if isinstance(count, jax.Array) else np
        remaining = 1 - xp.clip((count - start_step) / (end_step - start_step), 0, 1)
        return final + (initial - final) * remaining**3

    return schedule


def linear_density(initial: float, final: float, steps: int) -> optax.Schedule:
    r"""Density that changes evenly: :math:`d(t) = d_i + (d_f - d_i) t / T`, and :math:`d_f` from step T on, in float64.

    >>> float(linear_density(1.0, 0.5, steps=100)(50))
    0.75
    """

    def schedule(count):
        xp = jnp if isinstance(count, jax.Array) else np
        return initial + (final - initial) * xp.clip(count / max(steps, 1), 0, 1)

    return schedule


_MOST_UPDATES = 2**22


@dataclasses.dataclass(frozen=True)
class Timing:
    r"""When masks are updated: at steps t (1-based) with ``start_step < t``, ``t % update_every == 0`` and ``t < stop_step``.

    Args:
      update_every: steps between mask updates.
      total_steps: length of the training, in steps.
      start_step: no update up to this step.
      stop_step: no update from this step on; None: ``total_steps``.

    Raises:
      ValueError: for a length that is not an integer, or out of range.

    Example:
      >>> timing = Timing(update_every=4, total_steps=12)
      >>> [t for t in range(1, 13) if timing.is_update(t)]
      [4, 8]
      >>> [count for count in range(12) if timing.needs_dense_gradient(count, window=2)]
      [2, 3, 6, 7]
    """

    update_every: int
    total_steps: int
    start_step: int = 0
    stop_step: int | None = None

    def __post_init__(self):
        refuse_arrays(**dataclasses.asdict(self))
        for name, least in {'update_every': 1, 'total_steps': 1, 'start_step': 0}.items():
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f'{name}={value!r}: must be an integer, at least {least} (in steps).')
        if self.stop_step is not None and (not isinstance(self.stop_step, numbers.Integral) or self.stop_step < 0):
            raise ValueError(f'stop_step={self.stop_step!r}: must be an integer, at least 0 (in steps), or None for total_steps.')
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value >= 2**31:
                raise ValueError(f'{name}={value!r}: must be below 2^31, since steps are counted in int32.')

    @property
    def end(self) -> int:
        """The step from which on no mask is updated."""
        return self.total_steps if self.stop_step is None else self.stop_step

    @property
    def updates(self) -> range:
        """The steps of all mask updates."""
        every = self.update_every
        first = (int(self.start_step) // every + 1) * every
        return range(first, min(int(self.total_steps), int(self.end)), every)

    def steps(self) -> np.ndarray:
        """Step 0 and the steps of all mask updates; ValueError where these are too many to be listed."""
        if len(self.updates) > _MOST_UPDATES:
            raise ValueError(
                f'update_every={self.update_every} and total_steps={self.total_steps} make {len(self.updates):,} mask updates, and a '
                f'density schedule is evaluated at each of them, at most {_MOST_UPDATES:,}: update masks less often.'
            )
        return np.array([0, *self.updates])

    def is_update(self, step):
        """Whether a step (1-based; an integer or an array) updates the masks."""
        return (self.start_step < step) & (step % self.update_every == 0) & (step < self.end)

    def needs_dense_gradient(self, count: int, window: int | None) -> bool:
        """Whether a step's gradients are wanted at missing weights too; see :func:`needs_dense_gradient`."""
        if window is None:
            return True
        if window < 0 or count < 0:
            raise ValueError(
                f'needs_dense_gradient: window={window!r} and count={count!r} must be at least 0 (window None: always).'
            )
        if window >= self.update_every:
            errors.say_once(
                f'window={window} steps of dense gradients before each mask update, of which there is one every {self.update_every}: all '
                'gradients are dense, and no weight gradient is sparse. Take a shorter window, or update masks less often.'
            )
        update = self.next_update(count + 1)
        return update is not None and update - (count + 1) < window

    def next_update(self, step: int) -> int | None:
        """The first update in a step (1-based) or after it; None where there is none any more."""
        update = -(-max(step, self.start_step + 1) // self.update_every) * self.update_every
        return update if update < self.end else None


def refuse_arrays(**arguments) -> None:
    """Raises ValueError for an argument that is a jax array, where a Python number is needed."""
    for name, value in arguments.items():
        if isinstance(value, jax.Array):
            raise ValueError(
                f'{name} must be a Python number, but is a jax array: it decides shapes and counts. Under optax.inject_hyperparams '
                'inject into the inner optimizer, sparsify(inject_hyperparams(optax.sgd)(learning_rate=...), ...), or name every '
                'argument but the learning rate in static_args.'
            )


def is_update(t, *, update_every: int, total_steps: int, start_step: int = 0, stop_step: int | None = None):
    """Whether step t (1-based; an integer or an array) updates the masks: :meth:`Timing.is_update`.

    >>> [t for t in range(1, 10) if is_update(t, update_every=3, total_steps=9)]
    [3, 6]
    """
    return Timing(update_every, total_steps, start_step, stop_step).is_update(t)


def needs_dense_gradient(
    count: int,
    *,
    update_every: int,
    total_steps: int,
    window: int | None,
    start_step: int = 0,
    stop_step: int | None = None,
) -> bool:
    r"""Whether a step's gradients are wanted at missing weights too, or zeros will do there.

    Growth reads the momentum of missing weights, and a momentum of decay :math:`\beta` keeps :math:`\beta^w` of what is `w` steps old: so
    the gradients of the last `w` steps up to each mask update are enough (22: a tenth is left at 0.9), and a sparse backward pass does
    for the others. No gradient of a missing weight is wanted after the last update.

    Args:
      count: steps done before this one, 0 at the first; a Python integer.
      update_every: steps between mask updates, as given to ``sparsify``.
      total_steps: as given to ``sparsify``.
      window: dense steps up to each update, the update step itself included; 0: never; None: at every step of the training.
      start_step: as given to ``sparsify``.
      stop_step: as given to ``sparsify``.

    Returns:
      True where the gradients must be dense.

    Raises:
      ValueError: for a window or a count below 0.

    Example:
      >>> [count for count in range(12) if needs_dense_gradient(count, update_every=4, total_steps=12, window=2)]
      [2, 3, 6, 7]
    """
    return Timing(update_every, total_steps, start_step, stop_step).needs_dense_gradient(count, window)


def budgets(density: optax.Schedule, size: int, timing: Timing, *, every: int) -> np.ndarray:
    """The number of units that a density schedule asks for at t = every, 2 every, ...

    Entry j is of step (j + 1) every, update step or not; int64, round(density * size), evaluated on the host in float64.

    >>> budgets(cubic(1.0, 0.5, 0, 4), 100, Timing(update_every=2, total_steps=6), every=2).tolist()
    [56, 50]
    """
    last = min(timing.end, timing.total_steps)
    steps = np.arange(every, max(last, every + 1), every)
    return np.round(densities(density, steps) * size).astype(np.int64)


def densities(density, steps: np.ndarray) -> np.ndarray:
    """A density schedule at several steps, float64: optax's are of jax operations, which would round a count of 10^9 weights in float32."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        try:
            values = np.asarray(density(steps), np.float64)
        except Exception:  # a schedule with branches takes one step at a time
            values = np.array([_number(density, int(t)) for t in steps], np.float64)
        if values.shape != steps.shape:
            values = np.array([_number(density, int(t)) for t in steps], np.float64)
    return values


def _number(schedule: optax.Schedule, step: int, setting: str = 'density') -> float:
    value: Any = schedule(step)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f'{setting}: the schedule must return a number, but at step {step} it returned {value!r}.') from None


def check_rate(prune_rate: optax.Schedule, timing: Timing) -> None:
    """Checks a schedule of prune rates at the first and the last update: each a number in [0, 1]."""
    for step in sorted({*timing.updates[:1], *timing.updates[-1:]}):
        with jax.ensure_compile_time_eval():
            rate = _number(prune_rate, step, 'prune_rate')
        if not 0 <= rate <= 1:
            raise ValueError(f'prune_rate: the schedule is {rate:.6g} at step {step}; it must be in [0, 1] throughout.')
