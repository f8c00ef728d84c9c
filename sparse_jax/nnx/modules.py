"""A whole module: its layers exchanged, its patterns set, its kernels for one's own loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_jax import kernels
from sparse_jax.core import errors
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.core.schedules import Timing
from sparse_jax.kernels.layout import is_compact
from sparse_jax.kernels.pattern import is_pattern
from sparse_jax.nnx.layers import SparseConv, SparseLinear, SparsityPattern

_STORED = nnx.Any(nnx.Param, nnx.BatchStat)
_EXCHANGED = {nnx.Linear: SparseLinear, nnx.Conv: SparseConv}


def sparsify(module: nnx.Module) -> Any:
    """A new module whose Linear and Conv layers are :class:`SparseLinear` and :class:`SparseConv`, with the same parameters under the same names.

    Layers of classes that are derived from flax's stay as they are, as what they compute is not known.

    Args:
      module: any module; it is not changed.

    Returns:
      The new one. Its layers are dense until they have patterns.

    Example:
      >>> sparse = sparsify(nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu))
      >>> type(sparse.layers[0]).__name__
      'SparseLinear'
    """

    def exchange(path, node):
        del path
        made = _EXCHANGED.get(type(node))
        return node if made is None else _as(made, node)

    return nnx.recursive_map(exchange, nnx.clone(module))


def _as(made: type, layer: Any) -> Any:
    """A layer of the other class with everything that this one has."""
    sizes = (1, 1) if made is SparseLinear else (1, 1, (1, 1))
    new = made(*sizes, use_bias=False, rngs=nnx.Rngs(0))
    for name, value in vars(layer).items():
        if not name.startswith('_pytree__'):
            setattr(new, name, nnx.data(value) if value is None and name == 'bias' else value)
    return new


def sparse_layers(module: nnx.Module) -> dict[str, Any]:
    """The exchanged layers by the path of their kernel."""
    found = {'/'.join(map(str, (*path, 'kernel'))): layer for path, layer in nnx.iter_modules(module)}
    return {path: layer for path, layer in found.items() if isinstance(layer, SparseLinear | SparseConv)}


def set_patterns(module: nnx.Module, patterns: Any) -> None:
    """Sets the patterns of a module's layers, in place.

    Args:
      module: as :func:`sparsify` makes it.
      patterns: a tree like the params with a pattern or None at each leaf, as ``sj.kernels.make_patterns`` and a Runner make it; None: all
        layers are dense.

    Raises:
      ValueError: for a pattern of a leaf that is no kernel of such a layer.
    """
    layers = sparse_layers(module)
    found = {} if patterns is None else dict(layers_lib.leaf_paths(patterns, is_leaf=is_pattern))
    shapes = (
        {path: leaf.shape for path, leaf in layers_lib.leaf_paths(nnx.to_pure_dict(nnx.state(module, nnx.Param)))} if found else {}
    )
    # a leaf with matrix_axes, such as flax's attention: no layer here multiplies with its matrix
    found = {path: pattern for path, pattern in found.items() if path in layers or shapes.get(path, pattern.shape) == pattern.shape}
    if other := [path for path in found if path not in layers]:
        raise ValueError(
            f'set_patterns: {", ".join(other)} is no kernel of a SparseLinear or SparseConv in this module: make it with sj.nnx.sparsify, or '
            "let implementations={path: 'dense'} leave such leaves without a pattern."
        )
    for path, layer in layers.items():
        layer.pattern = SparsityPattern(found.get(path))  # a new one: the old may be of an outer trace


def load(module: nnx.Module, params: Any) -> None:
    """Sets parameters and running statistics, in place, to those of a tree with the same paths, as ``sj.export.load`` gives it.

    Args:
      module: any module.
      params: arrays, each of a Param or BatchStat of the module; all Params must be there.

    Raises:
      ValueError: that lists what is missing, not wanted, or of another shape.

    Example:
      >>> module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> load(module, {'kernel': np.ones((2, 1), np.float32), 'bias': np.zeros(1, np.float32)})
      >>> float(module(np.ones(2))[0])
      2.0
    """
    found = dict(layers_lib.leaf_paths(params))
    named = {'/'.join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(module, _STORED))}
    taken = {name: pair for name, pair in named.items() if name in found or isinstance(pair[1], nnx.Param)}
    wanted = {name: tuple(variable.get_value().shape) for name, (_, variable) in taken.items()}
    errors.check_names('load: params', {name: tuple(np.shape(value)) for name, value in found.items()}, wanted)
    values = [(path, variable.replace(jnp.asarray(found[name]))) for name, (path, variable) in taken.items()]
    nnx.update(module, nnx.from_flat_state(values))


def _like_params(params: Any, masks: Any) -> Any:
    """Masks in the structure of a module's Params, by their paths; those of other variables are left out."""
    found = dict(layers_lib.leaf_paths(masks))
    paths = [path for path, _ in layers_lib.leaf_paths(params)]
    if missing := [path for path in paths if path not in found]:
        raise ValueError(
            f'masks: {", ".join(missing[:6])} {"is" if len(missing) == 1 else "are"} missing: masks must be a tree like the Params.'
        )
    return jax.tree.unflatten(jax.tree.structure(params), [found[path] for path in paths])


