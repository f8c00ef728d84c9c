"""Shardings of parameters, masks and optimizer state over one mesh: masks and momenta are sharded like the weight they belong to.

A layout is an ordered table of rules (pattern of a leaf's path, PartitionSpec), of which the first match applies. Specs are aligned
at a leaf's last axes, so that one rule fits matrices, convolutions and stacked layers: the last axis of a kernel is its outputs and
the one before its inputs.
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
from sparse_jax.core import layers as layers_lib

AXES = ('data', 'model')
Rule = tuple[str, P]

# These layers take inputs that the layer before has split: their outputs are summed over 'model', once per residual branch.
_ROW_PARALLEL = r'(attention/out|mlp/down)/kernel$'
_REPLICATED: Rule = ('', P())  # biases and normalisations are small

LAYOUTS: dict[str, tuple[Rule, ...]] = {
    'data': (_REPLICATED,),
    'model': ((_ROW_PARALLEL, P('model', None)), ('kernel$', P('model')), ('embed/table$', P('model', None)), _REPLICATED),
    'fsdp': (('(kernel|embed/table)$', P('data', None)), _REPLICATED),
    'model+fsdp': (
        (_ROW_PARALLEL, P('model', 'data')),
        ('kernel$', P('data', 'model')),
        ('embed/table$', P('model', 'data')),
        _REPLICATED,
    ),
}


def make_mesh(data: int = -1, model: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh with the axes 'data' and 'model'.

    Args:
      data: number of parts that a batch is divided into; -1 uses all devices that ``model`` leaves.
      model: number of parts that a layer is divided into; -1 uses all devices that ``data`` leaves.
      devices: devices of the mesh, in order; if None, all of them.

    Returns:
      The mesh, with Auto axes (the compiler propagates shardings).

    Raises:
      ValueError: if the sizes do not fit the number of devices.

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
    given = math.prod(size for size in sizes.values() if size != -1)
    fits = count % given == 0 if -1 in sizes.values() else count == given
    if not fits:
        raise ValueError(
            f'mesh.data={data}, mesh.model={model} does not fit the {count} device{"s" if count > 1 else ""} there '
            f'{"are" if count > 1 else "is"}: their product must be {count}; -1 for one of them fills up.'
        )
    shape = tuple(count // given if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=tuple(devices))


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Parses rules from text.

    Args:
      text: ``pattern=axes; pattern=axes``, where ``axes`` names for each of a leaf's last axes a mesh axis or ``none``, separated by
        commas.

    Returns:
      The rules, in order.

    Raises:
      ValueError: if the text does not have this form.

    Example:
      >>> [(pattern, tuple(spec)) for pattern, spec in parse_rules('fc1/kernel=none,model; fc2=')]
      [('fc1/kernel', (None, 'model')), ('fc2', ())]
    """
    rules = []
    for rule in filter(None, (rule.strip() for rule in text.split(';'))):
        pattern, equals, axes = rule.rpartition('=')
        names = [name.strip() for name in axes.split(',')] if axes.strip() else []
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f'mesh.rules: {pattern!r} is no regular expression ({error}).') from error
        if not equals or not pattern or not set(names) <= {*AXES, 'none'}:
            raise ValueError(
                f'mesh.rules: {rule!r} must be pattern=axes, the axes of {", ".join(AXES)}, none; such as fc1/kernel=none,model.'
            )
        rules.append((pattern, P(*(None if name == 'none' else name for name in names))))
    return tuple(rules)


class Placement(NamedTuple):
    """How one leaf is sharded."""

    path: str
    shape: tuple[int, ...]
    spec: P
    bytes: int
    bytes_per_device: int
    note: str  # why an axis is not divided although its rule says so; empty if the rule is followed


