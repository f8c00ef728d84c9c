"""One-shot pruning: masks of exact budgets for weights that are there already, by a criterion or by scores of one's own."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.core import arguments, choice, criteria, distributions, group_update, numerics, selection
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.core.criteria import Criterion
from sparse_jax.core.granularity import Granularity, NOfM, Unstructured
from sparse_jax.core.layers import Layer, PathPredicate
from sparse_jax.core.masks import Masks
from sparse_jax.core.matrix_axes import MatrixAxes
from sparse_jax.core.rule import Rule
from sparse_jax.core.schedules import Timing

Scores = Any  # a tree like params, or a function of params that makes one


@numerics.lenient
def prune(
    params: Any,
    density: float | Mapping[str, float],
    *,
    criterion: str | Criterion = criteria.magnitude,
    scores: Scores = None,
    rounds: int = 1,
    distribution: str | Mapping[str, float] | distributions.Distribution = 'uniform',
    granularity: str | Granularity = Unstructured(),
    prune_scope: str = 'layer',
    sparsifiable: PathPredicate | None = None,
    dense: Sequence[str] = (),
    stacked: PathPredicate | None = None,
    matrix_axes: str | MatrixAxes | None = None,
    seed: int | jax.Array = 0,
) -> tuple[Any, Masks]:
    r"""Prunes weights now: those with the smallest scores go, and exactly as many stay as the density says.

    :math:`\mathrm{round}(d\,n)` of the n units of all sparse leaves stay, at least one in each layer; ties stay by the lowest index. To train
    on under these masks give them to the state: ``sj.set_masks(tx.init(params), masks)``.

    Args:
      params: pytree of arrays.
      density: share of the sparse leaves' weights that stay, in (0, 1]; or path patterns to densities, of which each layer takes the first
        that matches, without a common budget.
      criterion: scores of the weights: ``'magnitude'``, ``'random'``, or a function of a :class:`sparse_jax.criteria.LeafInfo`, of which only
        weight, mask, key and granularity are there.
      scores: in place of a criterion: a tree of scores like params, such as :func:`sparse_jax.saliency.snip` makes; the smallest go, negative
        ones first. Or a function that makes one of params, which is called in each round.
      rounds: in how many rounds of equal ratio the density falls from 1; scores that are a function are then of what is left.
      distribution: how many units each layer keeps: ``'uniform'``, ``'erdos_renyi'``, ``'erk'``, path patterns to densities, or a function.
      granularity: what one unit of selection is.
      prune_scope: ``'layer'``, or ``'global'``: one threshold over all layers decides, whatever the distribution.
      sparsifiable: which leaves are pruned; None: the default choice of ``sj.sparsify``.
      dense: path patterns of leaves that stay dense.
      stacked: which leaves hold a layer in each row; None: none.
      matrix_axes: which axes of a leaf are inputs and outputs, as in ``sj.sparsify``; None: the last two.
      seed: of a random criterion: an integer, or a typed random key.

    Returns:
      The params with exact zeros, and masks: a tree like params, bool arrays at sparse leaves and scalar True at dense ones.

    Raises:
      ValueError: for arguments out of range or that do not go together, scores of another tree or shape, or a budget below one weight a layer.

    Example:
      >>> import jax.numpy as jnp, sparse_jax as sj
      >>> params = {'w': jnp.array([[1.0, -4.0], [3.0, 2.0]]), 'bias': jnp.ones(2)}
      >>> pruned, masks = prune(params, 0.5)
      >>> pruned['w'].tolist(), bool(masks['bias'])
      ([[0.0, -4.0], [3.0, 0.0]], True)

    Reference: Han et al., `Learning both weights and connections for efficient neural networks <https://arxiv.org/abs/1506.02626>`_, 2015.
    """
    total = _check(density, scores, criterion, rounds, prune_scope, distribution, granularity)
    parts: dict[str, Any] = dict(
        prune=criterion, distribution=distribution, granularity=granularity, prune_scope=prune_scope,
        sparsifiable=sparsifiable, dense=dense, stacked=stacked, matrix_axes=matrix_axes, seed=seed,
    )  # fmt: skip
    rule = Rule(density=total, timing=Timing(1, 1), grow=None, redistribute=None, **parts)
    layers = rule.sparse_layers(params)
    masks = jax.tree.map(lambda _: jnp.array(True), params)
    for layer in layers:
        masks = _with_leaf(masks, layer, jnp.ones(jax.tree.leaves(params)[layer.leaf].shape, bool))
    for i in range(rounds):
        part = (i + 1) / rounds
        counts = _counts(rule, layers, {p: d**part for p, d in density.items()} if isinstance(density, Mapping) else total**part)
        masks = _pruned(rule, layers, params, masks, scores, counts)
        params = masks_lib.apply_masks(params, masks)
    return params, masks


def _check(density, scores, criterion, rounds, prune_scope, distribution, granularity) -> float:
    """The common density, 1 where each layer has its own."""
    if isinstance(density, Mapping):
        for pattern, value in density.items():
            arguments.check_numbers(value, 0.5, 0)
            if callable(value):
                raise ValueError(f'density={{{pattern!r}: {value!r}}}: must be a number in (0, 1].')
        if isinstance(granularity_lib.get(granularity), NOfM):
            raise ValueError('density: with n of m it is n/m in every layer: give that number.')
        if prune_scope != 'layer' or distribution != 'uniform':
            raise ValueError('density gives each layer its own: it goes with neither distribution= nor prune_scope=.')
    else:
        arguments.check_numbers(density, 0.5, 0)
        if callable(density):
            raise ValueError(f'density={density!r}: must be a number in (0, 1], as weights are pruned now.')
    if scores is not None and criterion is not criteria.magnitude:
        raise ValueError('scores= stands in place of criterion=: give one or the other.')
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f'rounds={rounds!r}: must be an integer, at least 1.')
    return 1.0 if isinstance(density, Mapping) else float(density)


def _with_leaf(tree: Any, layer: Layer, leaf: jax.Array) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    leaves[layer.leaf] = leaf
    return jax.tree.unflatten(treedef, leaves)


def _counts(rule: Rule, layers: list[Layer], density: Any) -> list[int]:
    """Units that each layer keeps; with one threshold for all, their sum counts."""
    if not isinstance(density, Mapping):
        return rule.counts(layers, density)
    names, sizes = layers_lib.names_of(layers), layers_lib.unit_counts(rule.granularity, layers)
    which, given = distributions.matching(list(density), names, 'density'), list(density.values())
    missing = [name for name, i in zip(names, which, strict=True) if i is None]
    if missing:
        raise ValueError(f"density says nothing of {', '.join(missing)}: give a last pattern '*' for all others.")
    return [max(1, round(given[i] * size)) for i, size in zip(which, sizes, strict=True) if i is not None]


def _pruned(rule: Rule, layers: list[Layer], params: Any, masks: Masks, scores: Scores, counts: list[int]) -> Masks:
    """Masks of so many units in each layer, within the present ones."""
    leaves = _leaf_scores(rule, layers, params, masks, scores)
    present = [jax.tree.leaves(masks)[layer.leaf] for layer in layers]
    chosen = _chosen(rule.granularity, rule.is_global, tuple(layers), leaves, present, jnp.asarray(counts, jnp.int32))
    for layer, mask in zip(layers, chosen, strict=True):
        masks = _with_leaf(masks, layer, mask)
    return masks


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@numerics.lenient
def _chosen(
    granularity: Granularity,
    is_global: bool,
    layers: tuple[Layer, ...],
    scores: list[jax.Array],
    present: list[jax.Array],
    kept: jax.Array,
) -> list[jax.Array]:
    """The masks of the units that stay: so many of each layer, or by one threshold as many as they are together."""
    active = [_units(granularity, layer, granularity_lib.active, mask) for layer, mask in zip(layers, present, strict=True)]
    keys = [_signed_keys(score, where) for score, where in zip(scores, active, strict=True)]
    if is_global:
        goes = [jnp.where(where, ~key, jnp.uint32(0)) for key, where in zip(keys, active, strict=True)]
        nonzeros = jnp.concatenate([jnp.sum(x.reshape(len(x), -1), axis=1, dtype=jnp.int32) for x in active])
        amount = numerics.subtract(numerics.total(nonzeros), numerics.total(kept))
        kept = nonzeros - selection.joint_counts(goes, amount, jnp.maximum(nonzeros - 1, 0))
    masks = []
    for layer, rows in zip(layers, choice.choose(granularity, keys, kept), strict=True):
        mask = jax.vmap(lambda row, layer=layer: granularity.expand(row, layer.shape))(rows)
        masks.append(layer.from_rows(mask))
    return masks


def _units(granularity: Granularity, layer: Layer, function: Callable, leaf: jax.Array) -> jax.Array:
    return jax.vmap(lambda row: function(granularity, row))(layer.rows(leaf))


def _leaf_scores(rule: Rule, layers: list[Layer], params: Any, masks: Masks, scores: Scores) -> list[jax.Array]:
    """A signed score for each unit of each layer, float32[rows, ...]."""
    weights, present = jax.tree.leaves(params), jax.tree.leaves(masks)
    if scores is not None:
        scores = scores(params) if callable(scores) else scores
        if jax.tree.structure(scores) != jax.tree.structure(params):
            raise ValueError(f'scores has the tree {jax.tree.structure(scores)}, params have {jax.tree.structure(params)}.')
        leaves = jax.tree.leaves(scores)
        for layer in layers:
            if jnp.shape(leaves[layer.leaf]) != jnp.shape(weights[layer.leaf]):
                raise ValueError(
                    f'the scores of {layer.name} have shape {jnp.shape(leaves[layer.leaf])}, the weight {jnp.shape(weights[layer.leaf])}.'
                )
        return [_units(rule.granularity, layer, _unit_score, jnp.asarray(leaves[layer.leaf])) for layer in layers]
    keys = jax.random.split(rule.first_key(), layers[-1].stop)

    def of_criterion(layer: Layer) -> jax.Array:
        def row(weight, mask, key):
            info = criteria.LeafInfo(weight, mask, None, None, key, granularity=rule.granularity)  # pyright: ignore[reportArgumentType]
            return jnp.abs(group_update.unit_scores(rule.granularity, jnp.asarray(rule.prune(info))).astype(jnp.float32))

        weight, mask = (layer.rows(x[layer.leaf]) for x in (weights, present))
        return jax.vmap(row)(weight, mask, keys[layer.start : layer.stop])

    return [of_criterion(layer) for layer in layers]


def _unit_score(granularity: Granularity, scores: jax.Array) -> jax.Array:
    """The mean of a unit's scores, with their signs."""
    scores = scores.astype(jnp.float32)
    if granularity.of_single_weights:
        return scores
    positive, negative = (group_update.unit_scores(granularity, jnp.where(keep, scores, 0)) for keep in (scores > 0, scores < 0))
    return positive - negative


def _signed_keys(scores: jax.Array, where: jax.Array) -> jax.Array:
    """Selection keys that are larger for larger scores, negative ones included; 0 where an entry may not be selected.

    The bits of a float order as it does, of a negative one the other way round. Scores that are not finite count as 0.
    """
    bits = lax.bitcast_convert_type(jnp.where(jnp.isfinite(scores), scores, 0) + 0.0, jnp.uint32)
    top = jnp.uint32(1 << 31)
    keys = jnp.where(bits & top, ~bits, bits | top)
    return jnp.where(where, keys, jnp.uint32(0))
