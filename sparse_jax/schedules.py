"""Prune rates over time: which part of a layer's weights an update moves. Plain optax schedules of the 1-based step."""

import jax
import jax.numpy as jnp
import optax

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
