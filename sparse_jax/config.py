"""The settings of an experiment, as typed dataclasses; standard library only. Intervals are in steps.

The comment of a field describes it, wherever settings are listed: ``python launch.py --list_settings`` prints them all.
"""

import ast
import dataclasses
import inspect
import io
import math
import tokenize
from collections.abc import Callable
from typing import Any, NamedTuple

from sparse_jax.core import errors


class _Section:
    """Settings that cannot be misspelt: a name that does not exist is refused where it is set."""

    def __setattr__(self, name: str, value: object) -> None:
        known = {field.name for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        prefix = 'config.' if type(self) is Config else f'config.{type(self).__name__.lower()}.'
        if name not in known:
            raise ValueError(f'{prefix}{name} does not exist.{errors.did_you_mean(name, sorted(known))}')
        if isinstance(section := getattr(self, name, None), _Section) and type(value) is not type(section):
            raise ValueError(f'{prefix}{name}={value!r}: is a group of settings, of which each is set by its own name.')
        object.__setattr__(self, name, value)


@dataclasses.dataclass
class Model(_Section):
    name: str = 'lenet300'  # Network to train; mypackage.nets:MyNet for a class of one's own, of flax.nnx or flax.linen.
    options: str = ''  # A class of one's own: what it is constructed with, such as width=64,depth=3; empty: nothing more.
    dtype: str = 'float32'  # Type to compute in; parameters are float32 in any case.
    # Memory layout of images between convolutions: channels last, in lanes for the C++ kernels, or auto, the faster one where it runs.
    layout: str = 'auto'
    dropout: float = -1.0  # Probability of dropout; -1: the model's own.
    depth: int = 0  # Transformer: number of layers; at least 1 there, 0 for all other models.
    features: int = 0  # Transformer: width of the residual stream; at least 1 there, 0 for all other models.
    heads: int = 0  # Transformer: number of attention heads; at least 1 there, 0 for all other models.
    hidden: int = 0  # Transformer: width of the SwiGLU; 0: 8/3 of model.features, rounded up to a multiple of 64.
    tied: bool = True  # Transformer: the output layer is the transpose of the embedding.
    # Transformer: what the backward pass computes again, to save memory: none, products (all but their results), or all.
    remat: str = 'none'


@dataclasses.dataclass
class Data(_Section):
    # Data set; text reads the files of data.dir, stdlib the sources of Python's standard library, folder images in a folder for each class,
    # npz the arrays x_train, y_train, x_test and y_test; mypackage.data:load for a function of one's own that gets data.dir.
    name: str = 'mnist'
    dir: str = 'data/mnist'  # Folder with the data set's files (npz: the file); unused by data sets that come with a package.
    batch_size: int = 100  # Examples a training step, over all devices.
    eval_batch_size: int = 1000  # Examples a batch in evaluations, over all devices.
    download: bool = False  # Download missing files into data.dir, and verify their checksums.
    validation: float = 0.1  # Fraction of the training examples (text: of the files) held out for choosing settings; 0: none.
    augment: bool = True  # Crop training images at random, and flip those of CIFAR and of folders.
    pattern: str = '**/*.txt'  # Glob pattern of the text files below data.dir.
    tokenizer: str = ''  # Tokenizer of text, a JSON file of the library tokenizers; empty: bytes are the tokens.
    length: int = 256  # Tokens in a sequence of text.
    size: int = 0  # Folder: side in pixels that images are scaled to; 0: their own.
    skip_unreadable: bool = False  # Folder: leave images out that cannot be read, with a warning each, instead of ending.
    prefetch: int = 2  # Batches to prepare ahead in a thread; 0: none.


@dataclasses.dataclass
class Optimizer(_Section):
    name: str = 'sgd'  # Optimizer that the sparse method wraps.
    learning_rate: float = 0.1  # Learning rate at the start, or at the end of the warm-up.
    # Schedule of the learning rate: step multiplies it by decay_factor every decay_every steps, cosine ends at final_factor.
    schedule: str = 'step'
    warmup_steps: int = 0  # Steps of linear warm-up; 0: none.
    decay_every: int = 25_000  # Step schedule: steps between decays; 0: never decay.
    decay_at: str = (
        ''  # Step schedule: steps of its decays, separated by commas, in the place of optimizer.decay_every; empty: that decides.
    )
    decay_factor: float = 0.1  # Step schedule: factor of each decay.
    final_factor: float = 0.0  # Cosine schedule: last learning rate, as a fraction of optimizer.learning_rate.
    momentum: float = 0.9  # SGD: decay of the momentum.
    nesterov: bool = True  # SGD: use Nesterov momentum.
    beta1: float = 0.9  # AdamW: decay of the mean of the gradients.
    beta2: float = 0.95  # AdamW: decay of the mean of the squared gradients.
    weight_decay: float = 5e-4  # SGD: L2 penalty, added to the gradient. AdamW: decoupled, on matrices only. 0: none.
    clip_norm: float = 0.0  # Largest global norm of the gradients of existing weights; larger ones are scaled down; 0: no clipping.


@dataclasses.dataclass
class Sparsity(_Section):
    method: str = 'sparse_momentum'  # Sparse training method; dense trains the dense twin, everything else equal.
    density: float = 0.05  # Fraction of the sparse layers' weights that exist; where a method changes it, at the end.
    initial_density: float = 0.5  # GraNet: density at the start of its schedule.
    backward_density: float = (
        0.0  # Top-KAST: fraction of the weights that are trained, in the forward pass or not; 0: twice the density.
    )
    ablation: float = (
        0.3  # SRigL: part of a layer's inputs that must be salient, or an output loses all of its own; 0: outputs stay.
    )
    accumulate_steps: int = 1  # RigL: grow by the sum of the gradients of this many steps.
    prune: str = ''  # Criterion of pruning: which weights go first; empty: the method's.
    grow: str = ''  # Criterion of growth: which weights come first; empty: the method's; none: nothing is grown.
    redistribute: str = (
        ''  # Criterion of redistribution between layers; empty: the method's; none: each layer regrows what it pruned.
    )
    prune_rate: float = 0.0  # Fraction of the weights pruned at a mask update, at the start of a cosine to 0.005; 0: the method's.
    update_every: int = 0  # Steps between mask updates; 0: one epoch.
    start_step: int = 0  # Last step before mask updates begin; 0: they begin at once.
    stop_step: int = 0  # First step without mask updates; 0: the method's.
    distribution: str = ''  # Distribution of the first weights over the layers: uniform, erdos_renyi or erk; empty: the method's.
    # Unit of pruning and growth: unstructured (single weights), block:RxC (R inputs by C outputs), block:RxC:kernel (such blocks of
    # whole convolution kernels), n_of_m:N:M (N of every M inputs), or fan_in (as many inputs for every output).
    granularity: str = 'unstructured'
    # Which axes of a weight are inputs and outputs, for a model of one's own: flax (its attention kernels), torch ([outputs, inputs, taps...]);
    # empty: the last two.
    matrix_axes: str = ''
    dense: str = (
        ''  # Layers to keep dense: patterns of their paths, separated by commas, such as fc3/*; empty: no more than the model's.
    )
    # What is stored of sparse layers: dense arrays with zeros, or, in compact storage, existing weights only, their gradients and moments:
    # memory falls with the density.
    storage: str = 'dense'
    groups: int = 1  # Compact storage: groups of sparse layers that take turns in mask updates, each with gradients of its own, to save memory.
    # Kernels of sparse layers: auto measures each layer of density 0.9 or less and takes the fastest; dense multiplies masked weights.
    kernels: str = 'auto'
    # Steps up to a mask update that compute dense gradients, where growth reads a momentum; None: all steps; 0: none.
    dense_gradient_window: int | None = 22


@dataclasses.dataclass
class Train(_Section):
    epochs: int = 100  # Passes over the training data; unused where train.steps is set.
    steps: int = 0  # Length of the training in steps; 0: train.epochs decides. A run that exists can be given more.
    # Steps that schedules and mask updates are laid out over: afterwards the learning rate keeps its last value and masks rest; 0: all
    # steps, or those that the run in the workdir began with.
    schedule_steps: int = 0
    init_from: str = ''  # Workdir, .npz or .safetensors file whose weights and masks the run starts with; empty: none.
    # Step at which the network of train.init_from begins, as one does that was rewound: schedules and data go on there; 0: the first.
    start_step: int = 0
    eval_every: int = 0  # Steps between evaluations; 0: one epoch.
    label_smoothing: float = 0.0  # Fraction of the target that is spread evenly over all classes; 0: none.
    accumulate: int = (
        1  # Microbatches that a batch is split into, one after the other, to save memory; must divide data.batch_size.
    )
    average_decay: float = 0.0  # Decay of an exponential moving average of the weights, which evaluations then use; 0: none.


@dataclasses.dataclass
class Checkpoint(_Section):
    every: int = 1000  # Steps between checkpoints; the last step always has one.
    keep: int = 2  # Number of checkpoints to keep, the newest.


@dataclasses.dataclass
class Mesh(_Section):  # data=1 and model=1 use one device, even where there are more
    data: int = -1  # Devices that a batch is divided over, at least 1; -1: all that mesh.model leaves.
    model: int = 1  # Devices that layers are divided over, at least 1; -1: all that mesh.data leaves.
    layout: str = 'data'  # Which weights are divided, and along which axes of the mesh.
    rules: str = ''  # Sharding rules that precede the layout's: PATTERN=AXES;..., such as fc1/kernel=none,model; empty: none.


@dataclasses.dataclass
class Log(_Section):
    every: int = 100  # Steps between lines of training metrics.
    tensorboard: bool = False  # Write TensorBoard event files too; needs the extra `tensorboard`.
    callback: str = (
        ''  # Function of one's own, mypackage:function: called as (step, values) with what metrics.jsonl gets; empty: none.
    )


@dataclasses.dataclass
class Config(_Section):
    """All settings of one experiment."""

    seed: int = 0  # Seed of the parameters, the masks and the order of the data.
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
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_section = dataclasses.is_dataclass(value)
        flat |= {f'{field.name}.{k}': v for k, v in vars(value).items()} if is_section else {field.name: value}
    return flat


def identity(config: Config) -> dict[str, object]:
    """The settings that must not change within one run.

    Args:
      config: the settings.

    Returns:
      A flat dictionary without ``mesh.*``, ``checkpoint.*``, ``log.*``, ``data.dir``, ``data.download``, ``data.prefetch`` and
      ``sparsity.kernels``.

    Example:
      >>> 'data.dir' in identity(Config()), 'seed' in identity(Config())
      (False, True)
    """
    return {k: v for k, v in flatten(config).items() if not k.startswith(_FREE)}


class _Range(NamedTuple):
    words: str
    holds: Callable[[Any], bool]  # False for a NaN


_AT_LEAST_0 = _Range('at least 0', lambda v: v >= 0)
_AT_LEAST_1 = _Range('at least 1', lambda v: v >= 1)
_FINITE = _Range('at least 0 and finite', lambda v: 0 <= v < math.inf)
_POSITIVE = _Range('positive and finite', lambda v: 0 < v < math.inf)
_FROM_0_TO_1 = _Range('in [0, 1]', lambda v: 0 <= v <= 1)
_BELOW_1 = _Range('in [0, 1)', lambda v: 0 <= v < 1)
_ABOVE_0 = _Range('in (0, 1]', lambda v: 0 < v <= 1)

_RANGES = {
    'seed': _Range('in [0, 2^31)', lambda v: 0 <= v < 2**31),
    'model.dropout': _Range('in [0, 1), or -1', lambda v: 0 <= v < 1 or v == -1),
    'model.depth': _AT_LEAST_0,
    'model.features': _AT_LEAST_0,
    'model.heads': _AT_LEAST_0,
    'model.hidden': _AT_LEAST_0,
    'data.batch_size': _AT_LEAST_1,
    'data.eval_batch_size': _AT_LEAST_1,
    'data.validation': _BELOW_1,
    'data.length': _AT_LEAST_1,
    'data.prefetch': _AT_LEAST_0,
    'data.size': _AT_LEAST_0,
    'optimizer.learning_rate': _POSITIVE,
    'optimizer.warmup_steps': _AT_LEAST_0,
    'optimizer.final_factor': _FROM_0_TO_1,
    'optimizer.momentum': _BELOW_1,
    'optimizer.beta1': _BELOW_1,
    'optimizer.beta2': _BELOW_1,
    'optimizer.clip_norm': _FINITE,
    'optimizer.weight_decay': _FINITE,
    'optimizer.decay_every': _AT_LEAST_0,
    'optimizer.decay_factor': _POSITIVE,
    'sparsity.density': _ABOVE_0,
    'sparsity.initial_density': _ABOVE_0,
    'sparsity.backward_density': _FROM_0_TO_1,
    'sparsity.ablation': _FROM_0_TO_1,
    'sparsity.accumulate_steps': _AT_LEAST_1,
    'sparsity.groups': _AT_LEAST_1,
    'sparsity.prune_rate': _FROM_0_TO_1,
    'sparsity.update_every': _AT_LEAST_0,
    'sparsity.start_step': _AT_LEAST_0,
    'sparsity.stop_step': _AT_LEAST_0,
    'sparsity.dense_gradient_window': _Range('at least 0, or None', lambda v: v is None or v >= 0),
    'train.epochs': _AT_LEAST_1,
    'train.steps': _AT_LEAST_0,
    'train.schedule_steps': _AT_LEAST_0,
    'train.start_step': _AT_LEAST_0,
    'train.eval_every': _AT_LEAST_0,
    'train.label_smoothing': _BELOW_1,
    'train.accumulate': _AT_LEAST_1,
    'train.average_decay': _BELOW_1,
    'checkpoint.every': _AT_LEAST_1,
    'checkpoint.keep': _AT_LEAST_1,
    'mesh.data': _Range('at least 1, or -1', lambda v: v >= 1 or v == -1),
    'mesh.model': _Range('at least 1, or -1', lambda v: v >= 1 or v == -1),
    'log.every': _AT_LEAST_1,
}

# (settings, the setting that decides whether they have an effect, its values with which they do)
_IMAGES = ('cifar10', 'cifar100', 'digits32', 'folder')
_ONLY_FOR = (
    (('data.pattern',), 'data.name', ('text',)),
    (('data.tokenizer', 'data.length'), 'data.name', ('text', 'stdlib')),
    (('data.augment',), 'data.name', _IMAGES),
    (('data.size', 'data.skip_unreadable'), 'data.name', ('folder',)),
    (('data.download',), 'data.name', ('mnist', 'cifar10', 'cifar100')),
    (('optimizer.momentum', 'optimizer.nesterov'), 'optimizer.name', ('sgd',)),
    (('optimizer.beta1', 'optimizer.beta2'), 'optimizer.name', ('adamw',)),
    (('optimizer.final_factor',), 'optimizer.schedule', ('cosine',)),
    (('optimizer.decay_at',), 'optimizer.schedule', ('step',)),
    (('sparsity.initial_density',), 'sparsity.method', ('granet', 'dense')),
    (('sparsity.accumulate_steps',), 'sparsity.method', ('rigl', 'dense')),
    (('sparsity.backward_density',), 'sparsity.method', ('top_kast', 'dense')),
    (('sparsity.ablation',), 'sparsity.method', ('srigl', 'dense')),
    (('sparsity.groups',), 'sparsity.storage', ('compact',)),
)

_OPTIONAL = ('sparsity.dense_gradient_window',)
_PARSERS: dict[type, Any] = {int: int, float: float, str: str}
_KINDS = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text'}


def _kind(name: str, default: object) -> type:
    return int if name in _OPTIONAL else type(default)


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
    current = flatten(config)
    if name not in current:
        raise errors.unknown('setting', name, current)
    kind = _kind(name, current[name])
    try:
        if name in _OPTIONAL and value.lower() == 'none':
            parsed = None
        else:
            parsed = {'true': True, 'false': False}[value.lower()] if kind is bool else _PARSERS[kind](value)
    except (ValueError, KeyError) as error:
        raise ValueError(f'{name}={value!r} is not {_KINDS[kind]}.') from error
    *section, field = name.split('.')
    setattr(getattr(config, section[0]) if section else config, field, parsed)


def validate(config: Config) -> None:
    """Checks every setting's type, every number's range, and that no setting is changed that has no effect.

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
    for name, value in flat.items():
        kind = _kind(name, default[name])
        fits = type(value) in ((int, float) if kind is float else (kind,)) or (value is None and name in _OPTIONAL)
        if not fits:
            raise ValueError(f'config.{name}={value!r}: must be {_KINDS[kind]}.')
        if isinstance(value, int) and abs(value) >= 2**31:
            raise ValueError(f'config.{name}={value}: must be below 2^31.')
    for name, allowed in _RANGES.items():
        if not allowed.holds(flat[name]):
            raise ValueError(f'config.{name}={flat[name]!r}: must be {allowed.words}.')
    for names, chooser, choices in _ONLY_FOR:
        for name in names:
            if flat[name] != default[name] and flat[chooser] not in choices:
                raise ValueError(
                    f'config.{name}={flat[name]!r} has no effect with {chooser}={flat[chooser]!r}, only with {", ".join(choices)}: '
                    f'leave it at {default[name]!r}.'
                )


class Setting(NamedTuple):
    """One setting, as it is listed."""

    name: str  # dotted
    type: str
    default: object
    allowed: str  # the range of a number; empty: anything of the type
    only_with: str  # the values of another setting that give it an effect; empty: it always has one
    description: str


def describe() -> list[Setting]:
    """Describes every setting, in the order of the dataclasses.

    Returns:
      One row a setting; descriptions are the comments of the fields in this file.

    Example:
      >>> next(setting for setting in describe() if setting.name == 'sparsity.initial_density')
      Setting(name='sparsity.initial_density', type='float', default=0.5, allowed='in (0, 1]',
              only_with='sparsity.method=granet, dense', description='GraNet: density at the start of its schedule.')
    """
    comments = _comments(Config)
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            comments |= {f'{field.name}.{name}': comment for name, comment in _comments(field.type).items()}
    only_with = {name: f'{chooser}={", ".join(choices)}' for names, chooser, choices in _ONLY_FOR for name in names}
    return [
        Setting(
            name=name,
            type=_kind(name, default).__name__,
            default=default,
            allowed=_RANGES[name].words if name in _RANGES else '',
            only_with=only_with.get(name, ''),
            description=comments[name],
        )
        for name, default in flatten(Config()).items()
    ]


def _comments(section: Any) -> dict[str, str]:
    """The comment of each field of a dataclass: on the lines above it, or after its value."""
    source = inspect.getsource(section)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {token.start[0]: token.string.lstrip('# ') for token in tokens if token.type == tokenize.COMMENT}
    [definition] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    comments, end = {}, definition.lineno
    for node in definition.body:
        start, end = end + 1, node.end_lineno or node.lineno
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            comments[node.target.id] = ' '.join(lines[line] for line in range(start, end + 1) if line in lines)
    return comments
