"""The devices of a run: where its state and its batches lie."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from sparse_jax import config as config_lib
from sparse_jax import sharding
from sparse_jax.core import errors, target
from sparse_jax.train import state as state_lib
from sparse_jax.train.console import named_table


def check(config: config_lib.Config) -> None:
    """ValueError for a mesh that cannot be; needs no devices."""
    if config.mesh.layout not in sharding.LAYOUTS:
        raise errors.unknown('mesh.layout', config.mesh.layout, sharding.LAYOUTS)
    sharding.parse_rules(config.mesh.rules)


class Devices:
    """One device, or a mesh of several; then all arrays of a run are spread over it."""

    def __init__(self, config: config_lib.Config, experiment: state_lib.Experiment, devices: Sequence[Any] | None = None):
        """Raises ValueError for a mesh that does not fit the devices, or a batch that does not divide over it.

        Args:
          config: the settings; their mesh may be wrong in any way.
          experiment: whose state is placed.
          devices: to make the mesh of; None: all of this job's.
        """
        settings, one_process = config.mesh, jax.process_count() == 1
        available = jax.devices() if devices is None else list(devices)
        rules = sharding.parse_rules(settings.rules)
        self.mesh = None
        # 1 x 1: one device, whatever there are
        if len(available) > 1 and not (one_process and settings.data == settings.model == 1):
            self.mesh = sharding.make_mesh(settings.data, settings.model, devices=devices)
        elif settings.data * settings.model not in (1, -1):
            sharding.make_mesh(settings.data, settings.model, devices=available[:1])  # raises
        self._experiment = experiment
        self._shapes = jax.eval_shape(experiment.init, jax.random.key(0))
        mesh = self.mesh or sharding.make_mesh(devices=available[:1])
        self._placed = sharding.placements(self._shapes.params, mesh, settings.layout, rules=rules)
        accumulate = config.train.accumulate
        if config.data.batch_size % (mesh.shape['data'] * accumulate):
            divisor = f'mesh.data={mesh.shape["data"]}' + (f' times train.accumulate={accumulate}' if accumulate > 1 else '')
            raise ValueError(f'config.data.batch_size={config.data.batch_size} must be a multiple of {divisor}.')

    @functools.cached_property
    def state_shardings(self) -> Any:
        """Shardings of a first state; None on one device."""
        return self._shardings_of(self._shapes)

    @property
    def step_shardings(self) -> Any:
        """Shardings of the state that a step gives: compact storage may then hold scores, and has all on every device."""
        return self.state_shardings if self._experiment.storage == 'dense' else self.replicated

    def _shardings_of(self, shapes: Any) -> Any:
        return self.mesh and sharding.shardings(shapes, self._shapes.params, self._placed, self.mesh)

    @property
    def shapes(self) -> Any:
        """A first state's shapes and types, and shardings where there are several devices."""
        return self.shapes_after(0, {})

    def shapes_after(self, step: int, arrays: dict[str, str]) -> Any:
        """:attr:`shapes` of a state that was saved after a step, by the types and shapes of its arrays."""
        shapes = self._experiment.shapes_after(self._shapes, step, arrays)
        if self.mesh is None:
            return shapes
        placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        return jax.tree.map(placed, shapes, self._shardings_of(shapes))

    def first(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """A first state by a function of the experiment, in its place."""
        if self._experiment.storage == 'dense':
            return self.jit(make, self.state_shardings)(*arguments)
        state = make(*arguments)
        return (
            state if self.mesh is None else self.jit(lambda x: x, self.state_shardings)(state)
        )  # of many hosts, each has all of it

    @property
    def replicated(self) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, P())

    def jit(self, function: Callable, out: Any = 'replicated', **options) -> Callable:
        """jit, with results where `out` says: shardings, or on every device."""
        mesh = self.mesh
        if mesh is None:
            return jax.jit(function, **options)

        @functools.wraps(function)
        def placed(*arguments, **keywords):
            with target.over(mesh):
                return function(*arguments, **keywords)

        placed.__name__ = getattr(getattr(function, 'func', function), '__name__', 'placed')
        return jax.jit(placed, out_shardings=self.replicated if isinstance(out, str) else out, **options)

    def host(self, tree: Any) -> Any:
        """A tree of arrays on this host, whole, whatever their sharding."""
        if self.mesh is not None:
            tree = jax.jit(lambda x: x, out_shardings=self.replicated)(tree)
        return jax.device_get(tree)

    def rows(self, size: int) -> tuple[int, int]:
        """Which rows of a batch of this size this process makes."""
        return (0, size) if self.mesh is None else sharding.addressable_rows(self.mesh, size)

    def padded(self, size: int) -> int:
        """The next size that divides over the mesh."""
        parts = 1 if self.mesh is None else self.mesh.shape['data']
        return -(-size // parts) * parts

    def batch(self, arrays: dict[str, np.ndarray], size: int) -> Any:
        """A batch of this size on the devices, from this process's rows of it."""
        if self.mesh is None:
            return arrays
        start, batch_sharding = self.rows(size)[0], sharding.batch_sharding(self.mesh)

        def spread(x: np.ndarray) -> jax.Array:
            def part(index):
                low, high, _ = index[0].indices(size)
                return x[low - start : high - start]

            return jax.make_array_from_callback((size, *x.shape[1:]), batch_sharding, part)

        return {name: spread(x) for name, x in arrays.items()}

    def print_table(self) -> None:
        """Prints how each parameter is divided, and what a device holds; nothing on one device."""
        if self.mesh is None:
            return
        rows = []
        for row in self._placed:
            divided = ', '.join('-' if axis is None else axis for axis in row.spec) or 'no'
            shape = 'x'.join(map(str, row.shape))
            rows.append((row.path, shape, divided, f'{row.bytes:,}', f'{row.bytes_per_device:,}', row.note))
        total, each = self._state_bytes()
        console = Console(width=None if Console().is_terminal else 150)
        table = named_table(
            f'{self.mesh.size} devices, {" x ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())}',
            ('parameter', 'shape', 'divided', 'bytes', 'bytes a device', ''),
            rows,
            width=console.width,
            left=('shape', 'divided', ''),
            total=('the whole state', '', '', f'{total:,}', f'{each:,}', 'parameters, masks, momenta'),
        )
        console.print(table)

    def _state_bytes(self) -> tuple[int, int]:
        total = each = 0
        for leaf, leaf_sharding in zip(jax.tree.leaves(self._shapes), jax.tree.leaves(self.state_shardings), strict=True):
            size = leaf.dtype.itemsize
            total += leaf.size * size
            each += math.prod(leaf_sharding.shard_shape(leaf.shape)) * size
        return total, each
