"""What is trained and how: pure functions made from a config."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparse_jax as sj
from sparse_jax import _names, models
from sparse_jax import config as config_lib
from sparse_jax import masks as masks_lib

METHODS = (*sj.methods.NAMES, 'dense')


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
    prune_rate: optax.Schedule | None  # None where nothing is pruned and grown
    is_mask_update: Callable[[int], bool]  # of a step's number, 1-based
    dense_gradient_steps: int | None  # before a mask update whose gradients off the masks the method needs; None: all
    apply: Callable[..., Any]  # (params, model_state, images): logits
    total_steps: int
    steps_per_epoch: int
    update_every: int


def _sparsify(config: config_lib.Config, inner, update_every: int, total_steps: int) -> tuple[Any, dict[str, Any]]:
    """The sparse optimizer, and the arguments that make it."""
    s = config.sparsity
    only_for = {'initial_density': 'granet', 'accumulate_steps': 'rigl'}
    for name, method in only_for.items():
        if getattr(s, name) != getattr(config_lib.Sparsity(), name) and s.method != method:
            raise ValueError(f'config.sparsity.{name}={getattr(s, name)!r} is for the method {method}, not for {s.method}.')
    options: dict[str, Any] = dict(start_step=s.start_step, granularity=s.granularity)
    options['dense'] = tuple(pattern for pattern in s.dense.split(',') if pattern)
    for name in ('prune_rate', 'stop_step', 'distribution', 'prune', 'grow', 'redistribute'):
        if value := getattr(s, name):
            options[name] = None if value == 'none' else value
    if s.method == 'rigl' and s.accumulate_steps > 1:
        options['grow'] = sj.criteria.accumulated_gradient(s.accumulate_steps)
    if s.method == 'granet':
        options['initial_density'] = s.initial_density
    parts = sj.methods.parts(s.method, s.density, update_every, total_steps, **options)
    return sj.sparsify(inner, **parts, track_exploration=True, seed=jax.random.key(config.seed)), parts


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
    sgd = optax.sgd(learning_rate, opt.momentum, opt.nesterov)
    tx = optax.chain(optax.add_decayed_weights(opt.weight_decay), sgd)
    is_sparse = sparsity.method != 'dense'
    prune_rate: Any = None
    is_mask_update: Callable[[int], bool] = lambda step: False
    dense_steps = None
    if is_sparse:
        tx, parts = _sparsify(config, tx, update_every, total_steps)
        grow = sj.criteria.get('grow', parts.get('grow', sj.criteria.momentum))
        dense_steps = sj.criteria.dense_gradient_steps(grow)
        if grow is not None or callable(parts['density']):
            timing = {name: parts[name] for name in ('update_every', 'total_steps', 'start_step')}
            is_mask_update = functools.partial(sj.schedules.is_update, **timing, stop_step=parts.get('stop_step'))
        if grow is not None:
            rate = parts['prune_rate']
            prune_rate = rate if callable(rate) else sj.schedules.cosine(rate, total_steps)

    def init(key: jax.Array) -> TrainState:
        params_key, rng_key = jax.random.split(key)
        params, model_state = model.init(params_key)
        opt_state = tx.init(params)
        if is_sparse:
            params = sj.apply_masks(params, sj.get_masks(opt_state))
        return TrainState(jnp.zeros([], jnp.int32), params, model_state, opt_state, rng_key)

    def train_step(state: TrainState, batch, *, dense_gradients: bool = True):
        def loss_fn(params):
            rng = jax.random.fold_in(state.rng_key, state.step)
            logits, model_state = model.apply(params, state.model_state, batch['image'], train=True, rng=rng)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()
            return loss, (logits, model_state)

        (loss, (logits, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        if is_sparse and not dense_gradients:
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

    def apply(params, model_state, images):
        return model.apply(params, model_state, images, train=False, rng=None)[0]

    jax.eval_shape(init, jax.random.key(0))  # budget and leaves are checked before any file is made
    return Experiment(
        init,
        train_step,
        evaluate,
        learning_rate,
        prune_rate,
        is_mask_update,
        dense_steps,
        apply,
        total_steps,
        steps_per_epoch,
        update_every,
    )


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
    layers = {}
    if _has_masks(state):
        counts = sj.stats.nonzeros(sj.get_masks(state.opt_state))
        layers = {name: (counts[name], leaf.size) for name, leaf in masks_lib.leaf_paths(state.params) if name in counts}
    else:
        for path, leaf in masks_lib.leaf_paths(state.params):
            if masks_lib.default_sparsifiable(path, leaf):
                layers[path] = leaf.size, leaf.size
    nonzeros, size = (sum(column) for column in zip(*layers.values(), strict=True))
    return Sizes(parameters, size, nonzeros, layers)


def _has_masks(state: TrainState) -> bool:
    is_state = lambda x: isinstance(x, sj.SparsifyState)
    return any(is_state(x) for x in jax.tree.leaves(state.opt_state, is_leaf=is_state))


def operations(
    experiment: Experiment, state: TrainState, image_shape: tuple[int, ...], mean_density: dict[str, float]
) -> dict[str, float]:
    """Multiply-adds of one example, sparse and against dense: for inference now, for training on average over the run.

    Args:
      experiment: its functions.
      state: concrete.
      image_shape: height, width and channels.
      mean_density: density of each layer, on average over the training's steps; empty for the dense twin.

    Returns:
      Numbers for ``result.json``: what the method needs, with gradients off the masks in those steps only that it needs them in
      (this version's products are dense all the same).
    """
    masks = jax.tree.map(lambda _: jnp.array(True), state.params)
    if _has_masks(state):
        masks = sj.get_masks(state.opt_state)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    count = functools.partial(sj.stats.operations, lambda p, x: experiment.apply(p, state.model_state, x), masks)
    window = experiment.dense_gradient_steps
    now = count(state.params, image, update_every=experiment.update_every, dense_gradient_window=window)
    layers = {}
    for name, row in now.layers.items():
        density = mean_density[name]
        forward, back = round(row.forward_dense * density), round(row.input_gradient_dense * density)
        layers[name] = row._replace(forward=forward, input_gradient=back)
    # a step has a batch, and the masks are updated for all of it
    average = now._replace(layers=layers, mask_updates=0.0)
    return {
        'operations_inference': now.inference,
        'operations_inference_against_dense': now.inference / now.inference_dense,
        'operations_training_against_dense': average.training / average.training_dense,
    }
