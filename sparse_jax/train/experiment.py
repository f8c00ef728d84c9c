"""An experiment from its settings: which model, optimizer, masks and lengths make up the functions in :mod:`sparse_jax.train.step`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_jax import config as config_lib
from sparse_jax import kernels, models
from sparse_jax.core import criteria, errors, matrix_axes, methods, references
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.granularity import Unstructured
from sparse_jax.core.rule import Rule
from sparse_jax.core.sparsify import sparsify
from sparse_jax.train import compact_settings, starting_masks, storage
from sparse_jax.train import optimizer as optimizer_lib
from sparse_jax.train import step as step_lib
from sparse_jax.train.state import Experiment

METHODS = (*methods.NAMES, *starting_masks.STARTS, 'dense')
KERNELS = ('auto', 'dense', *kernels.IMPLEMENTATIONS)


def check_names(config: config_lib.Config) -> None:
    """Raises ValueError for what is wrong whatever the data, so that none is fetched or read in vain."""
    if references.is_reference(config.model.name):
        models.own.parse_options(config.model.options)
        references.load('config.model.name', config.model.name)
    else:
        models.options(config.model.name)
    sparsity = config.sparsity
    for name, value, choices in (
        ('model.dtype', config.model.dtype, models.DTYPES),
        ('model.layout', config.model.layout, models.LAYOUTS),
        ('optimizer.name', config.optimizer.name, optimizer_lib.OPTIMIZERS),
        ('optimizer.schedule', config.optimizer.schedule, optimizer_lib.SCHEDULES),
        ('sparsity.method', sparsity.method, METHODS),
        ('sparsity.storage', sparsity.storage, storage.STORAGES),
        ('sparsity.kernels', sparsity.kernels, KERNELS),
    ):
        if value not in choices:
            raise errors.unknown(name, value, choices)
    if sparsity.method in starting_masks.STARTS and config.train.init_from:
        raise ValueError(
            f"--init_from gives the masks, and sparsity.method={sparsity.method!r} would make others: take sparsity.method='static', or "
            'a method that moves them.'
        )
    if sparsity.method in starting_masks.STARTS and sparsity.distribution:
        raise ValueError(
            f'config.sparsity.distribution={sparsity.distribution!r} has no effect with sparsity.method={sparsity.method!r}, by which one '
            'threshold over all layers decides: leave it empty.'
        )
    if config.train.start_step and (not config.train.init_from or sparsity.method not in ('static', 'dense') or sparsity.grow):
        raise ValueError(
            f'config.train.start_step={config.train.start_step} is for a network of --init_from under a fixed mask, as the steps of mask '
            'updates count from 0: give --init_from and sparsity.method=static or dense, or leave it at 0.'
        )
    if config.data.batch_size % config.train.accumulate:
        raise ValueError(f'config.train.accumulate={config.train.accumulate} must divide data.batch_size={config.data.batch_size}.')
    # the names of the method's parts; its steps wait for the length of an epoch
    method = 'sparse_momentum' if sparsity.method == 'dense' else sparsity.method  # dense: no effect, but no nonsense either
    parts = dataclasses.replace(sparsity, method=method, start_step=0, stop_step=0)
    steps = config.train.schedule_steps or config.train.steps
    every = sparsity.update_every or (max(1, steps // 10) if steps else 10**8)
    rule = rule_of(dataclasses.replace(config, sparsity=parts), None, every, steps or min(10 * every, 2**31 - 1))
    if sparsity.matrix_axes and not references.is_reference(config.model.name):
        raise ValueError(
            f'config.sparsity.matrix_axes={sparsity.matrix_axes!r} is for models of your own: all weights of {config.model.name} are [taps..., inputs, '
            'outputs]: leave it empty.'
        )
    if rule.backward_density is not None and config.train.init_from:
        raise ValueError(
            f'--init_from gives masks, and sparsity.method={sparsity.method!r} takes the largest of weights that it stores: take another method.'
        )
    if sparsity.storage == 'compact':
        compact_settings.check(config, None if sparsity.method == 'dense' else rule)


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
    return build(config, num_examples=num_examples, input_shape=input_shape, num_outputs=num_outputs)


def build(config: config_lib.Config, *, num_examples: int, input_shape: tuple[int, ...], num_outputs: int) -> Experiment:
    """:func:`create`, of settings that :func:`check_names` has passed."""
    steps_per_epoch = num_examples // config.data.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f'data.batch_size={config.data.batch_size} is more than the {num_examples} training examples.')
    total_steps = config.train.steps or config.train.epochs * steps_per_epoch
    if config.train.start_step >= total_steps:
        raise ValueError(
            f'config.train.start_step={config.train.start_step} must be below the {total_steps} steps of the training.'
        )
    schedule_steps = config.train.schedule_steps or total_steps
    update_every = config.sparsity.update_every or (1 if config.sparsity.method == 'truncation' else steps_per_epoch)
    model = model_of(config, input_shape, num_outputs)
    learning_rate = optimizer_lib.schedule(config.optimizer, schedule_steps)
    if total_steps > schedule_steps:
        learning_rate = optimizer_lib.held(learning_rate, schedule_steps)
    rate = optimizer_lib.shifted(learning_rate, config.train.start_step)  # an optimizer counts its own steps
    groups, is_compact = config.sparsity.groups, config.sparsity.storage == 'compact'
    if update_every % groups:
        raise ValueError(
            f'config.sparsity.groups={groups} must divide the {update_every} steps of sparsity.update_every: a group is updated every so often.'
        )
    rule = None if config.sparsity.method == 'dense' else rule_of(config, model.stacked, update_every // groups, schedule_steps)
    params = jax.eval_shape(model.init, jax.random.key(0))[0]
    spec = step_lib.StepSpec(
        model=model,
        tx=optimizer_lib.create(config.optimizer, rate, params if is_compact else None),
        is_sparse=False,
        label_smoothing=config.train.label_smoothing,
        clip_norm=config.optimizer.clip_norm,
        accumulate=config.train.accumulate,
        average_decay=config.train.average_decay,
    )
    updates = _NO_UPDATES if rule is None else _mask_updates(config.sparsity, rule)
    if rule is not None and is_compact:
        functions = compact_settings.functions(config, spec, rule)
    else:
        functions = _functions(spec if rule is None else spec._replace(tx=sparsify(spec.tx, rule=rule), is_sparse=True))
    jax.eval_shape(functions['init'], jax.random.key(0))  # budget and leaves are checked before any file is made
    is_sparse_leaf = layers_lib.sparse_leaves(params, None, _patterns(config.sparsity.dense))
    layers = layers_lib.layer_table(params, is_sparse_leaf, model.stacked, matrix_axes.get(config.sparsity.matrix_axes or None))
    first_network = None
    if rule is not None and config.sparsity.method in starting_masks.STARTS:
        plain = dataclasses.replace(config, model=dataclasses.replace(config.model, layout='channels'))
        scored = model_of(plain, input_shape, num_outputs)
        parts: dict[str, Any] = dict(smoothing=config.train.label_smoothing, parts=config.train.accumulate)
        first_network = functools.partial(starting_masks.network, config.sparsity.method, scored, rule, **parts)
    return Experiment(
        first_network=first_network,
        apply=functools.partial(step_lib.apply, spec),
        storage=config.sparsity.storage,
        learning_rate=learning_rate,
        **(updates._asdict() | functions),
        layers=layers,
        layer_codes=layers_lib.encode(len(jax.tree.leaves(params)), layers, Unstructured() if rule is None else rule.granularity),
        stacked=model.stacked,
        example=jax.ShapeDtypeStruct((1, *input_shape), jnp.int32 if len(input_shape) == 1 else jnp.float32),
        start_step=config.train.start_step,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        update_every=update_every,
    )


def _functions(spec: step_lib.StepSpec) -> dict[str, Any]:
    """The functions of an experiment with dense storage, by their names in :class:`Experiment`; its step updates the masks."""
    names = 'init', 'begin', 'train_step', 'evaluate'
    unchanged = lambda step, state: state
    return {
        **{name: functools.partial(getattr(step_lib, name), spec) for name in names},
        'before_step': unchanged,
        'after_step': unchanged,
        'shapes_after': lambda shapes, step, arrays: shapes,
    }


def model_of(config: config_lib.Config, input_shape: tuple[int, ...], num_outputs: int) -> models.Model:
    """The model, with those settings that it takes; ValueError for one that it does not."""
    settings = dataclasses.asdict(config.model)
    name, dtype, layout = (settings.pop(field) for field in ('name', 'dtype', 'layout'))
    if layout == 'auto' and config.sparsity.kernels in ('dense', 'reference'):  # plain XLA was asked for
        layout = 'channels'
    is_own, own_options = references.is_reference(name), models.own.parse_options(settings.pop('options'))
    if own_options and not is_own:
        raise ValueError(
            f"config.model.options is for classes of one's own, model.name=package.module:Class: {name} has settings for all it takes."
        )
    accepted, options = ((), own_options) if is_own else (models.options(name), {})
    for field, value in settings.items():
        if field in accepted and not (field == 'dropout' and value == -1):
            options[field] = value
        elif field not in accepted and value != getattr(config_lib.Model(), field):
            raise ValueError(
                f'config.model.{field}={value!r} is not a setting of {name}: it takes {", ".join(accepted) or "none"}.'
            )
    for field in ('depth', 'features', 'heads'):
        if options.get(field) == 0:
            raise ValueError(f'config.model.{field}=0: give the {name} at least 1.')
    model = models.create(name, input_shape=input_shape, num_outputs=num_outputs, dtype=dtype, layout=layout, **options)
    examples = config.data.batch_size // config.train.accumulate
    if layout == 'lanes' and (reason := kernels.lanes_unavailable(examples, dtype)):
        raise ValueError(
            f"config.model.layout='lanes' does not run here: {reason}. Take 'auto' or 'channels', or another data.batch_size."
        )
    return model


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(pattern for pattern in text.split(',') if pattern)


def rule_of(config: config_lib.Config, stacked, update_every: int, total_steps: int) -> Rule:
    """What the sparse optimizer does."""
    s = config.sparsity
    options: dict[str, Any] = dict(start_step=s.start_step, stacked=stacked, dense=_patterns(s.dense))
    if s.granularity != 'unstructured':  # srigl has units of its own
        options['granularity'] = s.granularity
    for name in ('prune_rate', 'stop_step', 'distribution', 'prune', 'grow', 'redistribute', 'matrix_axes'):
        if value := getattr(s, name):
            options[name] = None if value == 'none' else value
    if s.method == 'rigl' and s.accumulate_steps > 1:
        options['grow'] = criteria.accumulated_gradient(s.accumulate_steps)
    if s.method == 'srigl':
        options['ablation'] = s.ablation
    if s.method == 'top_kast' and s.backward_density:
        options['backward_density'] = s.backward_density
    if s.method == 'granet':
        options['initial_density'] = s.initial_density
    options |= dict(track_exploration=s.storage == 'dense', seed=jax.random.key(config.seed))
    name = 'static' if s.method in starting_masks.STARTS else s.method  # or whatever growth is named, after the start
    return methods.rule(name, s.density, update_every, total_steps, **options)


class _MaskUpdates(NamedTuple):
    """When masks move, and the gradients that this needs: the fields of the same names in :class:`Experiment`."""

    prune_rate: optax.Schedule | None
    is_mask_update: Callable[[int], bool]
    dense_gradient_steps: int | None
    needs_dense_gradient: Callable[[int], bool]


_NO_UPDATES = _MaskUpdates(
    prune_rate=None,
    is_mask_update=lambda step: False,
    dense_gradient_steps=None,
    needs_dense_gradient=lambda step: True,
)


def _mask_updates(sparsity: config_lib.Sparsity, rule: Rule) -> _MaskUpdates:
    """When masks move."""
    dense_steps = _dense_gradient_steps(sparsity, rule)
    updates = _NO_UPDATES._replace(dense_gradient_steps=dense_steps, needs_dense_gradient=lambda step: dense_steps is None)
    if not rule.is_fixed:
        updates = updates._replace(
            is_mask_update=rule.timing.is_update,
            needs_dense_gradient=lambda step: rule.timing.needs_dense_gradient(step - 1, dense_steps),
        )
    if rule.grow is not None:
        updates = updates._replace(prune_rate=rule.prune_rate_schedule)
    return updates


def _dense_gradient_steps(sparsity: config_lib.Sparsity, rule: Rule) -> int | None:
    """Steps with dense gradients up to each mask update; None: all steps."""
    window = sparsity.dense_gradient_window
    if window is None:
        return None
    if rule.enters_with == 'value':
        if window != config_lib.Sparsity().dense_gradient_window:
            raise ValueError(
                f'config.sparsity.dense_gradient_window={window} has no effect with sparsity.method={sparsity.method!r}, which needs dense gradients '
                'in all steps: leave it, or set None.'
            )
        return None
    needed = criteria.dense_gradient_steps(rule.grow)
    if needed is not None and window != config_lib.Sparsity().dense_gradient_window:
        raise ValueError(
            f'config.sparsity.dense_gradient_window={window} has no effect with sparsity.method={sparsity.method!r}, whose growth '
            f'needs {needed} dense steps: leave it, or set None for all steps.'
        )
    return window if needed is None else needed
