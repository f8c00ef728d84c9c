"""Models as pure functions over plain dicts: flax.nnx is used inside and never seen outside.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from sparse_jax import models
  >>> model = models.create('lenet300', image_shape=(28, 28, 1), num_classes=10)
  >>> params, state = model.init(jax.random.key(0))
  >>> logits, state = model.apply(params, state, jnp.zeros((2, 28, 28, 1)), train=False, rng=None)
  >>> logits.shape, params['fc1']['kernel'].shape
  ((2, 10), (784, 300))
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from sparse_jax import _names
from sparse_jax.models.lenet import LeNet5, LeNet300

_MODELS = {'lenet300': LeNet300, 'lenet5': LeNet5}


class Model(NamedTuple):
    """A model's two functions."""

    init: Callable[..., Any]  # init(key) -> (params, state), nested dicts; works under eval_shape and jit
    apply: Callable[..., Any]  # apply(params, state, x, *, train, rng, patterns=None) -> (logits, state)


def names() -> list[str]:
    """Names that :func:`create` knows."""
    return sorted(_MODELS)


def create(name: str, *, image_shape: tuple[int, int, int], num_classes: int) -> Model:
    """A model by name.

    Args:
      name: see :func:`names`.
      image_shape: height, width and channels of one image.
      num_classes: number of logits.

    Returns:
      Its ``init`` and ``apply``. ``patterns`` is a tree like the params with a sparsity pattern or None at each leaf.

    Raises:
      ValueError: if there is no such model, or it cannot take such images.
    """
    if name not in _MODELS:
        raise _names.unknown('model.name', name, _MODELS)
    module = _MODELS[name]

    def make(key):
        return module(image_shape, num_classes, rngs=nnx.Rngs(key))

    graphdef = nnx.split(nnx.eval_shape(make, jax.random.key(0)))[0]

    def init(key):
        _, params, rest = nnx.split(make(key), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def apply(params, state, x, *, train: bool, rng=None, patterns=None):
        del rng  # for dropout; no model here has any
        model = nnx.merge(graphdef, params, state)
        logits = model(x, train=train, patterns=patterns)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    return Model(init, apply)
