"""The state of a sparse optimizer, and the masks in it: find, replace, apply and check them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import matrix_axes as matrix_axes_lib
from sparse_jax.core.granularity import Granularity
from sparse_jax.core.layers import Layer, PathPredicate, layer_table, leaf_paths, names_of
from sparse_jax.core.matrix_axes import MatrixAxes

Masks = Any  # a tree like the params: bool arrays of the leaf's shape where it is sparse, a scalar True where it is dense


class UpdateStats(NamedTuple):
    """What the last mask update did, one entry a layer in the order of :func:`layer_names`; zeros before the first."""

    share: jax.Array  # float32, the layer's part of all growth that the redistribution asked for; sums to 1, or all 0
    pruned: jax.Array  # int32, units
    grown: jax.Array  # int32, units, including the pruned weights that were regrown at once
    flipped: jax.Array  # int32, weights whose mask changed


class SparsifyState(NamedTuple):
    """State of :func:`sparse_jax.sparsify`: arrays only.

    An optimizer inside may have a ``count`` of its own: ``optax.tree.get`` finds this one by the type that it is in. A norm over all
    leaves squares the random key's integers too: take it of ``inner_state``.

    Example:
      >>> import sparse_jax as sj
      >>> tx = sj.sparsify(optax.adam(1e-3), density=0.5, update_every=10, total_steps=100)
      >>> of_sparsify = lambda path, _: getattr(path[-1], 'tuple_name', '') == 'SparsifyState'
      >>> int(optax.tree.get(tx.init({'w': jnp.ones((4, 4))}), 'count', filtering=of_sparsify))
      0
    """

    count: jax.Array  # int32, steps done
    rng_key: jax.Array  # jax.random.key_data of a random key, constant; folded with the count at an update
    masks: Masks
    grown: Masks  # True where the last update grew a new weight; scalar False at dense leaves
    layers: jax.Array  # int32[leaves, 4], constant: which leaves are sparse, stacked, and in which units; see layers.encode
    inner_state: Any
    stats: UpdateStats
    # 'gradient_average' where the inner optimizer keeps no momentum; 'ever_active', 'accumulated_gradient' where they are needed
    method_state: dict[str, Any]


def _is_state(x: Any) -> bool:
    return isinstance(x, SparsifyState)


def _is_masked_node(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def like_params(masks: Masks, params: Any) -> Masks:
    """Masks as a tree like the params: flax's nnx gives masks and params different types around the same paths.

    Raises:
      ValueError: naming what only one of them has.
    """
    hidden = jax.tree.leaves(masks, is_leaf=_is_masked_node)
    if jax.tree.structure(masks) == jax.tree.structure(params):
        return masks
    named, of_params = leaf_paths(masks, _is_masked_node), leaf_paths(params, _is_masked_node)
    if [path for path, _ in named] == [path for path, _ in of_params]:
        return jax.tree.unflatten(jax.tree.structure(params, is_leaf=_is_masked_node), hidden)
    under = lambda path, prefix: path == prefix or prefix == '' or path.startswith(prefix + '/')
    cover = {path for path, mask in named if _is_masked_node(mask)}
    missing = [path for path, _ in of_params if path not in dict(named) and not any(under(path, prefix) for prefix in cover)]
    extra = [path for path, mask in named if not _is_masked_node(mask) and path not in dict(of_params)]
    if missing or extra:
        parts = [f'no {what} for {", ".join(paths)}' for what, paths in (('mask', missing), ('params', extra)) if paths]
        raise ValueError(f'masks are another tree: {"; ".join(parts)}.')
    return masks


def whole(masks: Masks, params: Any) -> Masks:
    """Masks as a tree like the params, with a scalar True for each leaf that ``optax.partition`` or ``optax.masked`` hides."""
    hidden = lambda mask, param: jax.tree.map(lambda _: jnp.array(True), param) if _is_masked_node(mask) else mask
    return jax.tree.map(hidden, like_params(masks, params), params, is_leaf=_is_masked_node)


def find_state(opt_state: Any) -> SparsifyState:
    """The one SparsifyState in any chain's state; ValueError if there is none, or several."""
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(x)]
    if len(states) != 1:
        raise ValueError(
            f'opt_state holds {len(states)} SparsifyStates, expected exactly one: give the state of an optimizer that contains one '
            'sparsify(...), or the part of the state that does.'
        )
    return states[0]


def masks_in(tree: Any) -> Masks:
    """The masks of any chain's state, or the given tree itself where it is one of masks; ValueError for anything else."""
    if any(map(_is_state, jax.tree.leaves(tree, is_leaf=_is_state))):
        return find_state(tree).masks
    for path, leaf in leaf_paths(tree):
        if getattr(leaf, 'dtype', None) != jnp.bool_:
            raise ValueError(
                f'expected the state of an optimizer with sparsify(...), or its masks, but {path or "the argument"} is '
                f'{getattr(leaf, "dtype", type(leaf).__name__)}: give opt_state, or sj.get_masks(opt_state).'
            )
    return tree


