"""Sparse products on a mesh: each device multiplies its part of the batch with its part of the weight, by a pattern of that part.

The batch is divided over 'data', the weight over 'model': by outputs, by inputs, or not at all. By outputs each device has some of the
result's channels, and the input gradient is a sum over 'model'; by inputs the result is. The weight gradient is a sum over 'data'.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

OUTPUTS, INPUTS = -1, -2


class Split(NamedTuple):
    """How a layer lies on a mesh; static."""

    mesh: Mesh
    axis: int | None  # of the weight, divided over 'model': OUTPUTS, INPUTS or None

    @property
    def parts(self) -> int:
        """Of the weight."""
        return self.mesh.shape['model'] if self.axis is not None else 1

    def images(self, divided_by: int) -> P:
        """Of [batch, height, width, channels], whose channels are the weight's inputs or outputs."""
        return P('data', None, None, 'model' if self.axis == divided_by else None)

    def weight(self, ndim: int) -> P:
        """Of the weight."""
        return P(*('model' if i - ndim == self.axis else None for i in range(ndim)))

    def of_lists(self) -> P:
        """Of a pattern's arrays, which have a row for each part."""
        return P() if self.axis is None else P('model')

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of a device's part of a weight."""
        return tuple(n // self.parts if i - len(whole) == self.axis else n for i, n in enumerate(whole))

    def local(self, x: tuple[int, ...], w: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a device's parts of images and weight."""
        inputs = x[-1] // (self.parts if self.axis == INPUTS else 1)
        return (x[0] // self.mesh.shape['data'], *x[1:-1], inputs), self.shape(w)

    def own(self, pattern: Any) -> Any:
        """A device's pattern, from its row of the arrays."""
        one = pattern if self.axis is None else jax.tree.map(lambda x: x[0], pattern)
        return dataclasses.replace(one, shape=self.shape(pattern.shape), split=None)

    def run(self, function: Callable, specs: tuple, out: P, *operands) -> jax.Array:
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(*operands)


def forward(function: Callable, x, w, pattern, geometry) -> jax.Array:
    """A backend's forward product."""
    split: Split = pattern.split

    def own(x, w, pattern):
        y = function(x, w, split.own(pattern), geometry)
        return lax.psum(y, 'model') if split.axis == INPUTS else y

    return split.run(own, (split.images(INPUTS), split.weight(w.ndim), split.of_lists()), split.images(OUTPUTS), x, w, pattern)


def input_gradient(function: Callable, dy, w, pattern, geometry, x_shape) -> jax.Array:
    """A backend's input gradient."""
    split: Split = pattern.split
    shape, _ = split.local(x_shape, w.shape)

    def own(dy, w, pattern):
        dx = function(dy, w, split.own(pattern), geometry, shape)
        return lax.psum(dx, 'model') if split.axis == OUTPUTS else dx

    return split.run(own, (split.images(OUTPUTS), split.weight(w.ndim), split.of_lists()), split.images(INPUTS), dy, w, pattern)


def weight_gradient(function: Callable, x, dy, pattern, geometry, w_shape) -> jax.Array:
    """A backend's weight gradient."""
    split: Split = pattern.split

    def own(x, dy, pattern):
        return lax.psum(function(x, dy, split.own(pattern), geometry, split.shape(w_shape)), 'data')

    specs = split.images(INPUTS), split.images(OUTPUTS), split.of_lists()
    return split.run(own, specs, split.weight(len(w_shape)), x, dy, pattern)


def mask(function: Callable, pattern) -> jax.Array:
    """The mask that a pattern stands for."""
    split: Split = pattern.split
    return split.run(lambda p: function(split.own(p)), (split.of_lists(),), split.weight(len(pattern.shape)), pattern)


def split_of(sharding: NamedSharding, shape: tuple[int, ...], block: tuple[int, int] | None) -> Split | None:
    """How kernels take a weight that lies like this; None: not at all, as where parts would cut blocks. What 'data' divides is gathered
    before it is used."""
    ndim = len(shape)
    names = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    over = [i - ndim for i, name in enumerate(names) if name == 'model' or (isinstance(name, tuple) and 'model' in name)]
    if any(isinstance(name, tuple) for name in names) or not set(over) <= {OUTPUTS, INPUTS}:
        return None
    split = Split(sharding.mesh, over[0] if over else None)  # type: ignore[arg-type]
    cuts = block and split.axis is not None and split.parts > 1 and shape[split.axis] // split.parts % block[split.axis]
    return None if cuts else split


def make(mask: Any, split: Split, build: Callable[[np.ndarray], Any], rows: bool) -> Any:
    """A pattern of arrays on the mesh, each process making the parts of its own devices.

    Args:
      mask: a weight's, concrete; on several processes a jax array.
      split: how it lies.
      build: makes one part's pattern on the host.
      rows: whether the first axis holds layers.
    """
    place = NamedSharding(split.mesh, split.weight(np.ndim(mask)))
    placed = jax.jit(lambda x: x, out_shardings=place)(mask)
    own = {}
    for shard in placed.addressable_shards:
        start = 0 if split.axis is None else (shard.index[split.axis].start or 0)
        if start not in own:
            own[start] = build(np.asarray(shard.data))
    # One program on all devices: of equal capacity, and by one rule.
    most = np.array([max(p.capacity for p in own.values()), max(p.by_rule == 'reference' for p in own.values())])
    if jax.process_count() > 1:
        most = np.asarray(multihost_utils.process_allgather(most)).reshape(-1, 2).max(0)
    by_rule = 'reference' if most[1] else next(iter(own.values())).by_rule
    own = {start: dataclasses.replace(p.with_capacity(int(most[0])), by_rule=by_rule) for start, p in own.items()}
    width = 1 if split.axis is None else np.shape(mask)[split.axis] // split.parts
    lead = 1 if rows else 0
    spec = P() if split.axis is None else P(*[None] * lead, 'model')

    def spread(*parts: np.ndarray) -> jax.Array:
        of = dict(zip(own, parts, strict=True))
        if split.axis is None:
            return jax.make_array_from_callback(parts[0].shape, NamedSharding(split.mesh, spec), lambda i: parts[0][i])
        shape = (*parts[0].shape[:lead], split.parts, *parts[0].shape[lead:])
        pick = lambda index: np.expand_dims(of[(index[lead].start or 0) * width], lead)
        return jax.make_array_from_callback(shape, NamedSharding(split.mesh, spec), pick)

    made = jax.tree.map(spread, *own.values())
    return dataclasses.replace(made, shape=tuple(np.shape(mask)[lead:]), split=split)
