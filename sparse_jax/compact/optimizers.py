"""Which optimizers can train compact values: those that work element by element."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.compact import tree as tree_lib
from sparse_jax.core import layers as layers_lib

_UNITS = 6  # of a leaf in the trial


def check(tx: optax.GradientTransformation, values: Any, layout: Any = None) -> optax.GradientTransformation:
    """Refuses an optimizer that needs whole matrices, such as muon or adafactor: it would take units for matrices, and say nothing.

    Its state may have numbers, and arrays of the values' shapes. And it is tried: in a few steps on a small tree of that form, whose units
    and their weights are then put in another order, updates must come out in that order too. Norms of whole leaves or trees are right, as
    the weights that do not exist would add zeros to them.

    Args:
      tx: an optax transformation.
      values: tree of values; shapes are enough.
      layout: its layout: which of its leaves are compact. None: all of them are tried.

    Returns:
      The optimizer itself.

    Raises:
      ValueError: with what gave it away.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> values = {'w': jnp.zeros((6, 4, 4))}
      >>> check(optax.adamw(1e-3), values) is not None
      True
      >>> check(optax.contrib.muon(1e-3, muon_weight_dimension_numbers=lambda p: optax.contrib.MuonDimensionNumbers()), values)
      Traceback (most recent call last):
      ...
      ValueError: the optimizer does not work element by element: ...
    """
    named = layers_lib.leaf_paths(values)
    compact = {path for path, _ in named} if layout is None else set(tree_lib.compact_leaves(layout).paths)
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in named}
    for path, leaf in layers_lib.leaf_paths(jax.eval_shape(tx.init, values)):
        parts = path.split('/')
        owner = next((p for p in ('/'.join(parts[i:]) for i in range(len(parts))) if p in compact), None)
        if owner is not None and math.prod(np.shape(leaf)) > 1 and np.shape(leaf) != shapes[owner]:
            raise ValueError(
                f'the optimizer does not work element by element: its state has {path} of shape {np.shape(leaf)} for {owner}, whose values '
                f'have {shapes[owner]}. It needs whole matrices: train it by sj.sparsify.'
            )
    stacked = set() if layout is None else {p for p, x in tree_lib.compact_leaves(layout).named if tree_lib.is_stacked(x)}
    _try(optax.with_extra_args_support(tx), values, compact, stacked)
    return tx


def _try(tx: optax.GradientTransformationExtraArgs, values: Any, compact: set[str], stacked: set[str]) -> None:
    """Two steps on a small tree, and on the same in another order."""
    random, treedef = np.random.default_rng(0), jax.tree.structure(values)

    def small(path: str, leaf: Any) -> tuple[int, ...]:
        axis = 1 if path in stacked else 0
        if path not in compact:
            return tuple(min(side, 3) for side in np.shape(leaf))
        return tuple(min(side, _UNITS) if i <= axis else side for i, side in enumerate(np.shape(leaf)))

    named = layers_lib.leaf_paths(values)
    shapes = {path: small(path, leaf) for path, leaf in named}
    orders = {path: random.permutation(math.prod(shape)) for path, shape in shapes.items() if path in compact}
    dtypes = {path: jnp.result_type(leaf) for path, leaf in named}
    draw = lambda: {path: random.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    params, *gradients = (draw() for _ in range(3))

    def run(ordered: bool) -> list[np.ndarray]:
        put = lambda path, x: x.reshape(-1)[orders[path]].reshape(x.shape) if ordered and path in orders else x
        tree = lambda arrays: jax.tree.unflatten(treedef, [jnp.asarray(put(path, arrays[path]), dtypes[path]) for path, _ in named])
        weights, updates = tree(params), None
        state = tx.init(weights)
        for arrays in gradients:
            updates, state = tx.update(tree(arrays), state, weights, value=jnp.float32(1))
            weights = optax.apply_updates(weights, updates)
        rows = zip(named, jax.tree.leaves(updates), strict=True)
        return [np.asarray(x, np.float32) for _, x in rows]

    plain = [
        x.reshape(-1)[orders[path]].reshape(x.shape) if path in orders else x
        for (path, _), x in zip(named, run(False), strict=True)
    ]
    for (path, _), one, other in zip(named, plain, run(True), strict=True):
        if path in orders and not np.allclose(one, other, rtol=1e-3, atol=1e-5 * max(1e-30, float(np.abs(one).max()))):
            raise ValueError(
                f'the optimizer does not work element by element: the updates of {path} depend on where in their units weights stand. '
                'It needs whole matrices: train it by sj.sparsify.'
            )
