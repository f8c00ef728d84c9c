"""The settings of an experiment, as typed dataclasses; standard library only. Intervals are in steps."""

import dataclasses
import math
from typing import Any

from sparse_jax.core import errors


@dataclasses.dataclass
class Model:
    name: str = 'lenet300'  # see sparse_jax.models
    dtype: str = 'float32'  # of the computation: float32 or bfloat16; parameters are float32 in any case
    layout: str = 'auto'  # of images between convolutions: auto, channels or lanes, see models.create
    dropout: float = -1.0  # probability, in [0, 1); -1: the model's own
    depth: int = 0  # transformer: layers
    features: int = 0  # transformer: width of the residual stream
    heads: int = 0  # transformer: of the attention
    hidden: int = 0  # transformer: width of the SwiGLU; 0: 8/3 of features, rounded up to a multiple of 64
    tied: bool = True  # transformer: whether the output layer is the embedding, transposed
    remat: bool = False  # transformer: compute activations again in the backward pass, to save memory


@dataclasses.dataclass
class Data:
    name: str = 'mnist'  # see sparse_jax.data
    dir: str = 'data/mnist'  # folder with the data set's files; not used by data that a package carries
    batch_size: int = 100  # examples a step
    eval_batch_size: int = 1000  # examples at a time in evaluations
    download: bool = False  # fetch missing files into `dir`, with checksums
    validation: float = (
        0.1  # part of the training examples (of text: of the files) that is set apart for choosing settings, in [0, 1)
    )
    augment: bool = True  # cifar: random crops and flips of the training images
    pattern: str = '**/*.txt'  # text: which files below `dir`
    tokenizer: str = ''  # text: a JSON file of the library tokenizers; empty: bytes
    length: int = 256  # text: tokens of a sequence
    prefetch: int = 2  # batches that are made ahead, in a thread; 0: none


@dataclasses.dataclass
class Optimizer:
    name: str = 'sgd'  # see sparse_jax.train.optimizer
    learning_rate: float = 0.1  # at the start, or after the warm-up
    schedule: str = 'step'  # step: x decay_factor every decay_every steps; cosine: to final_factor at the end; constant
    warmup_steps: int = 0  # of a linear warm-up, in equal parts of learning_rate
    decay_every: int = 25_000  # step schedule: in steps; 0: never
    decay_factor: float = 0.1  # step schedule
    final_factor: float = 0.0  # cosine schedule: the last learning rate as a part of learning_rate, in [0, 1]
    momentum: float = 0.9  # sgd: decay of the momentum, in [0, 1)
    nesterov: bool = True  # sgd
    beta1: float = 0.9  # adamw: decay of the mean of the gradients
    beta2: float = 0.95  # adamw: decay of the mean of their squares
    weight_decay: float = 5e-4  # sgd: L2, added to the gradient; adamw: decoupled, of matrices only
    clip_norm: float = 0.0  # largest global norm of the gradients of existing weights; 0: none


@dataclasses.dataclass
class Sparsity:
    method: str = 'sparse_momentum'  # see sparse_jax.methods; or 'dense': the dense twin, everything else equal
    density: float = 0.05  # share of the sparse leaves' weights that exist, in (0, 1]; with gmp and granet: at the end
    initial_density: float = 0.5  # granet: where its density begins, in (0, 1]
    accumulate_steps: int = 1  # rigl: grow by the sum of the gradients of so many steps
    prune: str = ''  # criterion of sparse_jax.criteria in place of the method's; empty: the method's
    grow: str = ''  # likewise; 'none': nothing is grown
    redistribute: str = ''  # likewise; 'none': each layer regrows what it pruned
    prune_rate: float = 0.0  # part of the weights an update moves, at the start of a cosine to 0.005; 0: the method's
    update_every: int = 0  # steps between mask updates; 0: one epoch
    start_step: int = 0  # no mask update up to this step
    stop_step: int = 0  # no mask update from this step on; 0: the method's
    distribution: str = ''  # of the first weights over the layers: uniform, erdos_renyi, erk; empty: the method's
    granularity: str = 'unstructured'  # what one unit of selection is; block:16x16, block:16x16:kernel
    dense: str = ''  # path patterns of leaves that stay dense, separated by commas, such as fc3/*
    kernels: str = (
        'auto'  # of sparse layers: auto (the fastest for each layer at 90% or less, measured), reference, cpu, gpu, tpu, dense
    )
    # steps up to a mask update whose gradients are dense, where growth reads a momentum; None: all steps; 0: none
    dense_gradient_window: int | None = 22


