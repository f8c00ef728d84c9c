"""Which optimizers can train compact values: those that work element by element."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.compact import convert
from sparse_jax.compact import tree as tree_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.kernels.layout import Layout

_STEPS = 3
_SIDES = 4, 3  # inputs and outputs of a small layer, in units


def check(tx: optax.GradientTransformation, values: Any, layout: Any) -> optax.GradientTransformation:
    """Refuses an optimizer that needs whole matrices, such as muon or adafactor: it would take values for others, and say nothing.

    Its state may have numbers, and arrays of the values' names and shapes. And it is tried on a small tree of that form: in three steps its
    updates of compact values must be those of whole arrays with zeros off the masks. Norms of leaves and trees are right, as zeros add
    nothing to them; means over a leaf are not.

    Args:
      tx: an optax transformation.
      values: tree of values; shapes are enough.
      layout: its layout.

    Returns:
      The optimizer itself.

    Raises:
      ValueError: with what gave it away.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> eye = {'w': jnp.eye(8)}
      >>> values, layout = convert.compress(eye, {'w': eye['w'] != 0})
      >>> check(optax.adamw(1e-3), values, layout) is not None
      True
      >>> check(optax.contrib.muon(1e-3), values, layout)
      Traceback (most recent call last):
      ...
      ValueError: the optimizer does not work element by element: ...
    """
    compact = tree_lib.compact_leaves(layout)
    try:
        tree_lib.owners(jax.eval_shape(tx.init, values), compact)
    except ValueError as error:
        raise _refused(f'its state cannot be moved with the units: {str(error).partition(": units can")[0]}') from None
    whole, masks = _small(values, compact)
    try:
        wrong = _first_difference(optax.with_extra_args_support(tx), whole, masks, dict(compact.named))
    except Exception as error:
        raise ValueError(f'the optimizer could not be tried on a small tree of values: {type(error).__name__}: {error}') from error
    if wrong is not None:
        raise _refused(f'its updates of the values of {wrong} are not those of the whole array')
    return tx


def _refused(reason: str) -> ValueError:
    return ValueError(f'the optimizer does not work element by element: {reason}. Train it by sj.sparsify, with dense storage.')


def _small(values: Any, compact: tree_lib.Compact) -> tuple[Any, Any]:
    """Small whole arrays of a tree's names, and their masks."""
    random, layouts = np.random.default_rng(0), dict(compact.named)

    def arrays(path: str, leaf: Any) -> tuple[np.ndarray, np.ndarray]:
        layout = layouts.get(path)
        if layout is None:
            return random.standard_normal([min(side, 3) for side in np.shape(leaf)]), np.array(True)
        rows, columns = layout.granularity.sides
        lead = (2,) if tree_lib.is_stacked(layout) else ()
        shape = (*[min(side, 2) for side in layout.shape[:-2]], _SIDES[0] * rows, _SIDES[1] * columns)
        units = random.permutation(np.arange(2 * np.prod(layout.granularity.unit_shape(shape))) % 3 == 0)
        units = units.reshape(2, *layout.granularity.unit_shape(shape))
        mask = np.stack([np.asarray(layout.granularity.expand(jnp.asarray(row), shape)) for row in units])
        mask = mask if lead else mask[0]
        return random.standard_normal(mask.shape) * mask, mask

    named = layers_lib.leaf_paths(values)
    made = [arrays(path, leaf) for path, leaf in named]
    treedef = jax.tree.structure(values)
    whole = [jnp.asarray(x, jnp.result_type(leaf)) for (x, _), (_, leaf) in zip(made, named, strict=True)]
    return jax.tree.unflatten(treedef, whole), jax.tree.unflatten(treedef, [jnp.asarray(mask) for _, mask in made])


def _first_difference(tx: optax.GradientTransformationExtraArgs, whole: Any, masks: Any, layouts: dict[str, Layout]) -> str | None:
    """The path of a compact leaf whose updates differ in one of a few steps; None: there is none."""
    random = np.random.default_rng(1)
    first = next(iter(layouts.values()))
    stacked = lambda path, leaf: path in layouts and tree_lib.is_stacked(layouts[path])
    compress = lambda tree: convert.compress(tree, masks, granularity=first.granularity, stacked=stacked, capacity_factor=1.5)
    values, layout = compress(whole)
    state, compact_state = tx.init(whole), tx.init(values)
    for _ in range(_STEPS):
        grads = jax.tree.map(lambda x, m: jnp.asarray(random.standard_normal(x.shape), x.dtype) * m, whole, masks)
        updates, state = tx.update(grads, state, whole, value=jnp.float32(1))
        compact_updates, compact_state = tx.update(compress(grads)[0], compact_state, values, value=jnp.float32(1))
        expanded = convert.expand(compact_updates, layout)
        for (path, a), b, mask in zip(
            layers_lib.leaf_paths(expanded), jax.tree.leaves(updates), jax.tree.leaves(masks), strict=True
        ):
            a, b = (np.asarray(jnp.where(mask, x, 0), np.float32) for x in (a, b))
            if path in layouts and not np.allclose(a, b, rtol=1e-3, atol=1e-4 * max(1e-30, float(np.abs(b).max()))):
                return path
        whole = jax.tree.map(lambda x, u, m: x + jnp.where(m, u, 0).astype(x.dtype), whole, updates, masks)
        values = optax.apply_updates(values, compact_updates)
    return None
