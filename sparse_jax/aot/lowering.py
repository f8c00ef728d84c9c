"""A run's training step as a program for a GPU or a TPU that is not here: its kernels, memory and collectives. Nothing is run or written."""

import collections
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from sparse_jax import config as config_lib
from sparse_jax import kernels as kernels_lib
from sparse_jax import sharding
from sparse_jax.aot import collectives, compile_only
from sparse_jax.compact import tree
from sparse_jax.compact.prepare import lists_by_output
from sparse_jax.core import errors
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.core.granularity import Granularity
from sparse_jax.kernels import backend as backend_lib
from sparse_jax.kernels import pattern as pattern_lib
from sparse_jax.kernels import sharded
from sparse_jax.stats.tables import shorten
from sparse_jax.train import devices as devices_lib
from sparse_jax.train import kernel_choice
from sparse_jax.train import run as run_lib
from sparse_jax.train import state as state_lib

PLATFORMS = {'cuda': 'gpu', 'tpu': 'tpu'}  # as jax's lowering calls them, and as it calls backends
_FUNCTION = re.compile(r'func\.func \w+ @([\w.]+)\(')
_CALL = re.compile(r'\bcall @([\w.]+)\(')
_KERNEL = re.compile(r'sparse_jax_(forward|input_gradient|weight_gradient)')


class Lowered(NamedTuple):
    """What a training step became."""

    platform: str
    layers: dict[str, backend_lib.Choice]  # of each sparse leaf: what multiplies it
    kernels: dict[str, int]  # calls in the program by name; one in a loop over layers counts once
    state_bytes: int  # of the training state, on one device
    largest_layer: int  # weights of the largest sparse leaf, in one layer, on one device
    memory: dict[str, int] | None  # bytes on one device, as the compiler says; None: only lowered
    collectives: list[collectives.Collective] | None  # None: only lowered
    why_not_compiled: str
    text: str  # the lowered program
    compiled_text: str  # empty: only lowered


def lower(config: config_lib.Config, platform: str) -> Lowered:
    """Lowers a config's ordinary training step, and compiles it where the platform's compiler is installed.

    Where gradients are dense in a window before each mask update only, an ordinary step is one outside of it. Data is read only where its
    shapes, which decide the program, are not known by its name; nothing is run or written.

    Args:
      config: the settings. Its mesh says for how many devices (-1: one). With ``sparsity.kernels`` of 'auto' every layer that the
        platform's kernels can take takes them, as nothing can be measured.
      platform: 'cuda' or 'tpu'.

    Raises:
      ValueError: for anything wrong with the settings, and where there are too few devices to stand in for those of the mesh.
    """
    if platform not in PLATFORMS:
        raise errors.unknown('platform', platform, PLATFORMS)
    backend = PLATFORMS[platform]
    with kernels_lib.lowering_for(backend):
        run_lib.check_settings(config)
        experiment = run_lib.experiment_of_shapes(config)
        count = max(1, config.mesh.data) * max(1, config.mesh.model)
        reason = compile_only.unavailable(backend)
        if not reason:
            stand_ins = compile_only.devices(backend, count)
        elif count <= jax.device_count():
            stand_ins = jax.devices()[:count]
        else:
            raise ValueError(
                f'config.mesh asks for {count} devices, and this process has {jax.device_count()} to stand in for them: '
                f'set JAX_NUM_CPU_DEVICES={count}.'
            )
        devices = devices_lib.Devices(config, experiment, stand_ins)
        kernel_choice.cut_by_mesh(config, experiment, devices)
    with kernels_lib.lowering_for(backend, mesh=devices.mesh):
        patterns, layers = (_patterns if experiment.storage == 'dense' else _lists)(config, experiment, devices)
        arguments = (
            _placed(devices, stand_ins[0]),
            _batch(config, experiment, devices, stand_ins[0]),
            _on(patterns, devices, stand_ins[0]),
        )
        placed = devices.replicated if devices.mesh is None else (devices.step_shardings, devices.replicated)
        ordinary = functools.partial(experiment.train_step, mask_update=False)
        step = devices.jit(ordinary, placed, donate_argnums=0, static_argnames='dense_gradients')
        dense = experiment.dense_gradient_steps is None
        with kernels_lib.lowering_for(backend, mesh=devices.mesh, stand_in=None if reason else stand_ins[0]):
            lowered = step.trace(*arguments, dense_gradients=dense).lower(lowering_platforms=(platform,))
        text = lowered.as_text()
        memory, transfers, compiled_text = None, None, ''
        if not reason:
            compiled = lowered.compile()
            compiled_text = compiled.as_text() or ''
            transfers, memory = collectives.find(compiled_text), _memory(compiled)
    kernels = _kernel_calls(text)
    each = sum(math.prod(_shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]))
    largest = max((math.prod(_shard(x)[-2:]) for x in jax.tree.leaves(arguments[0].params) if x.ndim > 1), default=0)
    return Lowered(platform, layers, dict(kernels), each, largest, memory, transfers, reason, text, compiled_text)


