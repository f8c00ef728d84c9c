"""What is trained and how: pure functions made from a config."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparse_jax as sj
from sparse_jax import _names, models
from sparse_jax import config as config_lib
from sparse_jax import masks as masks_lib

METHODS = ('sparse_momentum', 'dense')


class TrainState(NamedTuple):
    """Everything that a training step changes; a pytree of arrays."""

    step: jax.Array  # int32, batches drawn so far: the position in the data
    params: Any
    model_state: Any
    opt_state: Any
    rng_key: jax.Array  # constant; folded with the step


class Experiment(NamedTuple):
    """The pure functions of one experiment, and its lengths in steps."""

    init: Callable[[jax.Array], TrainState]  # of a random key
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # (state, batch, *, dense_gradients)
    evaluate: Callable[..., dict[str, jax.Array]]  # (state, batch): sums over the batch
    learning_rate: optax.Schedule
    prune_rate: optax.Schedule | None  # None for the dense twin
    total_steps: int
    steps_per_epoch: int
    update_every: int


def create(config: config_lib.Config, *, num_examples: int, image_shape: tuple[int, int, int], num_classes: int) -> Experiment:
    """The functions of the experiment that a config describes.

    Args:
      config: the settings, validated.
      num_examples: number of training examples.
      image_shape: height, width and channels.
      num_classes: number of classes.

    Returns:
      Pure functions, not yet jitted. Both ``train_step`` and ``evaluate`` take batches of ``image`` float32[batch, h, w, c] and
      ``label`` int32[batch]. With ``dense_gradients=False`` the gradients off the masks are zeros, as a sparse backward pass gives.

    Raises:
      ValueError: for a name that does not exist, or settings that do not fit together.
    """
    if config.sparsity.method not in METHODS:
        raise _names.unknown('sparsity.method', config.sparsity.method, METHODS)
    if config.optimizer.name != 'sgd':
        raise _names.unknown('optimizer.name', config.optimizer.name, ['sgd'])
    model = models.create(config.model.name, image_shape=image_shape, num_classes=num_classes)
    steps_per_epoch = num_examples // config.data.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f'data.batch_size={config.data.batch_size} is more than the {num_examples} training examples.')
    total_steps = config.train.steps or config.train.epochs * steps_per_epoch
    update_every = config.sparsity.update_every or steps_per_epoch
    opt, sparsity = config.optimizer, config.sparsity
    learning_rate = (
        optax.exponential_decay(opt.learning_rate, opt.decay_every, opt.decay_factor, staircase=True)
        if opt.decay_every
        else optax.constant_schedule(opt.learning_rate)
    )
    prune_rate = None
    if sparsity.method == 'dense':
        sgd = optax.sgd(learning_rate, opt.momentum, opt.nesterov)
        tx = optax.chain(optax.add_decayed_weights(opt.weight_decay), sgd)
    else:
        prune_rate = sj.schedules.cosine(sparsity.prune_rate, total_steps)
        tx = sj.sparse_momentum(
            learning_rate,
            sparsity.density,
            update_every,
            total_steps,
            momentum=opt.momentum,
            nesterov=opt.nesterov,
            weight_decay=opt.weight_decay,
            prune_rate=prune_rate,
            start_step=sparsity.start_step,
            stop_step=sparsity.stop_step or None,
            distribution=sparsity.distribution,
            granularity=sparsity.granularity,
            seed=jax.random.key(config.seed),  # the parameters' keys are split off it
        )

    def init(key: jax.Array) -> TrainState:
        params_key, rng_key = jax.random.split(key)
        params, model_state = model.init(params_key)
        opt_state = tx.init(params)
        if prune_rate is not None:
            params = sj.apply_masks(params, sj.get_masks(opt_state))
        return TrainState(jnp.zeros([], jnp.int32), params, model_state, opt_state, rng_key)

    def train_step(state: TrainState, batch, *, dense_gradients: bool = True):
        def loss_fn(params):
            rng = jax.random.fold_in(state.rng_key, state.step)
            logits, model_state = model.apply(params, state.model_state, batch['image'], train=True, rng=rng)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()
            return loss, (logits, model_state)

        (loss, (logits, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        if prune_rate is not None and not dense_gradients:
            grads = sj.apply_masks(grads, sj.get_masks(state.opt_state))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch['label'])
        state = TrainState(jnp.asarray(optax.safe_increment(state.step)), params, model_state, opt_state, state.rng_key)
        return state, {'loss': loss, 'accuracy': accuracy}

    def evaluate(state: TrainState, batch):
        logits, _ = model.apply(state.params, state.model_state, batch['image'], train=False, rng=None)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        return {'loss': losses.sum(), 'correct': jnp.sum(jnp.argmax(logits, axis=-1) == batch['label'])}

    jax.eval_shape(init, jax.random.key(0))  # budget and leaves are checked before any file is made
    return Experiment(init, train_step, evaluate, learning_rate, prune_rate, total_steps, steps_per_epoch, update_every)


class Sizes(NamedTuple):
    """How large a network is."""

    parameters: int  # all
    sparse_size: int  # weights of the leaves that are trained sparse (in the dense twin: that would be)
    nonzeros: int  # of those, how many exist
    layers: dict[str, tuple[int, int]]  # nonzeros and size of each of those leaves

    @property
    def density(self) -> float:
        return self.nonzeros / self.sparse_size


def sizes(state: TrainState) -> Sizes:
    """Counts the parameters of a concrete state, as Python integers."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    has_masks = any(isinstance(x, sj.SparsifyState) for x in jax.tree.leaves(state.opt_state, is_leaf=_is_state))
    layers = {}
    if has_masks:
        leaves = jax.tree_util.tree_leaves_with_path(sj.get_masks(state.opt_state))
        for path, mask in leaves:
            if mask.ndim:
                layers[_path(path)] = int(mask.sum()), mask.size
    else:
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
            if masks_lib.default_sparsifiable(_path(path), leaf):
                layers[_path(path)] = leaf.size, leaf.size
    nonzeros, size = (sum(column) for column in zip(*layers.values(), strict=True))
    return Sizes(parameters, size, nonzeros, layers)


def is_mask_update(experiment: Experiment, config: config_lib.Config, step: int) -> bool:
    """Whether the step of that number (1-based) updates the masks."""
    if experiment.prune_rate is None:
        return False
    stop = config.sparsity.stop_step or experiment.total_steps
    return config.sparsity.start_step < step < stop and step % experiment.update_every == 0


def _is_state(x: Any) -> bool:
    return isinstance(x, sj.SparsifyState)


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')
