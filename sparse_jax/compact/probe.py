"""Probes: zeros whose gradient says how much each unit, missing ones included, would help."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.compact import tree
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.granularity import Unstructured
from sparse_jax.kernels.layout import is_layout


def probes(layout: Any, *, leaves: Callable[[str], bool] | None = None, dtype: Any = jnp.bfloat16) -> Any:
    r"""Zeros for ``sparse_dot(..., probe=)``, whose gradients are the scores that :func:`plan` takes.

    Of single weights the gradient is :math:`\partial L / \partial w` at all positions, signed; of blocks it is its mean magnitude in each
    block, float32: a measurement, which is not summed over micro-batches but averaged. It is taken in the steps only whose scores are
    needed, and costs 2 bytes a weight, or 4 a block. A block's magnitudes do not add up over products: a probe of blocks is for one product with
    the whole batch. A second one in the same function is refused, and so are ``shard_map`` and a ``vmap`` over examples; one that is hidden in
    the body of a loop, or in another function that is jitted or checkpointed, is not seen.

    Args:
      layout: tree of layouts.
      leaves: which leaves are scored, by their paths joined by ``/``; None: all of them. The others stay as they are in the update.
      dtype: of the scores of single weights.

    Returns:
      A tree like layout: an array at each leaf that is scored, None elsewhere.

    Raises:
      ValueError: if layout has no compact leaf.

    Example:
      >>> import jax.numpy as jnp, sparse_jax as sj
      >>> _, layout = sj.compact.compress({'w': jnp.eye(4)}, {'w': jnp.eye(4, dtype=bool)})
      >>> probes(layout)['w'].shape, probes(layout, leaves=lambda path: False)
      ((4, 4), {'w': None})
    """
    tree.compact_leaves(layout)

    def probe(path: str, leaf: Any) -> Any:
        if not is_layout(leaf) or (leaves is not None and not leaves(path)):
            return None
        lead = leaf.pointers.shape[:-1]
        return jnp.zeros((*lead, *leaf.units), dtype if isinstance(leaf.granularity, Unstructured) else jnp.float32)

    rows = [probe(path, leaf) for path, leaf in layers_lib.leaf_paths(layout, lambda x: x is None or is_layout(x))]
    return jax.tree.unflatten(jax.tree.structure(layout, is_leaf=lambda x: x is None or is_layout(x)), rows)


def with_probes(layout: Any, probes: Any) -> Any:
    """The layout with a probe at each leaf that is scored: for networks that are given their layouts as ``patterns``.

    Args:
      layout: tree of layouts.
      probes: from :func:`probes`, with regard to which the loss is differentiated; None at leaves that are not scored.

    Returns:
      A tree like layout.

    Raises:
      ValueError: if the trees do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, sparse_jax as sj
      >>> values, layout = sj.compact.compress({'w': jnp.eye(2)}, {'w': jnp.eye(2, dtype=bool)}, capacity_factor=1)
      >>> network = lambda values, patterns, x: sj.kernels.sparse_dot(x, values['w'], patterns['w']).sum()
      >>> x, scored = jnp.ones((1, 2)), probes(layout, dtype=jnp.float32)
      >>> jax.grad(lambda p: network(values, with_probes(layout, p), x))(scored)['w'].tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    is_leaf = lambda x: x is None or is_layout(x)
    put = lambda leaf, probe: dataclasses.replace(leaf, probe=probe) if is_layout(leaf) else leaf
    return jax.tree.map(put, layout, probes, is_leaf=is_leaf)