def _kernel_calls(text: str) -> collections.Counter[str]:
    """How often a lowered program calls each kernel, by name; those in a function as often as it is called."""
    own: dict[str, collections.Counter[str]] = {}
    called: dict[str, collections.Counter[str]] = {}
    name = ''
    for line in text.splitlines():
        if match := _FUNCTION.search(line):
            name = match[1]
            own[name], called[name] = collections.Counter(), collections.Counter()
        elif 'custom_call' in line and (match := _KERNEL.search(line)):
            own[name][match[1]] += 1
        elif match := _CALL.search(line):
            called[name][match[1]] += 1

    @functools.cache
    def total(name: str) -> collections.Counter[str]:
        counts = collections.Counter(own[name])
        for other, times in called[name].items():
            for kernel, count in total(other).items():
                counts[kernel] += times * count
        return counts

    return total('main')


def _memory(compiled) -> dict[str, int]:
    stats = compiled.memory_analysis()
    parts = {'arguments': 'argument', 'results': 'output', 'of these in place': 'alias', 'temporary': 'temp'}
    return {name: int(getattr(stats, f'{key}_size_in_bytes')) for name, key in parts.items()}


def _shard(x) -> tuple[int, ...]:
    return x.sharding.shard_shape(x.shape)


def _placed(devices: devices_lib.Devices, one: Any) -> Any:
    """The state's shapes on their devices."""
    return devices.shapes if devices.mesh is not None else _on(devices.shapes, devices, one)


def _on(tree: Any, devices: devices_lib.Devices, one: Any) -> Any:
    """Shapes without a sharding on one device."""
    single = SingleDeviceSharding(one)
    return tree if devices.mesh else jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), tree)


def _batch(config, experiment: state_lib.Experiment, devices: devices_lib.Devices, one: Any) -> dict[str, jax.ShapeDtypeStruct]:
    example = experiment.example
    batch_sharding = SingleDeviceSharding(one) if devices.mesh is None else sharding.batch_sharding(devices.mesh)
    size = config.data.batch_size
    labels = (size, *example.shape[1:]) if example.dtype == jnp.int32 else (size,)
    return {
        'input': jax.ShapeDtypeStruct((size, *example.shape[1:]), example.dtype, sharding=batch_sharding),
        'label': jax.ShapeDtypeStruct(labels, jnp.int32, sharding=batch_sharding),
    }


def _choice(config: config_lib.Config, granularity: Granularity) -> backend_lib.Choice:
    """What multiplies a layer that kernels can take, of a run that measures nothing."""
    mode, dtype = config.sparsity.kernels, config.model.dtype
    if mode == 'auto':
        return backend_lib.of_platform(dtype, granularity)
    if mode == 'dense':
        return backend_lib.Choice('dense', 'sparsity.kernels=dense')
    reason = backend_lib.unsupported(mode, dtype, granularity)
    return backend_lib.Choice('dense', reason) if reason else backend_lib.Choice(mode, '')


def _patterns(
    config: config_lib.Config, experiment: state_lib.Experiment, devices: devices_lib.Devices
) -> tuple[Any, dict[str, backend_lib.Choice]]:
    """Shapes of the patterns that the run begins with, and what multiplies each sparse leaf."""
    sparsity = config.sparsity
    masks = masks_lib.get_masks(devices.shapes.opt_state) if sparsity.method != 'dense' else {}
    granularity = granularity_lib.of_products(granularity_lib.get(sparsity.granularity))
    layers: dict[str, backend_lib.Choice] = {}
    patterns = []
    for path, mask in layers_lib.leaf_paths(masks):
        pattern, choice = None, backend_lib.Choice('dense', '')
        rows = experiment.stacked is not None and mask.ndim > 0 and experiment.stacked(path, mask)
        if mask.ndim - rows in (2, 4):
            choice = _choice(config, granularity)
            if choice.implementation != 'dense':
                pattern = _pattern(path, mask, rows, granularity, choice.implementation, sparsity.density, devices)
            if choice.implementation != 'dense' and pattern is None:
                choice = backend_lib.Choice('dense', 'the mesh cuts its blocks, or divides other axes')
        if mask.ndim:
            layers[path] = choice
        patterns.append(pattern)
    if not any(patterns):
        return None, layers
    return jax.tree.unflatten(jax.tree.structure(masks), patterns), layers


