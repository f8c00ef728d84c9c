"""Where arrays live on many devices: one mesh, an ordered table of rules for weights, and the same places for all that belongs to them.

A layout is a table of rules, (pattern of a leaf's path, PartitionSpec): the first that matches counts. Specs are aligned at the last
axes, so that one rule fits matrices, convolutions and layers that are stacked: of a kernel the last axis is its outputs, the one
before its inputs.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_jax.core import errors
from sparse_jax.core import masks as masks_lib

AXES = ('data', 'model')
Rule = tuple[str, P]

# Whose inputs are what the layer before has split: they add up over 'model', once a branch.
_ROWS = r'(attention/out|mlp/down)/kernel$'
_ELSE: Rule = ('', P())  # biases and normalisations are small: everywhere

LAYOUTS: dict[str, tuple[Rule, ...]] = {
    'data': (_ELSE,),
    'model': ((_ROWS, P('model', None)), ('kernel$', P('model')), ('embed/table$', P('model', None)), _ELSE),
    'fsdp': (('(kernel|embed/table)$', P('data', None)), _ELSE),
    'model+fsdp': ((_ROWS, P('model', 'data')), ('kernel$', P('data', 'model')), ('embed/table$', P('model', 'data')), _ELSE),
}


def make_mesh(data: int = -1, model: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices with the axes 'data' and 'model', of which one size may be -1: whatever fills the devices.

    Args:
      data: parts of a batch.
      model: parts of a layer.
      devices: which, in order; None: all.

    Returns:
      The mesh; its axes are Auto (the compiler propagates shardings).

    Raises:
      ValueError: for sizes that do not fit the devices.

    Example:
      >>> dict(make_mesh(-1, 1, devices=jax.devices()[:1]).shape)
      {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = {'data': data, 'model': model}, len(devices)
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(
            f'mesh.data={data}, mesh.model={model}: each must be at least 1, or one of them -1 (what fills the devices).'
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    fits = count % known == 0 if -1 in sizes.values() else count == known
    if not fits:
        raise ValueError(
            f'mesh.data={data}, mesh.model={model} does not fit the {count} device{"s" if count > 1 else ""} there '
            f'{"are" if count > 1 else "is"}: their product must be {count}; -1 for one of them fills up.'
        )
    shape = tuple(count // known if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=tuple(devices))


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Rules from text: ``pattern=axes; pattern=axes``, the axes of the mesh for a leaf's last axes, separated by commas, or none.

    Raises:
      ValueError: if it cannot be read.

    Example:
      >>> [(pattern, tuple(spec)) for pattern, spec in parse_rules('fc1/kernel=none,model; fc2=')]
      [('fc1/kernel', (None, 'model')), ('fc2', ())]
    """
    rules = []
    for part in filter(None, (part.strip() for part in text.split(';'))):
        pattern, equals, axes = part.rpartition('=')
        names = [name.strip() for name in axes.split(',')] if axes.strip() else []
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f'mesh.rules: {pattern!r} is no regular expression ({error}).') from error
        if not equals or not pattern or not set(names) <= {*AXES, 'none'}:
            raise ValueError(
                f'mesh.rules: {part!r} must be pattern=axes, the axes of {", ".join(AXES)}, none; such as fc1/kernel=none,model.'
            )
        rules.append((pattern, P(*(None if name == 'none' else name for name in names))))
    return tuple(rules)


class Placed(NamedTuple):
    """Where one leaf lies: a row of the table."""

    path: str
    shape: tuple[int, ...]
    spec: P
    bytes: int
    bytes_per_device: int
    note: str  # why an axis is not divided though its rule says so; empty: it is as the rule says


