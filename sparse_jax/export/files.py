"""One file for a network: values and index lists of its sparse leaves, whole arrays of the others.

The arrays of a sparse leaf PATH are ``PATH.values`` and ``PATH.indices``; a header says its shape, type and units. ``.npz`` is always
there; ``.safetensors`` needs the package of that name, and is read without this library by any of its users.
"""

import contextlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core import errors
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.granularity import Block, Granularity
from sparse_jax.export import leaves

FORMAT = 1
_HEADER = 'sparse_jax'  # its key among the metadata, and its array's name in .npz
_SUFFIXES = '.npz', '.safetensors'


def save(
    path: str | os.PathLike,
    params: Any,
    masks: Any,
    info: Mapping[str, Any] | None = None,
    *,
    granularity: str | Granularity = 'unstructured',
    dense: bool = False,
) -> None:
    """Writes a network into one file, whole or not at all.

    Args:
      path: of the file; its suffix picks the format: ``.npz`` or ``.safetensors``.
      params: pytree of arrays, of any types of numbers.
      masks: tree like the params: bool arrays, and a scalar True at dense leaves.
      info: what else is to be kept: anything that JSON holds.
      granularity: what a unit of the sparse leaves is, as :func:`sparse_jax.sparsify` was told.
      dense: whether sparse leaves are written whole, with their zeros, for readers that know no sparse ones. :func:`load` then takes
        the weights that are not zero for existing.

    Raises:
      ValueError: where the trees do not fit, a weight off its mask is not zero, or the path or `info` cannot be used.

    Example:
      >>> import tempfile
      >>> folder = tempfile.TemporaryDirectory()
      >>> path = pathlib.Path(folder.name, 'network.npz')
      >>> kernel = np.array([[0.0, 2.0], [3.0, 0.0]])
      >>> save(path, {'kernel': kernel}, {'kernel': kernel != 0}, {'accuracy': 0.93})
      >>> params, masks, info = load(path)
      >>> params['kernel'].tolist(), int(masks['kernel'].sum()), info
      ([[0.0, 2.0], [3.0, 0.0]], 2, {'accuracy': 0.93})
      >>> folder.cleanup()
    """
    path, units = check_path(path), granularity_lib.of_products(granularity_lib.get(granularity))
    arrays: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    for name, value, mask in leaves.pairs(params, masks):
        described[name] = {'shape': list(value.shape), 'dtype': value.dtype.name}
        if mask.ndim:
            described[name]['granularity'] = _text(units)
        if mask.ndim and not dense:
            arrays[f'{name}.values'], arrays[f'{name}.indices'] = leaves.compress(value, mask, units, name)
        else:
            arrays[name] = value
    header = {'format': FORMAT, 'dense': dense, 'leaves': described, 'info': dict(info or {})}
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise ValueError(f'info: {error}; it takes what JSON holds: text, numbers, lists and dictionaries.') from None
    _write(path, arrays, text)


def load(path: str | os.PathLike, like: Any = None) -> tuple[Any, Any, dict[str, Any]]:
    """Reads what :func:`save` wrote.

    Args:
      path: of the file.
      like: params, or their shapes, whose structure is wanted; None: nested dictionaries.

    Returns:
      params, masks and info; arrays are numpy's.

    Raises:
      ValueError: if the file is damaged, of something else, or of another network than `like`.
    """
    path = check_path(path)
    if not path.is_file():
        raise ValueError(f'{path} is not a file.')
    try:
        arrays, text = _read(path)
        header = json.loads(text)
        if header['format'] != FORMAT:
            raise ValueError(f'its format is {header["format"]}, this version reads {FORMAT}')
        params, masks = {}, {}
        for name, described in header['leaves'].items():
            params[name], masks[name] = _leaf(arrays, name, described, header['dense'])
        info = header['info']
    except ImportError:
        raise
    except Exception as error:  # of zipfile, numpy, json and safetensors: each its own
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f'{path} cannot be read ({type(error).__name__}: {reason}): it is damaged, or not from sj.export.save.'
        ) from error
    if like is None:
        return leaves.nested(params), leaves.nested(masks), info
    wanted = {name: tuple(leaf.shape) for name, leaf in layers_lib.leaf_paths(like)}
    errors.check_names(str(path), {name: value.shape for name, value in params.items()}, wanted)
    ordered = lambda rows: jax.tree.unflatten(jax.tree.structure(like), [rows[name] for name in wanted])
    return ordered(params), ordered(masks), info


def _leaf(arrays: Mapping[str, np.ndarray], name: str, described: dict[str, Any], dense: bool) -> tuple[np.ndarray, np.ndarray]:
    shape, dtype = tuple(described['shape']), jnp.dtype(described['dtype'])
    is_sparse = 'granularity' in described
    if dense or not is_sparse:
        value = _as(arrays[name], dtype)
        if value.shape != shape:
            raise ValueError(f'{name} has shape {value.shape} instead of {shape}')
        return value, np.asarray(value != 0 if is_sparse else True)
    units = granularity_lib.get(described['granularity'])
    values, indices = _as(arrays[f'{name}.values'], dtype), arrays[f'{name}.indices']
    if indices.ndim != 1 or indices.dtype.kind != 'i' or np.any(np.diff(indices) <= 0) or (indices.size and indices[0] < 0):
        raise ValueError(f'the indices of {name} do not ascend')
    mask = leaves.expand(np.ones(values.shape, np.bool_), indices, units, shape)
    return leaves.expand(values, indices, units, shape), mask


def _as(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Types that numpy's files do not know are stored as integers of their size."""
    return array if array.dtype == dtype else array.view(dtype)


def _text(units: Granularity) -> str:
    if not isinstance(units, Block):
        return 'unstructured'
    return f'block:{units.rows}x{units.columns}' + (':kernel' if units.whole_kernel else '')


def check_path(path: str | os.PathLike, name: str = 'path') -> pathlib.Path:
    """The path; ValueError where its suffix names no format, and ImportError where its format needs a package that is not there.

    Args:
      path: of a file that is to be written or read.
      name: of the argument, for messages.

    >>> check_path('network.npz').name
    'network.npz'
    """
    path = pathlib.Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f'{name}={str(path)!r}: its suffix must be {" or ".join(_SUFFIXES)}.')
    if path.suffix == '.safetensors':
        _safetensors()
    return path


def _safetensors() -> Any:
    try:
        import safetensors.numpy

        return safetensors
    except ImportError as error:
        raise ImportError("files that end in .safetensors need the package: pip install 'sparse_jax[export]'.") from error


def _write(path: pathlib.Path, arrays: dict[str, np.ndarray], header: str) -> None:
    if path.suffix == '.safetensors':
        content = _safetensors().numpy.save({k: np.asarray(v, order='C') for k, v in arrays.items()}, {_HEADER: header})
    else:
        plain = {name: x if x.dtype.isbuiltin == 1 else x.view(f'u{x.dtype.itemsize}') for name, x in arrays.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **{_HEADER: np.frombuffer(header.encode(), np.uint8), **plain})  # pyright: ignore[reportArgumentType]
        content = buffer.getvalue()
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f'path={str(path)!r} cannot be written ({error.strerror}).') from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    if path.suffix == '.safetensors':
        with _safetensors().safe_open(path, 'np') as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()[_HEADER]  # noqa: SIM118
    if not zipfile.is_zipfile(path):
        raise ValueError('it is not an .npz file')
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    return arrays, bytes(arrays.pop(_HEADER)).decode()