def _lists(
    config: config_lib.Config, experiment: state_lib.Experiment, devices: devices_lib.Devices
) -> tuple[Any, dict[str, backend_lib.Choice]]:
    """:func:`_patterns` of compact storage: shapes of what kernels read beside the layout."""
    layout = devices.shapes.opt_state.layout
    named = tree.compact_leaves(layout).named
    layers = {path: backend_lib.choose_compact(None, config.model.dtype, leaf) for path, leaf in named}
    lists = jax.eval_shape(lists_by_output, layout)
    if devices.mesh is not None:
        lists = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.replicated), lists)
    return lists, layers


def _pattern(
    path, mask, rows: bool, granularity: Granularity, implementation: str, density: float, devices: devices_lib.Devices
) -> pattern_lib.Pattern | None:
    """Shapes of a layer's pattern; None where the mesh divides it so that no kernel takes it."""
    shape = mask.shape[int(rows) :]
    split = None
    if devices.mesh is not None:
        split = sharded.split_of(mask.sharding, mask.shape, granularity)
        if split is None:
            return None
    units = granularity_lib.tap_units(granularity, split.shape(shape) if split else shape)
    most = math.prod(units)
    room = pattern_lib.capacity(round(density * most), most)
    lead = (mask.shape[0],) if rows else ()
    parts, spec = ((split.parts,), P(*[None] * len(lead), 'model')) if split and split.axis is not None else ((), P())
    list_sharding = NamedSharding(split.mesh, spec) if split else None
    of = lambda n: jax.ShapeDtypeStruct((*lead, *parts, n), np.int32, sharding=list_sharding)
    return pattern_lib.Pattern(
        indices=of(room),  # type: ignore[arg-type]
        pointers=of(units[-1] + 1),  # type: ignore[arg-type]
        transposed_indices=of(room),  # type: ignore[arg-type]
        transposed_pointers=of(units[-2] + 1),  # type: ignore[arg-type]
        shape=shape,
        granularity=granularity,
        implementation=implementation,
        name=path,
        split=split,
    )


def print_tables(lowered: Lowered) -> None:
    """Kernels, memory and collectives, for people."""
    console = Console()
    table = Table(title=f'an ordinary training step for {lowered.platform}, {"lowered" if lowered.memory is None else "compiled"}')
    for column in ('layer', 'takes', ''):
        table.add_column(column)
    for path, (name, reason) in lowered.layers.items():
        table.add_row(shorten(path, 40), name, reason)
    console.print(table)
    table = Table(title='block-sparse kernels')
    table.add_column('kernel')
    table.add_column('calls in the program', justify='right')  # one in a loop over layers counts once
    for name, count in sorted(lowered.kernels.items()):
        table.add_row(name, str(count))
    console.print(table)
    table = Table(title='memory of one device')
    table.add_column('')
    table.add_column('bytes', justify='right')
    for name, size in {'training state': lowered.state_bytes, **(lowered.memory or {})}.items():
        table.add_row(name, f'{size:,}')
    console.print(table)
    if lowered.collectives is None:
        console.print(
            f'Only lowered: temporary memory and collectives are known after compiling. {lowered.why_not_compiled}', soft_wrap=True
        )
        return
    groups = collections.defaultdict(list)
    for one in lowered.collectives:
        groups[one.kind, bool(one.loop)].append(one.bytes)
    table = Table(title='collectives of one device')
    for column in ('kind', 'in a loop', 'calls', 'bytes together, each time'):
        table.add_column(column, justify='right' if column[:2] in ('ca', 'by') else 'left')
    for (kind, loop), sizes in groups.items():
        table.add_row(kind, 'yes' if loop else 'no', str(len(sizes)), f'{sum(sizes):,}')
    console.print(table if groups else 'collectives: none')


def run(config: config_lib.Config, platform: str) -> Lowered:
    """:func:`lower`, and prints it."""
    compile_only.run_on_cpu()
    lowered = lower(config, platform)
    print_tables(lowered)
    return lowered