@dataclasses.dataclass
class Train:
    epochs: int = 100  # passes over the training data
    steps: int = 0  # length of the training in steps; wins over epochs; 0: epochs decide
    eval_every: int = 0  # steps between evaluations; 0: one epoch
    label_smoothing: float = 0.0  # part of the target that is spread over all classes, in [0, 1)
    accumulate: int = 1  # parts that a batch is worked through in, one after the other; divides data.batch_size
    average_decay: float = 0.0  # of an exponential average of the weights, which evaluations then use, in [0, 1); 0: none


@dataclasses.dataclass
class Checkpoint:
    every: int = 1000  # steps between checkpoints; the last step has one in any case
    keep: int = 2  # newest checkpoints to keep


@dataclasses.dataclass
class Mesh:  # data=1 and model=1: one device, whatever there are
    data: int = -1  # devices that a batch is divided over; -1: all that are left
    model: int = 1  # devices that layers are divided over; -1: all that are left
    layout: str = 'data'  # which weights are divided, see sparse_jax.sharding: data, model, fsdp, model+fsdp
    rules: str = ''  # own rules, which come first: pattern of a path=axes;..., such as fc1/kernel=none,model


@dataclasses.dataclass
class Log:
    every: int = 100  # steps between lines of training metrics
    tensorboard: bool = False  # also write event files; needs the extra `tensorboard`


@dataclasses.dataclass
class Config:
    """All settings of one experiment."""

    seed: int = 0  # of the parameters, the masks and the order of the data
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    sparsity: Sparsity = dataclasses.field(default_factory=Sparsity)
    train: Train = dataclasses.field(default_factory=Train)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    log: Log = dataclasses.field(default_factory=Log)


# What may differ when a run is resumed; everything else is the experiment's identity.
_FREE = ('mesh.', 'checkpoint.', 'log.', 'data.dir', 'data.download', 'data.prefetch', 'sparsity.kernels')