def place(params: Any, mesh: Mesh, layout: str, *, rules: Sequence[Rule] = ()) -> list[Placed]:
    """Where each parameter lies, by the first rule that matches its path; an axis that does not divide is not divided.

    Args:
      params: pytree of arrays or shapes.
      mesh: with the axes 'data' and 'model'.
      layout: one of LAYOUTS: 'data' (weights on every device), 'model' (layers by outputs; attention by heads, the MLP by columns, then
        rows), 'fsdp' (weights by inputs over the data axis), 'model+fsdp'.
      rules: own ones, which come first.

    Returns:
      A row for each leaf.

    Raises:
      ValueError: for a layout that does not exist, and for an own rule that is no leaf's.

    Example:
      >>> mesh = make_mesh(devices=jax.devices()[:1])
      >>> tuple(place({'fc': {'kernel': np.ones((4, 2), np.float32)}}, mesh, 'model+fsdp')[0].spec)
      ('data', 'model')
    """
    if layout not in LAYOUTS:
        raise errors.unknown('mesh.layout', layout, LAYOUTS)
    leaves, unused, rows = masks_lib.leaf_paths(params), dict(rules), []
    for path, leaf in leaves:
        pattern, spec = next(rule for rule in (*rules, *LAYOUTS[layout]) if re.search(rule[0], path))
        unused.pop(pattern, None)
        spec, note = _fitted(tuple(leaf.shape), spec, mesh)
        size = leaf.size * np.dtype(leaf.dtype).itemsize
        parts = math.prod(mesh.shape[axis] for axis in spec if axis is not None)
        rows.append(Placed(path, tuple(leaf.shape), spec, size, size // parts, note))
    for pattern in unused:
        paths = [path for path, _ in leaves]
        raise ValueError(
            f'mesh.rules: {pattern!r} is found in no leaf, or only in those of an earlier rule.'
            f'{errors.did_you_mean(pattern, paths)} Leaves: {", ".join(paths)}.'
        )
    return rows


def _fitted(shape: tuple[int, ...], spec: P, mesh: Mesh) -> tuple[P, str]:
    """A spec aligned at the last axes of a shape, without those axes that do not divide; and what was left out."""
    if len(spec) > len(shape):
        return P(), f'it has no {len(spec)} axes'
    axes, notes = [None] * (len(shape) - len(spec)) + list(spec), []
    for i, axis in enumerate(axes):
        if axis is not None and shape[i] % mesh.shape[axis]:
            notes.append(f'{shape[i]} does not divide by {axis}={mesh.shape[axis]}')
            axes[i] = None
    return P(*axes) if any(axes) else P(), '; '.join(notes)


def shardings(tree: Any, params: Any, placed: Sequence[Placed], mesh: Mesh) -> Any:
    """Shardings for a tree in which parameters, masks, momenta or averages are: each where its weight lies, all else everywhere.

    A leaf belongs to the weight in whose path its own ends, if it has its shape: in optax's states ``.../trace/fc1/kernel`` is of
    ``fc1/kernel``.

    Args:
      tree: pytree of arrays or shapes, such as the params themselves, or ``jax.eval_shape(tx.init, params)``.
      params: likewise, of the parameters.
      placed: from :func:`place`.
      mesh: the same.

    Returns:
      The tree with a NamedSharding at each leaf.

    Example:
      >>> mesh = make_mesh(devices=jax.devices()[:1])
      >>> params = {'kernel': np.ones((4, 2), np.float32)}
      >>> made = shardings({'mu': params, 'count': np.zeros(())}, params, place(params, mesh, 'fsdp'), mesh)
      >>> tuple(made['mu']['kernel'].spec), tuple(made['count'].spec)
      (('data', None), ())
    """
    of_path = {path: (tuple(leaf.shape), row.spec) for (path, leaf), row in zip(masks_lib.leaf_paths(params), placed, strict=True)}

    def sharding(path: str, leaf) -> NamedSharding:
        parts = path.split('/')
        for start in range(len(parts)):  # the longest ending first
            shape, spec = of_path.get('/'.join(parts[start:]), (None, None))
            if spec is not None and shape == tuple(leaf.shape):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, P())

    return jax.tree.unflatten(jax.tree.structure(tree), [sharding(path, leaf) for path, leaf in masks_lib.leaf_paths(tree)])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P('data'))


def own_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which rows of a batch this process feeds to its devices, as (start, stop); processes that share a part feed the same.

    Example:
      >>> own_rows(make_mesh(devices=jax.devices()[:1]), 8)
      (0, 8)
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = [part[0].indices(batch_size) for part in parts if part is not None]
    start, stop = min(b[0] for b in bounds), max(b[1] for b in bounds)
    whole = batch_size % (stop - start) or start % (stop - start)  # not one of some equal parts
    return (0, batch_size) if whole else (start, stop)
