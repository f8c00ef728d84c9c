"""One step as pure functions of a :class:`StepSpec` and a state: initialise, train on a batch, evaluate a batch. None is jitted yet."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_jax import compact, kernels, models
from sparse_jax.core import masks as masks_lib
from sparse_jax.train import optimizer as optimizer_lib
from sparse_jax.train.state import TrainState


class StepSpec(NamedTuple):
    """What the functions of a step are made from; static."""

    model: models.Model
    tx: Any  # optax transformation
    is_sparse: bool  # whether tx holds masks; in compact storage it does not
    label_smoothing: float
    clip_norm: float  # 0: gradients are not clipped
    accumulate: int  # parts that a batch is divided into
    average_decay: float  # 0: no average of the weights


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross entropy in nats of each label, [...], with a part of the target spread evenly over all classes."""
    if smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing))


def init(spec: StepSpec, key: jax.Array) -> TrainState:
    """The state before the first step."""
    params_key, rng_key = jax.random.split(key)
    params, model_state = spec.model.init(params_key)
    opt_state = spec.tx.init(params)
    if spec.is_sparse:
        params = masks_lib.apply_masks(params, masks_lib.get_masks(opt_state))
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        rng_key=rng_key,
        average=jax.tree.map(jnp.copy, (params, model_state)) if spec.average_decay else None,
    )


def begin(spec: StepSpec, state: TrainState, params: Any, model_state: Any, masks: Any) -> TrainState:
    """A first state with the weights and masks of another network; masks: None in the dense twin."""
    opt_state = state.opt_state
    if masks is not None:
        params, opt_state = masks_lib.apply_masks(params, masks), masks_lib.set_masks(opt_state, masks)
    average = None if state.average is None else (params, model_state)
    return state._replace(params=params, model_state=model_state, opt_state=opt_state, average=average)


class Trained(NamedTuple):
    """What the loss is differentiated by."""

    params: Any
    probes: Any = None  # of compact storage, in steps that score units; their gradients are the scores