def layers_in(opt_state: Any) -> list[tuple[Layer, Granularity]]:
    """The layers of any chain's state with their granularity; ValueError where the state is traced or has shapes only."""
    state = find_state(opt_state)
    if isinstance(state.layers, (Tracer, jax.ShapeDtypeStruct)):
        raise ValueError('opt_state is traced, or has shapes only: which of its leaves are stacked is known of concrete states.')
    return layers_lib.decode(state.masks, jax.device_get(state.layers))


def layer_names(opt_state: Any, stacked: PathPredicate | None = None) -> list[str]:
    """Names of the layers, in the order of :class:`UpdateStats`.

    Args:
      opt_state: state of an optax optimizer that contains one :func:`sparse_jax.sparsify`; or a tree of masks.
      stacked: with masks only: as given to ``sparsify``. A state knows it.

    Returns:
      Paths joined by ``/``; the layers of a stacked leaf end in ``[0]``, ``[1]``, ...

    Example:
      >>> layer_names({'a': {'kernel': jnp.ones((2, 2), bool), 'bias': jnp.array(True)}})
      ['a/kernel']
    """
    return names_of(layers_of(opt_state, stacked))


def layers_of(tree: Any, stacked: PathPredicate | None = None, matrix_axes: str | MatrixAxes | None = None) -> list[Layer]:
    """The layers of a state, or of masks, where ``stacked`` says which leaves hold several, and ``matrix_axes`` how they lie."""
    masks = masks_in(tree)
    if masks is tree:
        return layer_table(masks, lambda _, mask: mask.ndim > 0, stacked, matrix_axes_lib.get(matrix_axes))
    if stacked is not None:
        raise ValueError('stacked: the state knows which leaves are stacked; give it with masks only.')
    if matrix_axes is not None:
        raise ValueError('matrix_axes: the state knows which axes are inputs and outputs; give it with masks only.')
    return [layer for layer, _ in layers_in(tree)]


def get_masks(opt_state: Any) -> Masks:
    """The masks inside any chain's state.

    Args:
      opt_state: state of an optax optimizer that contains one :func:`sparse_jax.sparsify`.

    Returns:
      A tree like the params: bool arrays where a leaf is sparse, scalar True where it is dense (``optax.MaskedNode`` where
      ``optax.partition`` or ``optax.masked`` hides a leaf).

    Raises:
      ValueError: if there is no SparsifyState in it, or several.

    Example:
      >>> import sparse_jax as sj
      >>> tx = sj.sparse_momentum(0.1, density=0.5, update_every=10, total_steps=100)
      >>> int(get_masks(tx.init({'w': jnp.ones((4, 4))}))['w'].sum())
      8
    """
    return find_state(opt_state).masks


def set_masks(opt_state: Any, masks: Masks) -> Any:
    """The same state with other masks; the number of nonzeros is from then on conserved at theirs.

    Args:
      opt_state: state of an optax optimizer that contains one :func:`sparse_jax.sparsify`.
      masks: a tree like the present masks, with their shapes, bool. In blocks a block with any weight counts as active, and the next
        update fills or empties it.

    Returns:
      A new state. The params are not touched: follow with :func:`apply_masks`.

    Raises:
      ValueError: if the tree, a shape or a dtype differs from the present masks', or the method chooses masks by values that it stores.

    Example:
      >>> import sparse_jax as sj
      >>> tx = sj.sparse_momentum(0.1, density=0.5, update_every=10, total_steps=100)
      >>> state = set_masks(tx.init({'w': jnp.ones((2, 2))}), {'w': jnp.eye(2, dtype=bool)})
      >>> get_masks(state)['w'].tolist()
      [[True, False], [False, True]]
    """
    state = find_state(opt_state)
    if 'stored' in state.method_state:
        raise ValueError(
            'set_masks: this method keeps the values of all weights and takes the largest as its masks (backward_density): give init the params '
            'whose largest they should be.'
        )
    old = state.masks
    masks = like_params(masks, old)
    if jax.tree.structure(masks) != jax.tree.structure(old):
        raise ValueError(f"masks has the tree {jax.tree.structure(masks)}, but the state's masks have {jax.tree.structure(old)}.")
    for (name, new), present in zip(leaf_paths(masks), jax.tree.leaves(old), strict=True):
        if jnp.shape(new) != present.shape or jnp.result_type(new) != jnp.bool_:
            raise ValueError(
                f'masks: {name} is {jnp.result_type(new)}{list(jnp.shape(new))}, but must be bool{list(present.shape)}.'
            )
    masks = jax.tree.map(jnp.asarray, masks)
    _check_structure(state, masks)

    def replace(state):
        if not _is_state(state):
            return state
        kept = dict(state.method_state)
        if 'budget' in kept:
            kept['budget'] = budgets(masks, kept['budget'])
        if 'ever_active' in kept:
            kept['ever_active'] = jax.tree.map(jnp.logical_or, kept['ever_active'], masks)
        return state._replace(masks=masks, method_state=kept)

    return jax.tree.map(replace, opt_state, is_leaf=_is_state)


