"""What kernels read beside a layout's lists, made once for all steps between two mask updates."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.compact import tree as tree_lib
from sparse_jax.core import target
from sparse_jax.kernels import backend, lists
from sparse_jax.kernels.layout import Layout, is_layout


def lists_by_output(layout: Any) -> Any:
    """The lists by output of the leaves whose kernels walk both ways, None elsewhere; None where there is no such leaf."""
    tree_lib.compact_leaves(layout)
    is_leaf = lambda x: x is None or is_layout(x)
    made = jax.tree.map(lambda x: _by_output(x) if is_layout(x) and _wants(x) else None, layout, is_leaf=is_leaf)
    return made if jax.tree.leaves(made) else None


def with_lists(layout: Any, made: Any) -> Any:
    """The layout with the lists that :func:`lists_by_output` made of it; None: none."""
    if made is None:
        return layout
    put = lambda x, lists: dataclasses.replace(x, by_output=lists) if is_layout(x) else x
    return jax.tree.map(put, layout, made, is_leaf=lambda x: x is None or is_layout(x))


def prepare(layout: Any) -> Any:
    """Adds to a layout what the platform's kernels would else make of it in each step: on GPUs its units by output. Elsewhere it stays as it is.

    To be called outside of the step, after each change: mask updates and checkpoints take and give layouts without it.

    Args:
      layout: tree of layouts.

    Returns:
      The layout, for products.

    Raises:
      ValueError: if layout has no compact leaf.

    Example:
      >>> import jax.numpy as jnp, sparse_jax as sj
      >>> values, layout = sj.compact.compress({'w': jnp.eye(4)}, {'w': jnp.eye(4, dtype=bool)})
      >>> prepare(layout)['w'].by_output is None
      True
    """
    return with_lists(layout, lists_by_output(layout))


def _wants(layout: Layout) -> bool:
    name = layout.implementation or target.platform()
    return name == 'gpu' and not backend.unsupported(name, jnp.bfloat16, layout.granularity)


@jax.jit
def _by_output(layout: Layout) -> Any:
    return tree_lib.per_row(lists.by_output, layout)(layout)
