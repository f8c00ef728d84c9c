"""What is trained and how: pure functions made from a config."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparse_jax as sj
from sparse_jax import config as config_lib
from sparse_jax import models
from sparse_jax.core import errors
from sparse_jax.core import masks as masks_lib
from sparse_jax.train import optimizer as optimizer_lib

METHODS = (*sj.methods.NAMES, 'dense')
KERNELS = ('auto', 'dense', *sj.kernels.IMPLEMENTATIONS)


class TrainState(NamedTuple):
    """Everything that a training step changes; a pytree of arrays."""

    step: jax.Array  # int32, batches drawn so far: the position in the data
    params: Any
    model_state: Any
    opt_state: Any
    rng_key: jax.Array  # constant; folded with the step
    average: Any = None  # exponential average of (params, model_state), not masked; None where there is none


class Experiment(NamedTuple):
    """The pure functions of one experiment, and its lengths in steps."""

    init: Callable[[jax.Array], TrainState]  # of a random key
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # (state, batch, patterns=None, *, dense_gradients)
    evaluate: Callable[..., dict[str, jax.Array]]  # (state, batch): sums over the batch
    learning_rate: optax.Schedule
    prune_rate: optax.Schedule | None  # None where nothing is pruned and grown
    is_mask_update: Callable[[int], bool]  # of a step's number, 1-based
    dense_gradient_steps: int | None  # up to a mask update, whose gradients off the masks are computed; None: all
    needs_dense_gradient: Callable[[int], bool]  # of a step's number, 1-based
    apply: Callable[..., Any]  # apply(params, model_state, inputs, patterns=None): logits
    layers: list[masks_lib.Layer]  # that are trained sparse (in the dense twin: that would be)
    stacked: Callable[[str, Any], bool] | None  # which leaves hold a layer in each row
    example: jax.ShapeDtypeStruct  # one input
    total_steps: int
    steps_per_epoch: int
    update_every: int


def _sparsify(config: config_lib.Config, inner, stacked, update_every: int, total_steps: int) -> tuple[Any, dict[str, Any]]:
    """The sparse optimizer, and the arguments that make it."""
    s = config.sparsity
    options: dict[str, Any] = dict(start_step=s.start_step, granularity=s.granularity, stacked=stacked)
    options['dense'] = _patterns(s.dense)
    for name in ('prune_rate', 'stop_step', 'distribution', 'prune', 'grow', 'redistribute'):
        if value := getattr(s, name):
            options[name] = None if value == 'none' else value
    if s.method == 'rigl' and s.accumulate_steps > 1:
        options['grow'] = sj.criteria.accumulated_gradient(s.accumulate_steps)
    if s.method == 'granet':
        options['initial_density'] = s.initial_density
    parts = sj.methods.parts(s.method, s.density, update_every, total_steps, **options)
    return sj.sparsify(inner, **parts, track_exploration=True, seed=jax.random.key(config.seed)), parts


def _model(config: config_lib.Config, input_shape: tuple[int, ...], num_outputs: int) -> models.Model:
    """The model, with those settings that it takes; ValueError for one that it does not."""
    settings = dataclasses.asdict(config.model)
    name, dtype, layout = (settings.pop(field) for field in ('name', 'dtype', 'layout'))
    if layout == 'auto' and config.sparsity.kernels in ('dense', 'reference'):  # plain XLA was asked for
        layout = 'channels'
    known, own = models.options(name), {}
    for field, value in settings.items():
        if field in known and not (field == 'dropout' and value == -1):
            own[field] = value
        elif field not in known and value != getattr(config_lib.Model(), field):
            raise ValueError(f'config.model.{field}={value!r} is not a setting of {name}: it takes {", ".join(known) or "none"}.')
    for field in ('depth', 'features', 'heads'):
        if own.get(field) == 0:
            raise ValueError(f'config.model.{field}=0: give the {name} at least 1.')
    return models.create(name, input_shape=input_shape, num_outputs=num_outputs, dtype=dtype, layout=layout, **own)


def check_names(config: config_lib.Config) -> None:
    """What can be told to be wrong without the data, so that none is fetched or read in vain; ValueError."""
    models.options(config.model.name)
    sparsity = config.sparsity
    for name, value, known in (
        ('model.dtype', config.model.dtype, models.DTYPES),
        ('model.layout', config.model.layout, models.LAYOUTS),
        ('optimizer.name', config.optimizer.name, optimizer_lib.OPTIMIZERS),
        ('optimizer.schedule', config.optimizer.schedule, optimizer_lib.SCHEDULES),
        ('sparsity.method', sparsity.method, METHODS),
        ('sparsity.kernels', sparsity.kernels, KERNELS),
    ):
        if value not in known:
            raise errors.unknown(name, value, known)
    if config.data.batch_size % config.train.accumulate:
        raise ValueError(f'config.train.accumulate={config.train.accumulate} must divide data.batch_size={config.data.batch_size}.')
    # the names of the method's parts; its steps wait for the length of an epoch
    method = 'sparse_momentum' if sparsity.method == 'dense' else sparsity.method  # dense: no effect, but no nonsense either
    parts = dataclasses.replace(sparsity, method=method, start_step=0, stop_step=0)
    every = sparsity.update_every or config.train.steps or 10**8
    _sparsify(
        dataclasses.replace(config, sparsity=parts),
        optax.sgd(0.1, 0.9),
        None,
        every,
        config.train.steps or min(10 * every, 2**31 - 1),
    )


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross entropy in nats of each label, [...], with a part of the target spread evenly over all classes."""
    if smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing))


