"""Networks in PyTorch's layouts and names: [out, in] and [out, in, height, width] instead of [in, out] and [height, width, in, out].

PyTorch itself is not needed: a state is a dictionary of arrays, from ``module.state_dict()`` or to ``load_state_dict``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sparse_jax.core import errors
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.layers import PathPredicate
from sparse_jax.export import leaves

Names = Mapping[str, str] | Callable[[str], str] | None  # of the path of a leaf: its name in PyTorch

_LAST = {
    'kernel': 'weight',
    'scale': 'weight',
    'embedding': 'weight',
    'table': 'weight',
    'mean': 'running_mean',
    'var': 'running_var',
}
_NO_WEIGHTS = '.num_batches_tracked'


def to_torch_state(params: Any, names: Names = None) -> dict[str, np.ndarray]:
    """A state as ``torch.nn.Module.load_state_dict`` takes it, once each array went through ``torch.from_numpy``.

    Args:
      params: pytree of arrays. Leaves that are called ``kernel`` are transposed: [..., in, out] to [out, in, ...].
      names: PyTorch's name of each path, or a function that gives it; None: parts joined by dots, and ``weight`` for ``kernel``,
        ``scale``, ``embedding`` and ``table``, ``running_mean`` and ``running_var`` for ``mean`` and ``var``.

    Returns:
      Arrays by name.

    Example:
      >>> state = to_torch_state({'conv1': {'kernel': np.zeros((3, 3, 8, 16)), 'bias': np.zeros(16)}})
      >>> {name: array.shape for name, array in state.items()}
      {'conv1.bias': (16,), 'conv1.weight': (16, 8, 3, 3)}
    """
    rows = {_name(path, names): _out_first(path, np.asarray(jax.device_get(leaf))) for path, leaf in layers_lib.leaf_paths(params)}
    if len(rows) != len(jax.tree.leaves(params)):
        raise ValueError('names: two leaves get the same name.')
    return rows


def from_torch_state(
    state: Mapping[str, Any],
    like: Any,
    names: Names = None,
    *,
    sparsifiable: PathPredicate | None = None,
    dense: Sequence[str] = (),
) -> tuple[Any, Any]:
    """Params and masks from a state of PyTorch, whose zeros are weights that do not exist.

    Args:
      state: arrays, or tensors on the host, by name; counts of batches (``num_batches_tracked``) are left out.
      like: params of this network, or their shapes: the result's structure, shapes and types.
      names: as in :func:`to_torch_state`.
      sparsifiable: as in :func:`masks_from`.
      dense: as in :func:`masks_from`.

    Returns:
      Params, numpy arrays, and masks: ready for :func:`sparse_jax.set_masks`.

    Raises:
      ValueError: that lists what is missing, not wanted, or of another shape.

    Example:
      >>> state = {'fc.weight': np.array([[0.0, 3.0], [2.0, 0.0]], np.float32)}
      >>> params, masks = from_torch_state(state, {'fc': {'kernel': np.zeros((2, 2), np.float32)}})
      >>> params['fc']['kernel'].tolist(), int(masks['fc']['kernel'].sum())
      ([[0.0, 2.0], [3.0, 0.0]], 2)
    """
    rows = layers_lib.leaf_paths(like)
    wanted = {_name(path, names): _torch_shape(path, tuple(leaf.shape)) for path, leaf in rows}
    found = {name: _array(value) for name, value in state.items() if not name.endswith(_NO_WEIGHTS)}
    errors.check_names('the state', {name: value.shape for name, value in found.items()}, wanted)
    values = [_out_last(path, found[_name(path, names)]).astype(leaf.dtype) for path, leaf in rows]
    params = jax.tree.unflatten(jax.tree.structure(like), values)
    return params, leaves.masks_from(params, sparsifiable=sparsifiable, dense=dense)


def _array(value: Any) -> np.ndarray:
    if hasattr(value, 'detach'):  # a tensor; numpy knows no bfloat16
        value = value.detach()
        value = value.float() if 'bfloat16' in str(value.dtype) else value
    return np.asarray(value)


def _name(path: str, names: Names) -> str:
    if isinstance(names, Mapping):
        if path not in names:
            raise ValueError(f'names: has no name for {path!r}; it needs one for each leaf.')
        return names[path]
    if names is not None:
        return names(path)
    *folders, last = path.split('/')
    return '.'.join([*folders, _LAST.get(last, last)])


def _is_kernel(path: str) -> bool:
    return path.rpartition('/')[2] == 'kernel'


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2]) if _is_kernel(path) and len(shape) > 1 else shape


def _out_first(path: str, x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(-1, -2, *range(x.ndim - 2))) if _is_kernel(path) and x.ndim > 1 else x


def _out_last(path: str, x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(*range(2, x.ndim), 1, 0)) if _is_kernel(path) and x.ndim > 1 else x
