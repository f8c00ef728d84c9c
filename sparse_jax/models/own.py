"""Networks of the user's: a class of flax.nnx or flax.linen as a :class:`sparse_jax.models.Model`.

What such a class is to take: ``rngs`` (nnx only), the options that the config gives, and, where it names them, ``input_shape`` (of one
example), ``num_outputs`` and ``dtype``. Called with a batch it gives logits, [batch, num_outputs], or [batch, length, num_outputs] of tokens.
Where its call takes ``train`` (or ``deterministic``) it is told; nnx modules are put into train or eval mode besides. Linear and Conv layers
of nnx are exchanged for those of ``sj.nnx``, which take sparse kernels; linen's stay dense products of masked weights.
"""

import ast
import functools
import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from flax import nnx as flax_nnx

from sparse_jax import nnx as sparse_nnx
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import references
from sparse_jax.kernels.pattern import is_pattern
from sparse_jax.nnx.layers import SparsityPattern
from sparse_jax.nnx.modules import sparse_layers

_GIVEN = ('input_shape', 'num_outputs', 'dtype')
_TRAINING = {
    'train': True,
    'training': True,
    'is_training': True,
    'deterministic': False,
}  # what says so, and its value in training


class Functions(NamedTuple):
    """A network as pure functions of nested dictionaries: see :class:`sparse_jax.models.Model`."""

    init: Callable[..., Any]
    apply: Callable[..., Any]


def parse_options(text: str) -> dict[str, Any]:
    """Options from text: names with Python's literals, or else words, as values.

    >>> parse_options("width=64, norm=batch, sizes=(3, 5)")
    {'width': 64, 'norm': 'batch', 'sizes': (3, 5)}
    """
    try:
        call = ast.parse(f'f({text})', mode='eval').body
        assert (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and not call.args
            and all(keyword.arg for keyword in call.keywords)
        )
        value = lambda node: (
            node.id if isinstance(node, ast.Name) and node.id not in ('True', 'False', 'None') else ast.literal_eval(node)
        )
        return {str(keyword.arg): value(keyword.value) for keyword in call.keywords}
    except (AssertionError, SyntaxError, ValueError):
        raise ValueError(f"config.model.options={text!r}: must be names and values, such as 'width=64,depth=3'.") from None


def create(name: str, *, options: Mapping[str, Any], input_shape: tuple[int, ...], num_outputs: int, dtype: str) -> Functions:
    """The functions of a class that a config names.

    Args:
      name: ``package.module:Class``.
      options: of the config.
      input_shape: of one example.
      num_outputs: number of classes or tokens.
      dtype: type to compute in.

    Returns:
      Its functions, which have been traced once with an example.

    Raises:
      ValueError: in one line, where it cannot be imported, is no such class, or takes or gives something else.
    """
    made = references.load('config.model.name', name)
    if not (isinstance(made, type) and issubclass(made, flax_nnx.Module | linen.Module)):
        raise ValueError(f'config.model.name={name!r} must be a class derived from flax.nnx.Module or flax.linen.Module.')
    is_nnx = issubclass(made, flax_nnx.Module)
    keywords = _keywords(name, made, dict(options), dict(input_shape=input_shape, num_outputs=num_outputs, dtype=dtype), is_nnx)
    tokens = len(input_shape) == 1
    example = jax.ShapeDtypeStruct((2, *input_shape), jnp.int32 if tokens else jnp.float32)
    try:
        functions = (_of_nnx if is_nnx else _of_linen)(made, keywords, example)
        params, state = jax.eval_shape(functions.init, jax.random.key(0))
        logits, _ = jax.eval_shape(functools.partial(functions.apply, train=False), params, state, example)
    except Exception as error:  # of the user's own code
        reason = ' '.join(str(error).split())[:300]
        raise ValueError(
            f'config.model.name={name!r} fails with an example of shape {tuple(example.shape)} ({type(error).__name__}: {reason}; '
            f'{_where(error, made)}).'
        ) from error
    wanted = (*example.shape, num_outputs) if tokens else (2, num_outputs)
    if getattr(logits, 'shape', None) != wanted:
        found = getattr(logits, 'shape', type(logits).__name__)
        raise ValueError(
            f'config.model.name={name!r} gives {found} for a batch of shape {tuple(example.shape)}, but the logits must be of shape '
            f'{wanted}: {num_outputs} is the number of {"tokens" if tokens else "classes"} of the data.'
        )
    return functions


def _where(error: BaseException, made: type) -> str:
    """The line of the user's file at which an error arose."""
    file = inspect.getsourcefile(made)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f'{file}, line {lines[-1]}' if lines else str(file)


