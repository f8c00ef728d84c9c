"""Numbers and tables of masks: density, exploration, flips, shares, dead neurons. For logging, on concrete arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.core.layers import Layer, PathPredicate
from sparse_jax.core.masks import Masks
from sparse_jax.core.matrix_axes import MatrixAxes

_SHOWN = 12  # names of dense leaves


@jax.jit
def _counts(leaves: list[jax.Array]) -> list[jax.Array]:
    # of rows: a leaf that is sharded has its counts reduced, not itself gathered; int32 to 2^31, which a leaf stays below
    return [jnp.sum(leaf, dtype=jnp.int32) for leaf in leaves]


def _sparse(opt_state: Any) -> list[tuple[str, jax.Array]]:
    return [(name, mask) for name, mask in layers_lib.leaf_paths(masks_lib.masks_in(opt_state)) if mask.ndim]


def nonzeros(opt_state: Any) -> dict[str, int]:
    """Active weights of each sparse leaf, as Python integers.

    Args:
      opt_state: state of an optimizer with one ``sparsify``; or a tree of masks.

    Returns:
      The number by path.

    Raises:
      ValueError: for anything else.

    Example:
      >>> nonzeros({'a': jnp.eye(3, dtype=bool), 'bias': jnp.array(True)})
      {'a': 3}
    """
    leaves = _sparse(opt_state)
    return {name: int(count) for (name, _), count in zip(leaves, jax.device_get(_counts([m for _, m in leaves])), strict=True)}


def density(opt_state: Any) -> float:
    """Share of the sparse leaves' weights that exist, over all of them; exact counts, however large the network.

    Args:
      opt_state: as for :func:`nonzeros`.

    Returns:
      A number in [0, 1].

    Example:
      >>> density({'a': jnp.eye(4, dtype=bool), 'bias': jnp.array(True)})
      0.25
    """
    size = sum(mask.size for _, mask in _sparse(opt_state))
    return sum(nonzeros(opt_state).values()) / max(size, 1)


def exploration_rate(opt_state: Any) -> float:
    r"""Share of the sparse leaves' weights that have ever been active: ITOP's :math:`R_s`.

    Args:
      opt_state: state of an optimizer with ``sparsify(..., track_exploration=True)``.

    Returns:
      From the density to 1.

    Raises:
      ValueError: if it was not tracked.

    Example:
      >>> import optax, sparse_jax as sj
      >>> tx = sj.methods.rigl(optax.sgd(0.1), 0.25, update_every=2, total_steps=9, track_exploration=True)
      >>> exploration_rate(tx.init({'w': jnp.ones((4, 4))}))
      0.25

    Reference:
      Liu et al., `Do We Actually Need Dense Over-Parameterization? <https://arxiv.org/abs/2102.02887>`_, 2021.
    """
    state = masks_lib.find_state(opt_state)
    if 'ever_active' not in state.method_state:
        raise ValueError('exploration_rate: what has been active was not kept: give sparsify track_exploration=True.')
    return density(state.method_state['ever_active'])


def flip_rate(opt_state: Any) -> float:
    r"""Share of the sparse leaves' weights whose mask the last update changed: :math:`\|m_t - m_{t-1}\|_1 / n`.

    Args:
      opt_state: state of an optimizer with one ``sparsify``.

    Returns:
      A number in [0, 1]; 0 before the first update.

    Raises:
      ValueError: if there is no SparsifyState in it, or several.

    Example:
      >>> import sparse_jax as sj
      >>> flip_rate(sj.sparse_momentum(0.1, 0.25, update_every=2, total_steps=9).init({'w': jnp.ones((4, 4))}))
      0.0
    """
    state = masks_lib.find_state(opt_state)
    size = sum(mask.size for _, mask in _sparse(state.masks))
    return int(jax.device_get(state.stats.flipped).sum(dtype=np.int64)) / max(size, 1)


def dead_neurons(
    opt_state: Any, stacked: PathPredicate | None = None, matrix_axes: str | MatrixAxes | None = None
) -> dict[str, tuple[int, int]]:
    """Outputs of each layer without an active weight into them, and inputs without one out of them.

    Args:
      opt_state: as for :func:`nonzeros`. The last axis of a leaf is its outputs, the one before its inputs, unless ``matrix_axes`` says otherwise.
      stacked: with masks only: as given to ``sparsify``. A state knows it.
      matrix_axes: likewise.

    Returns:
      (dead outputs, dead inputs) by layer. A layer of one axis has no inputs: 0.

    Example:
      >>> dead_neurons({'w': jnp.array([[True, False, False], [True, False, True]])})
      {'w': (1, 0)}
    """
    layers = masks_lib.layers_of(opt_state, stacked, matrix_axes)
    leaves = jax.tree.leaves(masks_lib.masks_in(opt_state))
    dead = []
    for layer in layers:
        mask = layer.rows(leaves[layer.leaf])
        axes = tuple(range(1, mask.ndim))
        outputs = jnp.sum(~mask.any(axis=axes[:-1]), axis=1)
        inputs = jnp.sum(~mask.any(axis=(*axes[:-2], axes[-1])), axis=1) if len(axes) > 1 else jnp.zeros(len(mask), int)
        dead += zip(outputs.tolist(), inputs.tolist(), strict=True)
    return dict(zip(layers_lib.names_of(layers), dead, strict=True))


def summary(opt_state: Any) -> dict[str, float]:
    """Everything about the masks in one flat dictionary to log.

    Args:
      opt_state: state of an optimizer with one ``sparsify``.

    Returns:
      ``density``, ``nonzeros``, ``flip_rate``, ``exploration_rate`` where it is tracked, and by layer ``density/...``, ``share/...``,
      ``pruned/...``, ``grown/...``, ``dead_outputs/...``, ``dead_inputs/...``. In blocks
      ``pruned`` and ``grown`` count blocks, with equal inputs for every output they count inputs, all else weights.

    Example:
      >>> import sparse_jax as sj
      >>> tx = sj.sparse_momentum(0.1, density=0.25, update_every=10, total_steps=100)
      >>> numbers = summary(tx.init({'w': jnp.ones((4, 4))}))
      >>> numbers['density'], numbers['nonzeros'], numbers['grown/w']
      (0.25, 4, 0)
    """
    state = masks_lib.find_state(opt_state)
    layers = masks_lib.layers_of(opt_state)
    names = layers_lib.names_of(layers)
    numbers: dict[str, float] = {'density': density(state.masks), 'nonzeros': sum(nonzeros(state.masks).values())}
    numbers['flip_rate'] = flip_rate(opt_state)
    if 'ever_active' in state.method_state:
        numbers['exploration_rate'] = exploration_rate(opt_state)
    counts = layer_nonzeros(state.masks, layers)
    sizes = [int(np.prod(layer.shape)) for layer in layers for _ in range(layer.depth or 1)]
    dead = dead_neurons(opt_state)
    stats = jax.device_get(state.stats)
    for i, name in enumerate(names):
        numbers[f'density/{name}'] = counts[i] / sizes[i]
        for field in ('share', 'pruned', 'grown'):
            numbers[f'{field}/{name}'] = getattr(stats, field)[i].item()
        numbers[f'dead_outputs/{name}'], numbers[f'dead_inputs/{name}'] = dead[name]
    return numbers


@jax.jit
def _row_counts(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32)


def layer_nonzeros(masks: Masks, layers: list[Layer]) -> list[int]:
    """Active weights of each layer, those of a stacked leaf apart, in the order of the layers."""
    leaves = jax.tree.leaves(masks)
    counts = []
    for layer in layers:
        mask = leaves[layer.leaf] if layer.depth is not None else leaves[layer.leaf][None]
        counts += np.asarray(_row_counts(mask)).tolist()
    return counts


def table(opt_state: Any) -> str:
    """The layers as a table to print: sizes, densities, what the last update did, dead neurons; and which leaves are dense.

    Args:
      opt_state: state of an optimizer with one ``sparsify``. Where units are blocks, pruned and grown count blocks, all else weights.

    Returns:
      The text.

    Example:
      >>> import sparse_jax as sj
      >>> tx = sj.sparse_momentum(0.1, density=0.25, update_every=10, total_steps=100, granularity='block:4x4')
      >>> print(table(tx.init({'w': jnp.ones((8, 6))})).splitlines()[1])
      w                                       48         8   16.67%          0        0             4            4 4x4, edge blocks
    """
    numbers = summary(opt_state)
    heads = (
        ('weights', 10),
        ('nonzeros', 9),
        ('density', 8),
        ('pruned', 10),
        ('grown', 8),
        ('dead outputs', 13),
        ('dead inputs', 12),
    )
    lines = [f'{"layer":32}' + ' '.join(f'{name:>{width}}' for name, width in heads)]
    total = 0
    for layer, units in masks_lib.layers_in(opt_state):
        size = int(np.prod(layer.shape))
        blocks = ''
        if not isinstance(units, granularity_lib.Unstructured | granularity_lib.Block):
            blocks = f' {units}'
        if isinstance(units, granularity_lib.Block):
            kernel = ' of the whole kernel' if units.whole_kernel and len(layer.shape) > 2 else ''
            blocks = f' {units.rows}x{units.columns}{kernel}' + (', edge blocks' if units.edges(layer.shape) else '')
        for name in layers_lib.names_of([layer]):
            of = lambda field, name=name: numbers[f'{field}/{name}']
            row = (
                size,
                round(of('density') * size),
                f'{of("density"):.2%}',
                of('pruned'),
                of('grown'),
                of('dead_outputs'),
                of('dead_inputs'),
            )
            lines.append(
                f'{shorten(name, 32):32}' + ' '.join(f'{v:>{width}}' for v, (_, width) in zip(row, heads, strict=True)) + blocks
            )
            total += size
    flips = f'flip rate {numbers["flip_rate"]:.4f}'
    if 'exploration_rate' in numbers:
        flips += f', exploration rate {numbers["exploration_rate"]:.4f}'
    lines.append(f'{"all":32}{total:>10} {numbers["nonzeros"]:>9} {numbers["density"]:>8.2%}  {flips}')
    lines.append(dense_leaves(opt_state))
    return '\n'.join(lines)


def dense_leaves(opt_state: Any) -> str:
    """The leaves that are not trained sparse, by name, as one line.

    Args:
      opt_state: as for :func:`nonzeros`.

    Returns:
      The first of their names, and how many there are.

    Example:
      >>> dense_leaves({'a': jnp.eye(4, dtype=bool), 'bias': jnp.array(True)})
      '1 dense leaf: bias'
    """
    names = [name for name, mask in layers_lib.leaf_paths(masks_lib.masks_in(opt_state)) if not mask.ndim]
    shown = ', '.join(names[:_SHOWN]) + (f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else '')
    return f'{len(names) or "no"} dense {"leaf" if len(names) == 1 else "leaves"}' + (f': {shown}' if names else '')


def shorten(name: str, width: int) -> str:
    """A layer's name in at most so many letters, cut in the middle so that names can still be told apart.

    Parts of the path are left out, those with a number in them last; the first and the last part stay where they fit.

    Args:
      name: path of a leaf, with slashes.
      width: letters to fit in, at least 3.

    Returns:
      The name, or what is left of it around an ellipsis.

    Example:
      >>> shorten('layers/transformer/attention/query/kernel', 32)
      'layers/…/attention/query/kernel'
      >>> shorten('params/encoder/layer_12/attention/query/kernel', 30)
      'params/…/layer_12/…/kernel'
      >>> shorten('a_single_very_long_name', 12)
      'a_s…ong_name'
    """
    if len(name) <= width:
        return name
    parts = name.split('/')
    shown: list[str] = list(parts)
    for i in sorted(range(1, len(parts) - 1), key=lambda i: any(map(str.isdigit, parts[i]))):
        shown[i] = '…'
        text = '/'.join(part for j, part in enumerate(shown) if part != '…' or shown[j - 1] != '…')
        if len(text) <= width:
            return text
    head = (width - 1) // 3
    return name[:head] + '…' + name[head + 1 - width :]