def gradients(
    spec: StepSpec, trained: Trained, model_state: Any, batch: Any, rng: jax.Array, patterns: Any
) -> tuple[Trained, Any, dict]:
    """Gradients of the mean loss over a batch, the new model state, and the metrics."""

    def loss_fn(trained):
        params, probes = trained
        with_probes = patterns if probes is None else compact.with_probes(patterns, probes)
        options: dict[str, Any] = dict(train=True, rng=rng, patterns=with_probes)
        measure = functools.partial(_measured, smoothing=spec.label_smoothing)
        (losses, correct), new_state = spec.model.apply(
            params, model_state, batch['input'], measure=measure, labels=batch['label'], **options
        )
        return losses.mean(), (correct, new_state)

    (loss, (correct, new_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    return grads, new_state, {'loss': loss, 'accuracy': jnp.mean(correct)}


def _measured(logits: jax.Array, labels: jax.Array, smoothing: float) -> tuple[jax.Array, jax.Array]:
    """Loss of each label, and whether it has the largest logit."""
    return cross_entropy(logits, labels, smoothing), jnp.argmax(logits, axis=-1) == labels


def mean_gradients(
    spec: StepSpec, trained: Trained, model_state: Any, batch: Any, rng: jax.Array, patterns: Any
) -> tuple[Trained, Any, dict]:
    """:func:`gradients` as means over the parts of a batch, one part at a time; running statistics go from part to part."""
    if spec.accumulate == 1:
        return gradients(spec, trained, model_state, batch, rng, patterns)

    def add_part(carry, row):
        total, model_state = carry
        part, index = row
        grads, model_state, metrics = gradients(spec, trained, model_state, part, jax.random.fold_in(rng, index), patterns)
        return (jax.tree.map(jnp.add, total, grads), model_state), metrics

    parts = jax.tree.map(lambda x: x.reshape(spec.accumulate, -1, *x.shape[1:]), batch)
    start = jax.tree.map(jnp.zeros_like, trained), model_state
    (total, model_state), metrics = jax.lax.scan(add_part, start, (parts, jnp.arange(spec.accumulate)))
    return jax.tree.map(lambda g: g / spec.accumulate, total), model_state, jax.tree.map(jnp.mean, metrics)


def train_step(
    spec: StepSpec, state: TrainState, batch: Any, patterns: Any = None, *, dense_gradients: bool = True, mask_update: bool = True
):
    """One training step.

    Args:
      spec: of the experiment.
      state: before the step.
      batch: ``input`` and ``label``, see :func:`sparse_jax.train.create`.
      patterns: of the state's masks, for sparse kernels; None: all products are dense.
      dense_gradients: whether gradients off the masks are computed; otherwise they are zeros. Static.
      mask_update: whether this may be a step that updates the masks; otherwise the update, which is most of the program, is left out.
        Static.

    Returns:
      The state after the step, and ``loss`` and ``accuracy`` of the batch before it.
    """
    if dense_gradients:
        patterns = kernels.with_dense_gradients(patterns)
    rng = jax.random.fold_in(state.rng_key, state.step)
    (grads, _), model_state, metrics = mean_gradients(spec, Trained(state.params), state.model_state, batch, rng, patterns)
    masks = masks_lib.get_masks(state.opt_state) if spec.is_sparse else None
    if spec.is_sparse and not dense_gradients:
        grads = _masked(grads, masks, patterns)
    if spec.clip_norm:
        grads = optimizer_lib.scaled(grads, optimizer_lib.clip_factor(grads, masks, spec.clip_norm))
    leave_out = {'update_masks': False} if spec.is_sparse and not mask_update else {}
    updates, opt_state = spec.tx.update(grads, state.opt_state, state.params, **leave_out)
    params = optax.apply_updates(state.params, updates)
    return advanced(spec, state, params, model_state, opt_state), metrics


def advanced(spec: StepSpec, state: TrainState, params: Any, model_state: Any, opt_state: Any) -> TrainState:
    """The state after a step."""
    step = jnp.asarray(optax.safe_increment(state.step))
    average = state.average
    if spec.average_decay:
        average = _averaged(average, (params, model_state), step, spec.average_decay)
    return TrainState(
        step=step, params=params, model_state=model_state, opt_state=opt_state, rng_key=state.rng_key, average=average
    )


def _averaged(average: Any, current: Any, step: jax.Array, decay: float) -> Any:
    """The exponential average after a step, of weights and of running statistics, which belong to them."""
    # Early on it is the mean of fewer steps, so that the start is soon forgotten.
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: rate.astype(a.dtype) * a + (1 - rate).astype(a.dtype) * p, average, current)


def _masked(grads: Any, masks: Any, patterns: Any) -> Any:
    """Gradients with zeros off the masks; a convolution with a pattern has them already, and is spared a pass over its weights."""
    if patterns is None:
        return masks_lib.apply_masks(grads, masks)
    is_leaf = lambda x: x is None or isinstance(x, kernels.Pattern)
    flat = jax.tree.leaves(patterns, is_leaf=is_leaf)
    leaves, structure = jax.tree.flatten(grads)
    masked = jax.tree.leaves(masks_lib.apply_masks(grads, masks))
    is_masked = [p is not None and len(p.shape) == 4 for p in flat]
    return jax.tree.unflatten(structure, [g if done else m for g, m, done in zip(leaves, masked, is_masked, strict=True)])


def evaluate(spec: StepSpec, state: TrainState, batch: Any, patterns: Any = None) -> dict[str, jax.Array]:
    """Sums of the loss and of correct predictions over a batch; rows with the label -1 do not count."""
    params, model_state = state.average if spec.average_decay else (state.params, state.model_state)
    if spec.average_decay and spec.is_sparse:  # an average of weights is not sparse where masks have moved
        params = masks_lib.apply_masks(params, masks_lib.get_masks(state.opt_state))
    options: dict[str, Any] = dict(train=False, rng=None, patterns=patterns, measure=functools.partial(_measured, smoothing=0.0))
    (losses, correct), _ = spec.model.apply(params, model_state, batch['input'], labels=batch['label'], **options)
    losses = jnp.where(batch['label'] >= 0, losses, 0)  # rows that only fill a batch up have the label -1
    return {'loss': losses.sum(), 'correct': jnp.sum(correct)}


def apply(spec: StepSpec, params: Any, model_state: Any, inputs: Any, patterns: Any = None, train: bool = False) -> jax.Array:
    """Logits of inputs."""
    rng = jax.random.key(0) if train else None
    return spec.model.apply(params, model_state, inputs, train=train, rng=rng, patterns=patterns)[0]
