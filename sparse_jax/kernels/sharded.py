"""Sparse products on a mesh: each device multiplies its part of the batch with its part of the weight, by a pattern of that part.

The batch is divided over 'data', the weight over 'model': by outputs, by inputs, or not at all. By outputs each device has some of the
result's channels, and the input gradient is a sum over 'model'; by inputs the result is. The weight gradient is a sum over 'data'.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_jax.core.granularity import Granularity

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

    def part(self, pattern: Any) -> Any:
        """A device's pattern, from its row of the arrays."""
        row = pattern if self.axis is None else jax.tree.map(lambda x: x[0], pattern)
        return dataclasses.replace(row, shape=self.shape(pattern.shape), split=None)

    def run(self, function: Callable, specs: tuple, out: P, *operands) -> jax.Array:
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(*operands)


class ByParts(NamedTuple):
    """A backend for patterns that are divided over a mesh: on each device the given one multiplies the device's parts."""

    backend: Any

    def unsupported(self, dtype, granularity: Granularity) -> str:
        return self.backend.unsupported(dtype, granularity)

    def forward(self, x, w, pattern, geometry) -> jax.Array:
        split: Split = pattern.split

        def part(x, w, pattern):
            y = self.backend.forward(x, w, split.part(pattern), geometry)
            return lax.psum(y, 'model') if split.axis == INPUTS else y

        specs = split.images(INPUTS), split.weight(w.ndim), split.of_lists()
        return split.run(part, specs, split.images(OUTPUTS), x, w, pattern)

    def input_gradient(self, dy, w, pattern, geometry, x_shape) -> jax.Array:
        split: Split = pattern.split
        shape, _ = split.local(x_shape, w.shape)

        def part(dy, w, pattern):
            dx = self.backend.input_gradient(dy, w, split.part(pattern), geometry, shape)
            return lax.psum(dx, 'model') if split.axis == OUTPUTS else dx

        specs = split.images(OUTPUTS), split.weight(w.ndim), split.of_lists()
        return split.run(part, specs, split.images(INPUTS), dy, w, pattern)

    def weight_gradient(self, x, dy, pattern, geometry, w_shape) -> jax.Array:
        split: Split = pattern.split

        def part(x, dy, pattern):
            return lax.psum(self.backend.weight_gradient(x, dy, split.part(pattern), geometry, split.shape(w_shape)), 'data')

        specs = split.images(INPUTS), split.images(OUTPUTS), split.of_lists()
        return split.run(part, specs, split.weight(len(w_shape)), x, dy, pattern)


class OverData(NamedTuple):
    """A backend for compact weights on a mesh whose devices have all of them: the given one multiplies each device's part of the batch."""

    backend: Any
    mesh: Mesh

    def _run(self, function: Callable, specs: tuple, out: P, *operands) -> jax.Array:
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(*operands)

    def compact_forward(self, x, values, layout, geometry) -> jax.Array:
        part = lambda x, values, layout: self.backend.compact_forward(x, values, layout, geometry)
        return self._run(part, (P('data'), P(), P()), P('data'), x, values, layout)

    def compact_input_gradient(self, dy, values, layout, geometry, x_shape) -> jax.Array:
        shape = (x_shape[0] // self.mesh.shape['data'], *x_shape[1:])
        part = lambda dy, values, layout: self.backend.compact_input_gradient(dy, values, layout, geometry, shape)
        return self._run(part, (P('data'), P(), P()), P('data'), dy, values, layout)

    def compact_weight_gradient(self, x, dy, layout, geometry) -> jax.Array:
        part = lambda x, dy, layout: lax.psum(self.backend.compact_weight_gradient(x, dy, layout, geometry), 'data')
        return self._run(part, (P('data'), P('data'), P()), P(), x, dy, layout)


def mask(function: Callable, pattern) -> jax.Array:
    """The mask that a pattern stands for; `function` makes it of one device's pattern."""
    split: Split = pattern.split
    return split.run(lambda p: function(split.part(p)), (split.of_lists(),), split.weight(len(pattern.shape)), pattern)


def split_of(sharding: NamedSharding, shape: tuple[int, ...], granularity: Granularity) -> Split | None:
    """How kernels take a weight that lies like this; None: not at all, as where parts would cut blocks. What 'data' divides is gathered
    before it is used."""
    ndim = len(shape)
    names = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    over = [i - ndim for i, name in enumerate(names) if name == 'model' or (isinstance(name, tuple) and 'model' in name)]
    if any(isinstance(name, tuple) for name in names) or not set(over) <= {OUTPUTS, INPUTS}:
        return None
    split = Split(sharding.mesh, over[0] if over else None)  # type: ignore[arg-type]
    if split.axis is None or split.parts == 1:
        return split
    return None if shape[split.axis] // split.parts % granularity.sides[split.axis] else split