def apply_masks(module: nnx.Module, masks: Any) -> None:
    """Sets the weights that do not exist to zero, in place.

    Args:
      module: any module.
      masks: state of its optimizer, such as ``nnx.Optimizer(...).opt_state``, or masks as ``sj.get_masks`` and ``sj.export.load`` give them.
    """
    params = nnx.state(module, nnx.Param)
    nnx.update(module, masks_lib.apply_masks(params, _like_params(params, masks_lib.masks_in(masks))))


def freeze(module: nnx.Module, masks: Any, **options: Any) -> Any:
    """A new module for inference, whose kernels are the existing weights only.

    Args:
      module: as :func:`sparsify` makes it, trained.
      masks: as in :func:`apply_masks`.
      **options: as ``sj.kernels.freeze`` takes them.

    Returns:
      The module; it has no gradients.

    Raises:
      ValueError: as ``sj.kernels.freeze``.
    """
    new = nnx.clone(module)
    layers, params = sparse_layers(new), nnx.state(new, nnx.Param)
    if masks_lib.masks_in(masks) is masks:
        masks = _like_params(params, masks)
    frozen = kernels.freeze(params, masks, **options)
    for path, leaf in layers_lib.leaf_paths(frozen, is_leaf=is_compact):
        if path in layers and is_compact(leaf):
            layers[path].kernel.set_value(leaf)
            layers[path].pattern = SparsityPattern(None)
    return new


def runner(module: nnx.Module, masks: Any, timing: Timing, *example: Any, **options: Any) -> kernels.Runner:
    """A ``sj.kernels.Runner`` for a module: its patterns are for :func:`set_patterns`.

    Args:
      module: as :func:`sparsify` makes it. What it computes in training is traced; it is not changed.
      masks: as in :func:`apply_masks`.
      timing: of the mask updates, as ``sj.sparsify`` has it.
      *example: what the module is called with in training: arrays or their shapes.
      **options: as the Runner takes them; and ``call``: a function of (module, *example) in place of calling the module.

    Returns:
      The Runner.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_jax as sj
      >>> model = sj.nnx.sparsify(nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0))))
      >>> timing = sj.Timing(update_every=4, total_steps=12)
      >>> optimizer = nnx.Optimizer(model, sj.sparsify(optax.adam(1e-3), density=0.1, timing=timing), wrt=nnx.Param)
      >>> sj.nnx.apply_masks(model, optimizer.opt_state)
      >>> kernels = sj.nnx.runner(model, optimizer.opt_state, timing, jnp.ones((16, 64)), implementations='reference')
      >>> sj.nnx.set_patterns(model, kernels.patterns_at(0))
      >>> model(jnp.ones((16, 64))).shape
      (16, 32)
    """
    call = options.pop('call', lambda module, *example: module(*example))
    graph, state = nnx.split(module)

    def apply(state, *rest):
        *example, patterns = rest
        copy = nnx.merge(graph, state)
        set_patterns(copy, patterns)
        return call(copy, *example)

    return kernels.Runner(masks, timing, apply=apply, example=(state, *example), **options)