def _check_structure(state: SparsifyState, masks: Masks) -> None:
    """Refuses masks without the structure that the state's units have; what is traced is not looked at."""
    leaves = jax.tree.leaves(masks)
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in (*leaves, state.layers)):
        return
    for layer, units in layers_in(state) if np.ndim(state.layers) == 2 else ():
        if isinstance(units, granularity_lib.NOfM | granularity_lib.FanIn):
            for row in layer.rows(np.asarray(leaves[layer.leaf])):
                if wrong := granularity_lib.departure(units, row):
                    raise ValueError(
                        f'masks: {layer.name} does not have {units}: {wrong}. sj.prune(params, density, granularity=) makes such masks.'
                    )


def budgets(masks: Masks, like: Any) -> Any:
    """Weights of each leaf, or of each layer of a stacked one: a tree of integers, zeros at dense leaves; shapes are those of a tree like it."""

    def count(mask, shape):
        axes = tuple(range(jnp.ndim(shape), mask.ndim))
        return jnp.sum(mask, axis=axes, dtype=jnp.int32) if mask.ndim else jnp.zeros((), jnp.int32)

    return jax.tree.map(count, masks, like)


def apply_masks(params: Any, masks: Masks) -> Any:
    """Params with exact zeros off the masks.

    Args:
      params: tree of parameters (or of gradients).
      masks: tree of masks, from :func:`get_masks`.

    Returns:
      A tree like the params; dense leaves are returned as they are.

    Raises:
      ValueError: if the trees differ, or the masks are none: they are the second argument.

    Example:
      >>> apply_masks({'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([True, False])})['w'].tolist()
      [1.0, 0.0]
    """

    def apply(mask, param):
        if not _is_masked_node(mask) and getattr(mask, 'dtype', None) != jnp.bool_:
            raise ValueError(
                f'masks must be bool arrays, got {getattr(mask, "dtype", type(mask).__name__)}: call apply_masks(params, masks), '
                'with sj.get_masks(opt_state).'
            )
        dense = _is_masked_node(mask) or mask.ndim == 0
        if not dense and mask.shape != jnp.shape(param):
            raise ValueError(
                f'a mask has the shape {mask.shape}, but its param {jnp.shape(param)}. Those of an ensemble: jax.vmap(sj.apply_masks).'
            )
        return param if dense else jnp.where(mask, param, jnp.zeros((), param.dtype))

    return jax.tree.map(apply, like_params(masks, params), params, is_leaf=_is_masked_node)


def check_sparse(params: Any, opt_state: Any, *, density: float | None = None) -> None:
    """Raises where a weight off the mask is not exactly zero; for tests and debugging, on concrete arrays.

    The usual cause is a transformation that stands after ``sparsify`` in a chain (clipping, weight decay, an average of weights):
    masks need the last word. Or the params were never masked: ``params = apply_masks(params, get_masks(opt_state))`` after init.

    Args:
      params: tree of parameters.
      opt_state: state of an optax optimizer that contains one :func:`sparse_jax.sparsify`.
      density: what the state's masks should keep of the sparse leaves, as given to ``sparsify``; None: whatever they do. The masks
        of a state decide, not the density of the transformation that continues with it.

    Raises:
      ValueError: naming each leaf with nonzero weights off its mask, and their number; or if the masks are of another density.

    Example:
      >>> import sparse_jax as sj
      >>> tx = sj.sparse_momentum(0.1, density=0.5, update_every=10, total_steps=100)
      >>> params = {'w': jnp.ones((2, 2))}
      >>> check_sparse(params, tx.init(params))
      Traceback (most recent call last):
      ...
      ValueError: 2 weights off the mask are not zero: w (2 of 2). ...
    """
    masks = like_params(get_masks(opt_state), params)
    hidden = jax.tree.map(lambda mask, param: mask if _is_masked_node(mask) else param, masks, params, is_leaf=_is_masked_node)
    wrong, total = [], 0
    for (name, mask), param in zip(leaf_paths(masks), jax.tree.leaves(hidden), strict=True):
        if mask.ndim and (number := int((~mask & (param != 0)).sum())):
            wrong.append(f'{name} ({number} of {int((~mask).sum())})')
            total += number
    if wrong:
        raise ValueError(
            f'{total} weights off the mask are not zero: {", ".join(wrong)}. Nothing that changes updates may stand after sparsify '
            'in a chain, and params start with apply_masks(params, get_masks(opt_state)).'
        )
    if density is not None:
        _check_density(opt_state, density)


def _check_density(opt_state: Any, density: float) -> None:
    leaves, active, total, slack = jax.tree.leaves(get_masks(opt_state)), 0, 0, 0
    for layer, granularity in layers_in(opt_state):
        units = jax.vmap(functools.partial(granularity_lib.active, granularity))(layer.rows(leaves[layer.leaf]))
        active += int(units.sum())
        total += units.size
        slack += (granularity.selected_per_unit(layer.shape) - 1) * len(units)  # a layer has whole inputs for all outputs
    if abs(active - round(density * total)) > slack:
        raise ValueError(
            f'density={density} keeps {round(density * total)} of {total} units, but the masks of this state have {active}: it comes '
            'from another density, and its masks decide.'
        )
