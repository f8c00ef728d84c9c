"""Models as pure functions over plain dicts: flax.nnx is used inside and never seen outside.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from sparse_jax import models
  >>> model = models.create('lenet300', input_shape=(28, 28, 1), num_outputs=10)
  >>> params, state = model.init(jax.random.key(0))
  >>> logits, state = model.apply(params, state, jnp.zeros((2, 28, 28, 1)), train=False, rng=None)
  >>> logits.shape, params['fc1']['kernel'].shape
  ((2, 10), (784, 300))
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax import kernels
from sparse_jax.core import errors, references
from sparse_jax.models import by_lanes, layers, own, transformer
from sparse_jax.models.cifar import VGG, AlexNet, WideResNet
from sparse_jax.models.lenet import LeNet5, LeNet300
from sparse_jax.models.resnet import ResNet50

# name -> module and what distinguishes it
_MODELS: dict[str, tuple[type[layers.Network], dict[str, Any]]] = {
    'lenet300': (LeNet300, {}),
    'lenet5': (LeNet5, {}),
    'alexnet_s': (AlexNet, dict(hidden=1024)),
    'alexnet_b': (AlexNet, dict(hidden=2048)),
    'vgg_c': (VGG, dict(variant='c')),
    'vgg_d': (VGG, dict(variant='d')),
    'vgg_like': (VGG, dict(variant='like')),
    'wrn_28_2': (WideResNet, dict(depth=28, width=2)),
    'wrn_22_8': (WideResNet, dict(depth=22, width=8)),
    'wrn_16_8': (WideResNet, dict(depth=16, width=8)),
    'wrn_16_10': (WideResNet, dict(depth=16, width=10)),
    'resnet50': (ResNet50, {}),
    'transformer': (transformer.Transformer, {}),
}
DTYPES = ('float32', 'bfloat16')
LAYOUTS = ('auto', 'channels', 'lanes')


class Model(NamedTuple):
    """A model's two functions, and which of its leaves are stacked."""

    init: Callable[..., Any]  # init(key) -> (params, state), nested dicts; works under eval_shape and jit
    # apply(params, state, x, *, train, rng, patterns=None) -> (logits, state); with measure= and labels=, measure(logits, labels) in place
    # of the logits, which for tokens are made part by part where they would be very many
    apply: Callable[..., Any]
    stacked: Callable[[str, Any], bool] | None  # as sj.sparsify takes it; None: no leaf holds several layers


def names() -> list[str]:
    """Names that :func:`create` knows."""
    return sorted(_MODELS)


def options(name: str) -> list[str]:
    """The options that a model takes.

    >>> options('wrn_16_8'), options('vgg_d')
    (['dropout'], [])
    """
    if name not in _MODELS:
        raise errors.unknown('model.name', name, _MODELS)
    module, fixed = _MODELS[name]
    taken = inspect.signature(module.__init__).parameters
    return [option for option in taken if option not in {'self', 'input_shape', 'num_outputs', 'rngs', *fixed}]


def takes_lanes(name: str) -> bool:
    """Whether a model's images may lie by lanes: see by_lanes.py.

    >>> takes_lanes('vgg_d'), takes_lanes('lenet5')
    (True, False)
    """
    return name in _MODELS and _MODELS[name][0].takes_lanes