def flatten(config: Config) -> dict[str, object]:
    """All settings by their dotted names.

    Args:
      config: the settings.

    Returns:
      A flat dictionary.

    Example:
      >>> flatten(Config())['sparsity.density']
      0.05
    """
    flat = {}
    for key, value in dataclasses.asdict(config).items():
        flat |= {f'{key}.{k}': v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def identity(config: Config) -> dict[str, object]:
    """The settings that must not change within one run.

    Args:
      config: the settings.

    Returns:
      A flat dictionary without ``checkpoint.*``, ``log.*``, ``data.dir``, ``data.download`` and ``data.prefetch``.

    Example:
      >>> 'data.dir' in identity(Config()), 'seed' in identity(Config())
      (False, True)
    """
    return {k: v for k, v in flatten(config).items() if not k.startswith(_FREE)}


# (setting, what is allowed, in words)
_RANGES = (
    ('seed', lambda v: 0 <= v < 2**31, 'in [0, 2^31)'),
    ('model.dropout', lambda v: 0 <= v < 1 or v == -1, "in [0, 1), or -1 (the model's own)"),
    ('model.depth', lambda v: v >= 0, 'at least 0'),
    ('model.features', lambda v: v >= 0, 'at least 0'),
    ('model.heads', lambda v: v >= 0, 'at least 0'),
    ('model.hidden', lambda v: v >= 0, 'at least 0 (0: 8/3 of model.features)'),
    ('data.batch_size', lambda v: v >= 1, 'at least 1'),
    ('data.eval_batch_size', lambda v: v >= 1, 'at least 1'),
    ('data.validation', lambda v: 0 <= v < 1, 'in [0, 1)'),
    ('data.length', lambda v: v >= 1, 'at least 1'),
    ('data.prefetch', lambda v: v >= 0, 'at least 0 (0: none)'),
    ('optimizer.learning_rate', lambda v: 0 < v < math.inf, 'positive and finite'),
    ('optimizer.warmup_steps', lambda v: v >= 0, 'at least 0'),
    ('optimizer.final_factor', lambda v: 0 <= v <= 1, 'in [0, 1]'),
    ('optimizer.momentum', lambda v: 0 <= v < 1, 'in [0, 1)'),
    ('optimizer.beta1', lambda v: 0 <= v < 1, 'in [0, 1)'),
    ('optimizer.beta2', lambda v: 0 <= v < 1, 'in [0, 1)'),
    ('optimizer.clip_norm', lambda v: 0 <= v < math.inf, 'at least 0 (0: none) and finite'),
    ('optimizer.weight_decay', lambda v: 0 <= v < math.inf, 'at least 0 and finite'),
    ('optimizer.decay_every', lambda v: v >= 0, 'at least 0 (0: never)'),
    ('optimizer.decay_factor', lambda v: 0 < v < math.inf, 'positive and finite'),
    ('sparsity.density', lambda v: 0 < v <= 1, 'in (0, 1]'),
    ('sparsity.initial_density', lambda v: 0 < v <= 1, 'in (0, 1]'),
    ('sparsity.accumulate_steps', lambda v: v >= 1, 'at least 1'),
    ('sparsity.prune_rate', lambda v: 0 <= v <= 1, "in [0, 1] (0: the method's)"),
    ('sparsity.update_every', lambda v: v >= 0, 'at least 0 (0: one epoch)'),
    ('sparsity.start_step', lambda v: v >= 0, 'at least 0'),
    ('sparsity.stop_step', lambda v: v >= 0, "at least 0 (0: the method's)"),
    ('sparsity.dense_gradient_window', lambda v: v is None or v >= 0, 'at least 0, or None (all steps)'),
    ('train.epochs', lambda v: v >= 1, 'at least 1'),
    ('train.steps', lambda v: v >= 0, 'at least 0 (0: train.epochs decides)'),
    ('train.eval_every', lambda v: v >= 0, 'at least 0 (0: one epoch)'),
    ('train.label_smoothing', lambda v: 0 <= v < 1, 'in [0, 1)'),
    ('train.accumulate', lambda v: v >= 1, 'at least 1'),
    ('train.average_decay', lambda v: 0 <= v < 1, 'in [0, 1) (0: none)'),
    ('checkpoint.every', lambda v: v >= 1, 'at least 1'),
    ('checkpoint.keep', lambda v: v >= 1, 'at least 1'),
    ('log.every', lambda v: v >= 1, 'at least 1'),
)


# (settings, the setting that decides whether they have an effect, its values with which they do)
_IMAGES = ('cifar10', 'cifar100', 'digits32')
_ONLY_FOR = (
    (('data.pattern',), 'data.name', ('text',)),
    (('data.tokenizer', 'data.length'), 'data.name', ('text', 'stdlib')),
    (('data.augment',), 'data.name', _IMAGES),
    (('data.download',), 'data.name', ('mnist', 'cifar10', 'cifar100')),
    (('optimizer.momentum', 'optimizer.nesterov'), 'optimizer.name', ('sgd',)),
    (('optimizer.beta1', 'optimizer.beta2'), 'optimizer.name', ('adamw',)),
    (('optimizer.final_factor',), 'optimizer.schedule', ('cosine',)),
    (('sparsity.initial_density',), 'sparsity.method', ('granet', 'dense')),
    (('sparsity.accumulate_steps',), 'sparsity.method', ('rigl', 'dense')),
)


def override(config: Config, name: str, value: str) -> None:
    """Sets one setting from text, as the command line does.

    Args:
      config: is changed.
      name: such as ``sparsity.density``.
      value: text; true and false for booleans.

    Raises:
      ValueError: if there is no such setting, or the text is not of its type.

    Example:
      >>> config = Config()
      >>> override(config, 'sparsity.density', '0.1')
      >>> config.sparsity.density
      0.1
    """
    known = flatten(config)
    if name not in known:
        raise errors.unknown('setting', name, known)
    kind = int if name in _OPTIONAL else type(known[name])
    try:
        if name in _OPTIONAL and value.lower() == 'none':
            parsed = None
        else:
            parsed = {'true': True, 'false': False}[value.lower()] if kind is bool else _PARSERS[kind](value)
    except (ValueError, KeyError) as error:
        raise ValueError(f'{name}={value!r} is not {_KINDS[kind]}.') from error
    *section, field = name.split('.')
    setattr(getattr(config, section[0]) if section else config, field, parsed)


_OPTIONAL = ('sparsity.dense_gradient_window',)
_PARSERS: dict[type, Any] = {int: int, float: float, str: str}
_KINDS = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text'}


def validate(config: Config) -> None:
    """Checks every number's range, and that no setting is changed that has no effect.

    Args:
      config: the settings.

    Raises:
      ValueError: naming the first wrong setting, what was given and what would work.

    Example:
      >>> validate(Config(seed=-1))
      Traceback (most recent call last):
      ...
      ValueError: config.seed=-1: must be in [0, 2^31).
    """
    flat, default = flatten(config), flatten(Config())
    for name, allowed, words in _RANGES:
        if (flat[name] is None and name not in _OPTIONAL) or not allowed(flat[name]):  # a NaN is in no range
            raise ValueError(f'config.{name}={flat[name]!r}: must be {words}.')
    for names, chooser, choices in _ONLY_FOR:
        for name in names:
            if flat[name] != default[name] and flat[chooser] not in choices:
                raise ValueError(
                    f'config.{name}={flat[name]!r} has no effect with {chooser}={flat[chooser]!r}, only with {", ".join(choices)}: '
                    f'leave it at {default[name]!r}.'
                )