def create(config: config_lib.Config, *, num_examples: int, input_shape: tuple[int, ...], num_outputs: int) -> Experiment:
    """The functions of the experiment that a config describes.

    Args:
      config: the settings, validated.
      num_examples: number of training examples.
      input_shape: of one example: height, width and channels, or the length of a sequence.
      num_outputs: number of classes or tokens.

    Returns:
      Pure functions, not yet jitted. Both ``train_step`` and ``evaluate`` take batches of ``input`` (images float32[batch, h, w, c] or
      tokens int32[batch, length]) and ``label`` (int32[batch], or int32[batch, length]). With ``dense_gradients=False`` the gradients
      off the masks are zeros. ``patterns`` (see ``sj.kernels.make_patterns``) of the state's masks let layers run on sparse kernels.

    Raises:
      ValueError: for a name that does not exist, or settings that do not fit together.
    """
    check_names(config)
    sparsity, parts_of_batch, decay = config.sparsity, config.train.accumulate, config.train.average_decay
    steps_per_epoch = num_examples // config.data.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f'data.batch_size={config.data.batch_size} is more than the {num_examples} training examples.')
    model = _model(config, input_shape, num_outputs)
    examples = config.data.batch_size // parts_of_batch
    if config.model.layout == 'lanes' and (reason := sj.kernels.lanes_unavailable(examples, config.model.dtype)):
        raise ValueError(
            f"config.model.layout='lanes' does not run here: {reason}. Take 'auto' or 'channels', or another data.batch_size."
        )
    total_steps = config.train.steps or config.train.epochs * steps_per_epoch
    update_every = sparsity.update_every or steps_per_epoch
    learning_rate = optimizer_lib.schedule(config.optimizer, total_steps)
    tx = optimizer_lib.create(config.optimizer, learning_rate)
    prune_rate: Any = None
    is_mask_update: Callable[[int], bool] = lambda step: False
    needs_dense_gradient: Callable[[int], bool] = lambda step: dense_steps is None
    dense_steps = None
    is_sparse = sparsity.method != 'dense'
    if is_sparse:
        tx, parts = _sparsify(config, tx, model.stacked, update_every, total_steps)
        grow = sj.criteria.get('grow', parts.get('grow', sj.criteria.momentum))
        if sparsity.dense_gradient_window is not None:
            needed = sj.criteria.dense_gradient_steps(grow)
            dense_steps = sparsity.dense_gradient_window if needed is None else needed
            if needed is not None and sparsity.dense_gradient_window != config_lib.Sparsity().dense_gradient_window:
                raise ValueError(
                    f'config.sparsity.dense_gradient_window={sparsity.dense_gradient_window} has no effect with '
                    f'sparsity.method={sparsity.method!r}, whose growth needs {needed} dense steps: leave it, or set None for all steps.'
                )
        if grow is not None or callable(parts['density']):
            timing = {name: parts[name] for name in ('update_every', 'total_steps', 'start_step')}
            is_mask_update = functools.partial(sj.schedules.is_update, **timing, stop_step=parts.get('stop_step'))
            window = dict(**timing, stop_step=parts.get('stop_step'), window=dense_steps)
            needs_dense_gradient = lambda step: sj.needs_dense_gradient(step - 1, **window)
        if grow is not None:
            rate = parts['prune_rate']
            prune_rate = rate if callable(rate) else sj.schedules.cosine(rate, total_steps)

    def init(key: jax.Array) -> TrainState:
        params_key, rng_key = jax.random.split(key)
        params, model_state = model.init(params_key)
        opt_state = tx.init(params)
        if is_sparse:
            params = sj.apply_masks(params, sj.get_masks(opt_state))
        average = jax.tree.map(jnp.copy, (params, model_state)) if decay else None
        return TrainState(jnp.zeros([], jnp.int32), params, model_state, opt_state, rng_key, average)

    def gradients(params, model_state, batch, rng, patterns):
        def loss_fn(params):
            logits, new_state = model.apply(params, model_state, batch['input'], train=True, rng=rng, patterns=patterns)
            loss = cross_entropy(logits, batch['label'], config.train.label_smoothing).mean()
            return loss, (logits, new_state)

        (loss, (logits, new_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return grads, new_state, {'loss': loss, 'accuracy': jnp.mean(jnp.argmax(logits, axis=-1) == batch['label'])}

    def accumulated(params, model_state, batch, rng, patterns):
        """Means over the parts of a batch; running statistics go from part to part."""

        def part(carry, row):
            total, model_state = carry
            grads, model_state, metrics = gradients(params, model_state, row[0], jax.random.fold_in(rng, row[1]), patterns)
            return (jax.tree.map(jnp.add, total, grads), model_state), metrics

        split = jax.tree.map(lambda x: x.reshape(parts_of_batch, -1, *x.shape[1:]), batch)
        start = jax.tree.map(jnp.zeros_like, params), model_state
        (total, model_state), metrics = jax.lax.scan(part, start, (split, jnp.arange(parts_of_batch)))
        mean = lambda g: g / parts_of_batch
        return jax.tree.map(mean, total), model_state, jax.tree.map(jnp.mean, metrics)

    def train_step(state: TrainState, batch, patterns=None, *, dense_gradients: bool = True):
        if dense_gradients:
            patterns = sj.kernels.with_dense_gradients(patterns)
        rng = jax.random.fold_in(state.rng_key, state.step)
        work = gradients if parts_of_batch == 1 else accumulated
        grads, model_state, metrics = work(state.params, state.model_state, batch, rng, patterns)
        masks = sj.get_masks(state.opt_state) if is_sparse else None
        if is_sparse and not dense_gradients:
            grads = _masked(grads, masks, patterns)
        if config.optimizer.clip_norm:
            grads = optimizer_lib.clipped(grads, masks, config.optimizer.clip_norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = jnp.asarray(optax.safe_increment(state.step))
        average = state.average
        if decay:  # early on it is the mean of fewer steps, so that the start is soon forgotten
            now = jnp.minimum(decay, (1 + step) / (10 + step))
            mix = lambda a, p: now.astype(a.dtype) * a + (1 - now).astype(a.dtype) * p
            average = jax.tree.map(mix, average, (params, model_state))  # running statistics too: they belong to the weights
        return TrainState(step, params, model_state, opt_state, state.rng_key, average), metrics

    def evaluate(state: TrainState, batch, patterns=None):
        params, model_state = state.average if decay else (state.params, state.model_state)
        if decay and is_sparse:  # an average of weights is not sparse where masks have moved
            params = sj.apply_masks(params, sj.get_masks(state.opt_state))
        logits, _ = model.apply(params, model_state, batch['input'], train=False, rng=None, patterns=patterns)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        losses = jnp.where(batch['label'] >= 0, losses, 0)  # rows that only fill a batch up have the label -1
        return {'loss': losses.sum(), 'correct': jnp.sum(jnp.argmax(logits, axis=-1) == batch['label'])}

    def apply(params, model_state, inputs, patterns=None, train=False):
        rng = jax.random.key(0) if train else None
        return model.apply(params, model_state, inputs, train=train, rng=rng, patterns=patterns)[0]

    shapes = jax.eval_shape(init, jax.random.key(0))  # budget and leaves are checked before any file is made
    sparse = masks_lib.sparse_leaves(shapes.params, None, _patterns(sparsity.dense))
    return Experiment(
        init,
        train_step,
        evaluate,
        learning_rate,
        prune_rate,
        is_mask_update,
        dense_steps,
        needs_dense_gradient,
        apply,
        masks_lib.layer_table(shapes.params, sparse, model.stacked),
        model.stacked,
        jax.ShapeDtypeStruct((1, *input_shape), jnp.int32 if len(input_shape) == 1 else jnp.float32),
        total_steps,
        steps_per_epoch,
        update_every,
    )


def _masked(grads: Any, masks: Any, patterns: Any) -> Any:
    """Gradients with zeros off the masks; a convolution with a pattern has them already, and is spared a pass over its weights."""
    if patterns is None:
        return sj.apply_masks(grads, masks)
    is_leaf = lambda x: x is None or isinstance(x, sj.kernels.Pattern)
    flat = jax.tree.leaves(patterns, is_leaf=is_leaf)
    leaves, structure = jax.tree.flatten(grads)
    masked = jax.tree.leaves(sj.apply_masks(grads, masks))
    spared = [p is not None and len(p.shape) == 4 for p in flat]
    return jax.tree.unflatten(structure, [g if s else m for g, m, s in zip(leaves, masked, spared, strict=True)])


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(pattern for pattern in text.split(',') if pattern)


class Sizes(NamedTuple):
    """How large a network is."""

    parameters: int  # all
    sparse_size: int  # weights of the leaves that are trained sparse (in the dense twin: that would be)
    nonzeros: int  # of those, how many exist
    layers: dict[str, tuple[int, int]]  # nonzeros and size of each of those leaves

    @property
    def density(self) -> float:
        return self.nonzeros / self.sparse_size


def sizes(experiment: Experiment, state: TrainState) -> Sizes:
    """Counts the parameters of a concrete state, as Python integers."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    names = masks_lib.names_of(experiment.layers)
    full = [math.prod(layer.shape) for layer in experiment.layers for _ in range(layer.depth or 1)]
    counts = sj.stats.layer_nonzeros(sj.get_masks(state.opt_state), experiment.layers) if _has_masks(state) else full
    layers = dict(zip(names, zip(counts, full, strict=True), strict=True))
    return Sizes(parameters, sum(full), sum(counts), layers)


def _has_masks(state: TrainState) -> bool:
    is_state = lambda x: isinstance(x, sj.SparsifyState)
    return any(is_state(x) for x in jax.tree.leaves(state.opt_state, is_leaf=is_state))


def operations(experiment: Experiment, state: TrainState, mean_density: dict[str, float], masks: Any = None) -> dict[str, float]:
    """Multiply-adds of one example, sparse and against dense: for inference now, for training on average over the run.

    Args:
      experiment: its functions.
      state: concrete.
      mean_density: density of each layer, on average over the training's steps; empty for the dense twin.
      masks: the state's, whole on this host; None: it has none, and all is dense.

    Returns:
      Numbers for ``result.json``: what sparse products take, with gradients off the masks in those steps only that compute them.
    """
    if masks is None:
        masks = jax.tree.map(lambda _: jnp.array(True), state.params)
    count = functools.partial(sj.stats.operations, lambda p, x: experiment.apply(p, state.model_state, x), masks)
    window = experiment.dense_gradient_steps
    now = count(state.params, experiment.example, update_every=experiment.update_every, dense_gradient_window=window)
    layers = {}
    for layer in experiment.layers if _has_masks(state) else ():
        row, names = now.layers[layer.name], masks_lib.names_of([layer])
        density = sum(mean_density[name] for name in names) / len(names)
        forward, back = round(row.forward_dense * density), round(row.input_gradient_dense * density)
        layers[layer.name] = row._replace(forward=forward, input_gradient=back)
    # a step has a batch, and the masks are updated for all of it
    average = now._replace(layers=layers, mask_updates=0.0)
    return {
        'operations_inference': now.inference,
        'operations_inference_against_dense': now.inference / now.inference_dense,
        'operations_training_against_dense': average.training / average.training_dense,
    }
