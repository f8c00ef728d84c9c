"""The dense optimizer inside: learning-rate schedules and optimizers by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_jax import config as config_lib
from sparse_jax.core import errors
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import masks as masks_lib


def _step(settings: config_lib.Optimizer, steps: int) -> optax.Schedule:
    del steps
    if settings.decay_at:
        boundaries = {step - settings.warmup_steps: settings.decay_factor for step in decays(settings)}
        return optax.piecewise_constant_schedule(settings.learning_rate, boundaries)
    if settings.decay_every == 0:
        return optax.constant_schedule(settings.learning_rate)
    return optax.exponential_decay(settings.learning_rate, settings.decay_every, settings.decay_factor, staircase=True)


def _cosine(settings: config_lib.Optimizer, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(settings.learning_rate, max(steps, 1), alpha=settings.final_factor)


def _constant(settings: config_lib.Optimizer, steps: int) -> optax.Schedule:
    del steps
    return optax.constant_schedule(settings.learning_rate)


SCHEDULES: dict[str, Callable[[config_lib.Optimizer, int], optax.Schedule]] = {
    'step': _step,
    'cosine': _cosine,
    'constant': _constant,
}


def decays(settings: config_lib.Optimizer) -> list[int]:
    """The steps that ``decay_at`` lists; ValueError where they are no rising numbers after the warm-up.

    >>> decays(config_lib.Optimizer(decay_at='100,200'))
    [100, 200]
    """
    parts = settings.decay_at.split(',')
    steps = [int(part) for part in parts if part.strip().isdecimal()]
    if len(steps) < len(parts) or steps != sorted(set(steps)) or steps[0] <= settings.warmup_steps or steps[-1] >= 2**31:
        raise ValueError(
            f'config.optimizer.decay_at={settings.decay_at!r}: must be steps in rising order, separated by commas, all after the '
            f'{settings.warmup_steps} of the warm-up and below 2^31, such as 30000,60000.'
        )
    return steps


def schedule(settings: config_lib.Optimizer, total_steps: int) -> optax.Schedule:
    r"""The learning rate by step, 0-based: a linear warm-up, then the schedule, which counts from the warm-up's end.

    In the warm-up of W steps the rate at step t is :math:`\eta (t + 1) / (W + 1)`.

    Args:
      settings: of the optimizer.
      total_steps: of the training.

    Returns:
      A schedule.

    Raises:
      ValueError: if the name is unknown, or the warm-up is longer than the training.

    Example:
      >>> rate = schedule(config_lib.Optimizer(learning_rate=1.0, schedule='cosine', warmup_steps=3), 13)
      >>> [round(float(rate(t)), 2) for t in (0, 1, 2, 3, 8, 13)]
      [0.25, 0.5, 0.75, 1.0, 0.5, 0.0]
    """
    if settings.schedule not in SCHEDULES:
        raise errors.unknown('optimizer.schedule', settings.schedule, SCHEDULES)
    warmup, peak = settings.warmup_steps, settings.learning_rate
    if warmup > total_steps:
        raise ValueError(f'optimizer.warmup_steps={warmup} is more than the {total_steps} steps of the training.')
    after = SCHEDULES[settings.schedule](settings, total_steps - warmup)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def held(rate: optax.Schedule, steps: int) -> optax.Schedule:
    """A schedule that keeps the value of its last step of so many.

    >>> [float(held(lambda t: 10.0 - t, 3)(t)) for t in (1, 2, 3, 9)]
    [9.0, 8.0, 8.0, 8.0]
    """
    return lambda step: rate(jnp.minimum(step, steps - 1))


def shifted(rate: optax.Schedule, steps: int) -> optax.Schedule:
    """A schedule for an optimizer that has counted so many steps fewer.

    >>> float(shifted(lambda t: 10.0 - t, 3)(2))
    5.0
    """
    return rate if steps == 0 else lambda count: rate(count + steps)


def is_decayed(path: str, leaf: Any) -> bool:
    """Whether adamw's weight decay acts on a leaf: on matrices, not on normalisations and biases (stacked ones have two axes too).

    >>> is_decayed('layers/attention_norm/scale', jnp.ones((2, 8))), is_decayed('embed/table', jnp.ones((2, 8)))
    (False, True)
    """
    return leaf.ndim >= 2 and not any(part in path for part in ('norm', 'bias', 'scale'))


def _decayed(params: Any) -> Any:
    flags = [is_decayed(path, leaf) for path, leaf in layers_lib.leaf_paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), flags)


def _sgd(settings: config_lib.Optimizer, rate: optax.Schedule, whole: Any) -> optax.GradientTransformation:
    del whole
    sgd = optax.sgd(rate, settings.momentum, settings.nesterov)
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), sgd)


def _adamw(settings: config_lib.Optimizer, rate: optax.Schedule, whole: Any) -> optax.GradientTransformation:
    mask = _decayed if whole is None else _decayed(whole)
    return optax.adamw(rate, settings.beta1, settings.beta2, weight_decay=settings.weight_decay, mask=mask)


OPTIMIZERS: dict[str, Callable[[config_lib.Optimizer, optax.Schedule, Any], optax.GradientTransformation]] = {
    'sgd': _sgd,
    'adamw': _adamw,
}


def create(settings: config_lib.Optimizer, rate: optax.Schedule, whole: Any = None) -> optax.GradientTransformation:
    """The dense optimizer that settings describe; ValueError if its name is unknown.

    Args:
      settings: of the optimizer.
      rate: the learning rate by step.
      whole: shapes of the dense params, where it is to train compact values; None: it trains the params themselves.
    """
    if settings.name not in OPTIMIZERS:
        raise errors.unknown('optimizer.name', settings.name, OPTIMIZERS)
    return OPTIMIZERS[settings.name](settings, rate, whole)


def clip_factor(grads: Any, masks: Any | None, max_norm: float) -> jax.Array:
    """What gradients are multiplied with so that those of existing weights have at most this global norm: at most 1.

    The norm leaves missing weights out, so that it does not jump between steps with and without their gradients; they are scaled
    like the others.

    Args:
      grads: tree of gradients.
      masks: tree of masks; None: all weights exist.
      max_norm: positive.
    """
    norm = optax.tree.norm(grads if masks is None else masks_lib.apply_masks(grads, masks))
    return jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))


def scaled(tree: Any, factor: jax.Array) -> Any:
    """A tree of arrays times a number, in the arrays' own types."""
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), tree)
