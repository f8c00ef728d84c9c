"""Masks that are chosen at the start, by scores of the first weights: the methods snip, grasp and synflow of the launcher."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax import models
from sparse_jax.core import pruning, saliency, target
from sparse_jax.core.granularity import Block, Unstructured
from sparse_jax.core.rule import Rule
from sparse_jax.train import step as step_lib


class _Network(NamedTuple):
    """A network before its first step, and what scores it."""

    model: models.Model
    model_state: Any
    smoothing: float
    parts: int  # that the batch is divided into, one after the other

    def logits(self, params: Any, inputs: jax.Array, train: bool = True) -> jax.Array:
        rng = jax.random.key(0) if train else None
        return self.model.apply(params, self.model_state, inputs, train=train, rng=rng, patterns=None)[0]

    def loss(self, params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        of_part = lambda part: step_lib.cross_entropy(self.logits(params, part[0]), part[1], self.smoothing).mean()
        if self.parts == 1:
            return of_part((inputs, labels))
        divided = jax.tree.map(lambda x: x.reshape(self.parts, -1, *x.shape[1:]), (inputs, labels))
        return jax.lax.map(jax.checkpoint(of_part), divided).mean()


def _snip(network: _Network, params: Any, batch: Any) -> Any:
    return saliency.snip(network.loss, params, batch['input'], batch['label'])


def _grasp(network: _Network, params: Any, batch: Any) -> Any:
    return saliency.grasp(network.logits, params, batch['input'], batch['label'])


def _synflow(network: _Network, params: Any, batch: Any) -> Any:
    example = jax.ShapeDtypeStruct((1, *batch['input'].shape[1:]), batch['input'].dtype)
    return saliency.synflow(functools.partial(network.logits, train=False), params, example)


class _Start(NamedTuple):
    score: Callable[[_Network, Any, Any], Any]  # of params and a batch
    rounds: int  # of pruning, in each of which the scores are made anew
    on_host: bool = False  # differentiates twice, which an accelerator's attention does not


STARTS = {'snip': _Start(_snip, 1), 'grasp': _Start(_grasp, 1, on_host=True), 'synflow': _Start(_synflow, 100)}


@contextlib.contextmanager
def _on_host() -> Iterator[None]:
    """What is traced and run within is the CPU's, where there is an accelerator."""
    if jax.default_backend() == 'cpu':
        yield
        return
    token = target.PLATFORM.set('cpu')
    try:
        with jax.default_device(jax.devices('cpu')[0]):
            yield
    finally:
        target.PLATFORM.reset(token)


def network(
    method: str, model: models.Model, rule: Rule, key: jax.Array, batch: dict[str, Any], *, smoothing: float, parts: int
) -> tuple[Any, Any, Any]:
    """The weights that a run of this key starts with, and the masks of a method; on the host.

    One threshold over all layers decides, as in each of the papers; where units fix how many weights each layer has, they do.

    Args:
      method: one of STARTS.
      model: with images by channels, as scores may differentiate twice.
      rule: of the run: its density and units, and which leaves are sparse.
      key: of the run.
      batch: the run's first one.
      smoothing: of the labels, in the loss.
      parts: that snip divides the batch into, as the run's steps do.

    Returns:
      Params, zero off the masks, the model's state, and masks.
    """
    params_key, _ = jax.random.split(key)
    params, model_state = jax.jit(model.init)(params_key)
    start, scored = STARTS[method], _Network(model, model_state, smoothing, parts)
    batch = jax.tree.map(jnp.asarray, batch)
    jitted = jax.jit(functools.partial(start.score, scored))

    def score(params, batch):
        with _on_host() if start.on_host else contextlib.nullcontext():
            scores = jitted(*jax.device_get((params, batch))) if start.on_host else jitted(params, batch)
        return jax.tree.map(jnp.asarray, jax.device_get(scores)) if start.on_host else scores

    assert isinstance(rule.density, int | float)
    params, masks = pruning.prune(
        params,
        rule.density,
        scores=lambda params: score(params, batch),
        rounds=start.rounds,
        granularity=rule.granularity,
        prune_scope='global' if isinstance(rule.granularity, Unstructured | Block) else 'layer',
        distribution=rule.distribution,
        sparsifiable=rule.sparsifiable,
        dense=rule.dense,
        stacked=rule.stacked,
        matrix_axes=rule.matrix_axes,
    )
    return params, model_state, masks