def _keywords(name: str, made: type, options: dict[str, Any], given: dict[str, Any], is_nnx: bool) -> dict[str, Any]:
    """What the class is constructed with; ValueError where that does not fit its signature."""
    if is_nnx:
        parameters = inspect.signature(made.__init__).parameters
    else:
        parameters = {key: value for key, value in inspect.signature(made).parameters.items() if key not in ('parent', 'name')}
    takes = [
        key for key, value in parameters.items() if key != 'self' and value.kind not in (value.VAR_KEYWORD, value.VAR_POSITIONAL)
    ]
    anything = any(value.kind == value.VAR_KEYWORD for value in parameters.values())
    if is_nnx and 'rngs' not in takes and not anything:
        raise ValueError(
            f'config.model.name={name!r} must take rngs, as modules of flax.nnx do; it takes {", ".join(takes) or "nothing"}.'
        )
    for key in options:
        if key in (*_GIVEN, 'rngs') or (key not in takes and not anything):
            raise ValueError(
                f'config.model.options: {name} takes no {key!r}; it takes {", ".join(k for k in takes if k != "rngs") or "none"}.'
            )
    if given['dtype'] != 'float32' and 'dtype' not in takes:
        raise ValueError(f"config.model.dtype={given['dtype']!r}: {name} takes no 'dtype': leave it at 'float32'.")
    keywords = {key: value for key, value in given.items() if key in takes}
    if 'dtype' in keywords:
        keywords['dtype'] = jnp.dtype(given['dtype'])
    required = [key for key, value in parameters.items() if value.default is value.empty and key in takes]
    if missing := [key for key in required if key not in (*keywords, *options, 'rngs')]:
        raise ValueError(
            f"config.model.name={name!r} must be told {', '.join(missing)}: give config.model.options='{missing[0]}=...'."
        )
    return keywords | options


def _telling(call: Callable) -> Callable[[bool], dict[str, bool]]:
    """What a call is told of whether this is training."""
    takes = inspect.signature(call).parameters
    return lambda train: {key: value if train else not value for key, value in _TRAINING.items() if key in takes}


def _measured(logits: Any, measure: Callable | None, labels: Any) -> Any:
    logits = logits.astype(jnp.float32) if hasattr(logits, 'astype') else logits
    return logits if measure is None else measure(logits, labels)


def _of_linen(made: type, keywords: dict[str, Any], example: jax.ShapeDtypeStruct) -> Functions:
    module: Any = made(**keywords)
    tell = _telling(made.__call__)  # pyright: ignore[reportAttributeAccessIssue]

    def init(key):
        keys = dict(zip(('params', 'dropout'), jax.random.split(key), strict=True))
        variables = dict(module.init(keys, jnp.zeros(example.shape, example.dtype), **tell(False)))
        return variables.pop('params'), variables

    def apply(params, state, x, *, train: bool, rng=None, patterns=None, measure=None, labels=None):
        del patterns
        rngs = {} if rng is None else {'dropout': rng}
        mutable = list(state) if train else []
        out = module.apply({'params': params, **state}, x, rngs=rngs, mutable=mutable, **tell(train))
        return _measured(out[0], measure, labels), {**state, **out[1]}

    return Functions(init, apply)


def _of_nnx(made: type, keywords: dict[str, Any], example: jax.ShapeDtypeStruct) -> Functions:
    del example
    tell = _telling(made.__call__)  # pyright: ignore[reportAttributeAccessIssue]
    kinds = (flax_nnx.Param, flax_nnx.RngState, SparsityPattern, ...)

    def make(key):
        return sparse_nnx.sparsify(made(rngs=flax_nnx.Rngs(key), **keywords))

    graph, params_like, rngs_like, no_patterns, state_like = flax_nnx.split(flax_nnx.eval_shape(make, jax.random.key(0)), *kinds)
    params_like, state_like = flax_nnx.to_pure_dict(params_like), flax_nnx.to_pure_dict(state_like)

    def init(key):
        _, params, _, _, state = flax_nnx.split(make(key), *kinds)
        return _named(flax_nnx.to_pure_dict(params)), _named(flax_nnx.to_pure_dict(state))

    def apply(params, state, x, *, train: bool, rng=None, patterns=None, measure=None, labels=None):
        fresh = _fresh(rngs_like, jax.random.key(0) if rng is None else rng)
        module: Any = flax_nnx.merge(graph, _numbered(params, params_like), fresh, no_patterns, _numbered(state, state_like))
        sparse_nnx.set_patterns(module, _those_taken(module, patterns))
        module.train() if train else module.eval()
        logits = module(x, **tell(train))
        after = flax_nnx.split(module, *kinds)[-1]
        return _measured(logits, measure, labels), _named(flax_nnx.to_pure_dict(after))

    return Functions(init, apply)


def _fresh(rngs: Any, key: jax.Array) -> Any:
    """A module's random streams, from one key."""
    leaves, tree = jax.tree.flatten(rngs)
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    made = [
        jax.random.split(jax.random.fold_in(key, i), leaf.shape) if is_key(leaf) else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, made)


def _those_taken(module: Any, patterns: Any) -> Any:
    """The patterns of layers that take them: the others are products of masked weights."""
    if patterns is None:
        return None
    takes = sparse_layers(module)
    tree = jax.tree_util.tree_structure(patterns, is_leaf=lambda x: x is None or is_pattern(x))
    leaves = [
        leaf if path in takes else None
        for path, leaf in layers_lib.leaf_paths(patterns, is_leaf=lambda x: x is None or is_pattern(x))
    ]
    return jax.tree.unflatten(tree, leaves)


def _named(tree: Any) -> Any:
    """Nested dictionaries with text for names, where lists of layers have numbers."""
    return {str(key): _named(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _numbered(tree: Any, like: Any) -> Any:
    """The reverse, with the names of another tree."""
    return {key: _numbered(tree[str(key)], value) for key, value in like.items()} if isinstance(like, dict) else tree
