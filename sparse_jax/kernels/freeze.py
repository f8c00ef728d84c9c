"""Trained weights as kernels like them best when nothing changes any more."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from sparse_jax.core import errors
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.granularity import Granularity, Unstructured
from sparse_jax.kernels import builder
from sparse_jax.kernels.layout import CompactWeight, Layout, is_compact


def freeze(
    params: Any,
    masks: Any,
    *,
    granularity: str | Granularity = builder.NOT_GIVEN,
    stacked: Callable[[str, Any], bool] | None = None,
    implementation: str | None = None,
) -> Any:
    """Trained params for inference: of sparse leaves the existing weights only.

    :func:`sparse_dot` and :func:`sparse_conv` take such a leaf in the place of weight and pattern. There are no gradients.

    Args:
      params: pytree of arrays, concrete, zero off the masks.
      masks: state of an optimizer with one ``sparsify``, or masks as ``sj.get_masks`` and ``sj.export.masks_from`` give them.
      granularity: with masks only: what a unit is, as in ``sj.sparsify``. A state knows it.
      stacked: likewise: which leaves hold a layer in each row.
      implementation: the backend that is to multiply, such as ``'reference'`` for a program that is exported to other machines; None: by
        rule.

    Returns:
      A tree like params with a :class:`CompactWeight` at each sparse matrix and 2D convolution. Other leaves stay as they are.

    Raises:
      ValueError: if the trees do not fit, a leaf is traced or has weights off its mask, or a mask does not consist of whole units.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparse_jax import kernels
      >>> params = {'kernel': jnp.array([[1.0, 0.0], [2.0, 3.0]]), 'bias': jnp.zeros(2)}
      >>> frozen = kernels.freeze(params, {'kernel': params['kernel'] != 0, 'bias': jnp.array(True)})
      >>> kernels.sparse_dot(jnp.ones((1, 2)), frozen['kernel']), frozen['kernel'].values
      (Array([[3., 3.]], dtype=float32), Array([1., 2., 3.], dtype=float32))
    """
    masks, layers = builder.layers_of('freeze', masks, granularity, None, stacked, leave_others=True)
    values, masks = layers_lib.leaf_paths(params, is_leaf=is_compact), layers_lib.leaf_paths(masks)
    if [path for path, _ in values] != [path for path, _ in masks]:
        raise ValueError('freeze: masks must be a tree like params, with a scalar True at dense leaves: see sj.get_masks.')

    def leaf(path: str, value: Any, mask: Any) -> Any:
        rows, unit = layers.get(path, (False, None))
        if unit is None:
            return value
        if isinstance(value, Tracer):
            raise ValueError(f'freeze: {path} is traced. Weights are frozen on the host, and passed to the jitted function.')
        if np.shape(value) != np.shape(mask):
            raise ValueError(f'freeze: {path} has shape {np.shape(value)}, its mask has shape {np.shape(mask)}.')
        if np.ndim(mask) - rows not in (2, 4):
            errors.say_once(f'freeze: {path} has {np.ndim(mask)} axes: it is no matrix and no 2D convolution, and stays as it is.')
            return value
        value, mask = np.asarray(value), np.asarray(mask)
        if lost := int(np.count_nonzero(value[~mask])):
            raise ValueError(
                f'freeze: {path} has {lost} weights off its mask that are not zero: apply it first, with sj.apply_masks(params, masks).'
            )
        if not rows:
            return jax.device_put(_compact(value, mask, unit, implementation, path))
        parts = [_compact(*row, unit, implementation, path) for row in zip(value, mask, strict=True)]
        most = max(len(part.values) for part in parts)
        fill = lambda x: np.pad(x, [(0, most - len(x))] + [(0, 0)] * (x.ndim - 1))
        wide = lambda *arrays: np.stack([fill(x) for x in arrays] if len(arrays[0]) != len(parts[0].layout.pointers) else arrays)
        return jax.device_put(jax.tree.map(wide, *parts))

    leaves = [leaf(path, value, mask) for (path, value), (_, mask) in zip(values, masks, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_compact), leaves)


def _compact(value: np.ndarray, mask: np.ndarray, unit: Granularity, implementation: str | None, name: str) -> CompactWeight:
    """One layer's weight, on the host."""
    pattern = builder.make_pattern(mask, granularity=unit, implementation=implementation, name=name)
    count = int(pattern.pointers[-1])
    indices = np.asarray(pattern.indices)[:count]
    *taps, inputs, outputs = granularity_lib.tap_units(unit, mask.shape)
    taps = int(np.prod(taps))
    output = np.repeat(np.arange(outputs), np.diff(pattern.pointers))
    if isinstance(unit, Unstructured):
        values = value.reshape(taps, inputs, outputs)[indices % taps, indices // taps, output]
    else:
        rows, columns = unit.sides
        padded = np.pad(
            value.reshape(taps, *value.shape[-2:]), [(0, 0), (0, -value.shape[-2] % rows), (0, -value.shape[-1] % columns)]
        )
        blocks = padded.reshape(taps, inputs, rows, outputs, columns)
        values = blocks[indices % taps, indices // taps, :, output]
    return CompactWeight(values, Layout(indices, pattern.pointers, mask.shape, unit, implementation, name))