def create(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_outputs: int,
    dtype: str = 'float32',
    layout: str = 'auto',
    **settings: Any,
) -> Model:
    """A model by name.

    Args:
      name: see :func:`names`; or ``package.module:Class``: see own.py.
      input_shape: of one example: height, width and channels of an image, or the length of a sequence.
      num_outputs: number of classes or tokens.
      dtype: type in which it computes; parameters, normalisation statistics and logits are float32 in any case.
      layout: how the images of the CIFAR networks lie between convolutions: ``'channels'`` (last, in plain XLA), ``'lanes'`` (on the C++
        kernels, which normalise while they read: see by_lanes.py), or ``'auto'``: lanes where they run and are the faster ones, which
        is on one CPU, in float32, for batches that are multiples of 16, where there is a C++ compiler.
      **settings: what this model takes besides: see :func:`options`, and the module's docstring.

    Returns:
      Its functions. ``patterns`` is a tree like the params with a sparsity pattern or None at each leaf; stacked leaves have patterns
      with a first axis too. ``rng`` is needed in training where there is dropout.

    Raises:
      ValueError: if there is no such model or option, or it cannot take such examples.
    """
    if references.is_reference(name):
        if layout == 'lanes':
            raise ValueError(f"model.layout='lanes' is for the CIFAR networks: {name} takes 'auto' or 'channels'.")
        functions = own.create(name, options=settings, input_shape=tuple(input_shape), num_outputs=num_outputs, dtype=dtype)
        return Model(*functions, stacked=None)
    possible = options(name)
    for option in settings:
        if option not in possible:
            raise errors.unknown(f'the option of {name}', option, possible)
    if dtype not in DTYPES:
        raise errors.unknown('model.dtype', dtype, DTYPES)
    if layout not in LAYOUTS:
        raise errors.unknown('model.layout', layout, LAYOUTS)
    module, fixed = _MODELS[name]
    if not module.takes_tokens and len(input_shape) != 3:
        raise ValueError(f'model.name={name!r} takes images, got examples of shape {tuple(input_shape)}: choose other data.')
    compute = jnp.dtype(dtype)
    if layout == 'lanes' and not module.takes_lanes:
        raise ValueError(f"model.layout='lanes' is for the CIFAR networks: {name} takes 'auto' or 'channels'.")

    def make(key):
        return module(tuple(input_shape), num_outputs, **fixed, **settings, rngs=nnx.Rngs(key))  # pyright: ignore[reportCallIssue]

    graphdef = nnx.split(nnx.eval_shape(make, jax.random.key(0)))[0]

    def init(key):
        _, params, rest = nnx.split(make(key), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def apply(params, state, x, *, train: bool, rng=None, patterns=None, measure=None, labels=None):
        model: Any = nnx.merge(graphdef, params, state)
        in_state = lambda: nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
        if module.takes_tokens:
            wide = None if measure is None else lambda logits, labels: measure(logits.astype(jnp.float32), labels)
            logits = model(x, train=train, rng=rng, patterns=patterns, dtype=compute, measure=wide, labels=labels)
            if measure is not None:
                return logits, in_state()
        else:
            x = x.astype(compute)
            count = len(x)
            if module.takes_lanes and _by_lanes(layout, x, params, patterns, train):
                x = by_lanes.begin(jnp.pad(x, ((0, -count % by_lanes.BATCH), (0, 0), (0, 0), (0, 0))), train=train)
            logits = model(x, train=train, rng=rng, patterns=patterns)[:count]
        logits = logits.astype(jnp.float32)
        return logits if measure is None else measure(logits, labels), in_state()

    return Model(init, apply, transformer.stacked if module.takes_tokens else None)


def _by_lanes(layout: str, x: Any, params: Any, patterns: Any, train: bool) -> bool:
    """Whether images are to lie by lanes; ValueError where that was asked for and cannot be."""
    if not train and (layout == 'lanes' or len(x) >= by_lanes.BATCH):  # where no example sees another, a batch may be filled up
        x = jax.ShapeDtypeStruct((by_lanes.BATCH, *x.shape[1:]), x.dtype)
    is_pattern = lambda p: isinstance(p, kernels.Pattern | kernels.Layout)
    named = {p.implementation for p in jax.tree.leaves(patterns, is_leaf=is_pattern) if is_pattern(p)}
    if layout == 'channels' or (layout == 'auto' and ('reference' in named or jax.device_count() > 1)):
        return False
    is_frozen = lambda leaf: isinstance(leaf, kernels.CompactWeight)
    if any(map(is_frozen, jax.tree.leaves(params, is_leaf=is_frozen))):
        return False
    reason = kernels.lanes_unavailable(x.shape[0], x.dtype)
    if reason and layout == 'lanes':
        raise ValueError(f"model.layout='lanes' does not run here: {reason}. Take 'auto' or 'channels'.")
    return not reason