def placements(params: Any, mesh: Mesh, layout: str, *, rules: Sequence[Rule] = ()) -> list[Placement]:
    """Shards each parameter by the first rule that matches its path; an axis whose size does not divide evenly is not divided.

    Args:
      params: pytree of arrays or shapes.
      mesh: mesh with the axes 'data' and 'model'.
      layout: one of ``LAYOUTS``: 'data' (weights on every device), 'model' (layers divided by outputs; attention by heads, the MLP by
        columns, then rows), 'fsdp' (weights divided by inputs over the data axis) or 'model+fsdp'.
      rules: rules that take precedence over those of the layout.

    Returns:
      The placement of each leaf, in the tree's order.

    Raises:
      ValueError: if the layout does not exist, or one of ``rules`` applies to no leaf.

    Example:
      >>> mesh = make_mesh(devices=jax.devices()[:1])
      >>> tuple(placements({'fc': {'kernel': np.ones((4, 2), np.float32)}}, mesh, 'model+fsdp')[0].spec)
      ('data', 'model')
    """
    if layout not in LAYOUTS:
        raise errors.unknown('mesh.layout', layout, LAYOUTS)
    leaves, unused, rows = layers_lib.leaf_paths(params), dict(rules), []
    for path, leaf in leaves:
        pattern, spec = next(rule for rule in (*rules, *LAYOUTS[layout]) if re.search(rule[0], path))
        unused.pop(pattern, None)
        spec, note = _fit(tuple(leaf.shape), spec, mesh)
        size = leaf.size * np.dtype(leaf.dtype).itemsize
        parts = math.prod(mesh.shape[axis] for axis in spec if axis is not None)
        rows.append(Placement(path, tuple(leaf.shape), spec, bytes=size, bytes_per_device=size // parts, note=note))
    for pattern in unused:
        paths = [path for path, _ in leaves]
        raise ValueError(
            f'mesh.rules: {pattern!r} is found in no leaf, or only in those of an earlier rule.'
            f'{errors.did_you_mean(pattern, paths)} Leaves: {", ".join(paths)}.'
        )
    return rows


def _fit(shape: tuple[int, ...], spec: P, mesh: Mesh) -> tuple[P, str]:
    """Aligns a spec at a shape's last axes and drops axes that do not divide evenly; also returns a note on what was dropped."""
    if len(spec) > len(shape):
        return P(), f'it has no {len(spec)} axes'
    axes, notes = [None] * (len(shape) - len(spec)) + list(spec), []
    for i, axis in enumerate(axes):
        if axis is not None and shape[i] % mesh.shape[axis]:
            notes.append(f'{shape[i]} does not divide by {axis}={mesh.shape[axis]}')
            axes[i] = None
    return P(*axes) if any(axes) else P(), '; '.join(notes)


def shardings(tree: Any, params: Any, placed: Sequence[Placement], mesh: Mesh) -> Any:
    """Makes shardings for a tree that holds parameters, masks, momenta or averages: each like its weight; all else is replicated.

    A leaf belongs to the weight whose path its own path ends in, if their shapes are equal: ``.../trace/fc1/kernel`` in the state of
    an optax optimizer belongs to ``fc1/kernel``.

    Args:
      tree: pytree of arrays or shapes, such as the params themselves or ``jax.eval_shape(tx.init, params)``.
      params: pytree of the parameters' arrays or shapes.
      placed: placements of the parameters, from :func:`placements`.
      mesh: mesh that the placements were made for.

    Returns:
      The tree with a NamedSharding at each leaf.

    Example:
      >>> mesh = make_mesh(devices=jax.devices()[:1])
      >>> params = {'kernel': np.ones((4, 2), np.float32)}
      >>> tree = {'mu': params, 'count': np.zeros(())}
      >>> by_leaf = shardings(tree, params, placements(params, mesh, 'fsdp'), mesh)
      >>> tuple(by_leaf['mu']['kernel'].spec), tuple(by_leaf['count'].spec)
      (('data', None), ())
    """
    by_path = {path: (tuple(leaf.shape), row.spec) for (path, leaf), row in zip(layers_lib.leaf_paths(params), placed, strict=True)}

    def sharding(path: str, leaf) -> NamedSharding:
        parts = path.split('/')
        for start in range(len(parts)):  # the longest ending first
            shape, spec = by_path.get('/'.join(parts[start:]), (None, None))
            if spec is not None and shape == tuple(leaf.shape):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, P())

    return jax.tree.unflatten(jax.tree.structure(tree), [sharding(path, leaf) for path, leaf in layers_lib.leaf_paths(tree)])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P('data'))


def addressable_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Returns which rows of a batch this process feeds to its devices, as (start, stop).

    Processes whose devices share a part of the batch feed the same rows.

    Example:
      >>> addressable_rows(make_mesh(devices=jax.devices()[:1]), 8)
      (0, 8)
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = [part[0].indices(batch_size) for part in parts if part is not None]
    start, stop = min(b[0] for b in bounds), max(b[1] for b in bounds)
    uneven = batch_size % (stop - start) or start % (stop - start)  # the rows are not one of several equal parts
    return (0, batch_size) if uneven else (start, stop)
