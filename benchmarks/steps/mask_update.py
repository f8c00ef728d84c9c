"""The cost of a mask update: time against sorting, memory, compilation, and how it grows with the number of weights.

    python -m benchmarks.steps.mask_update

ResNet-50's 53 convolutions and its output layer (25.5 million weights), sparse momentum at 5%, `tx.update` and `apply_updates` in one
jit with donated state. Reported is how much longer a step with a mask update takes than an ordinary step of the same program. The
rivals run the same program with another selection: by a stable argsort of the keys (the same masks, bit for bit), and by thresholds
from a sort of the keys as uint32, the fastest sort available (whose counts are not exact where there are ties). They take turns in one
process, and ratios are medians over rounds. Cost: six minutes; --sizes= skips the second table.
"""

import argparse
import contextlib
import functools
import math
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax as sj
from sparse_jax.core import numerics, selection

UPDATE_EVERY = 10**6


def resnet50() -> dict[str, tuple[int, ...]]:
    """Returns the shapes of ResNet-50's weights: 54 leaves with 25,502,912 weights."""
    shapes, channels = {'conv1': (7, 7, 3, 64)}, 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            name = f'stage{stage}_block{block}'
            shapes |= {
                f'{name}_a': (1, 1, channels, width),
                f'{name}_b': (3, 3, width, width),
                f'{name}_c': (1, 1, width, 4 * width),
            }
            if block == 0:
                shapes[f'{name}_shortcut'] = (1, 1, channels, 4 * width)
            channels = 4 * width
    return shapes | {'fc': (2048, 1000)}


def _by_argsort(leaves, k):
    masks, start = [], 0
    for leaf in leaves:
        rows = leaf.reshape(len(leaf), -1)
        order = jnp.argsort(rows, axis=1, descending=True, stable=True)
        chosen = jnp.arange(rows.shape[1]) < k[start : start + len(leaf), None]
        scatter = jax.vmap(lambda o, c, n=rows.shape[1]: jnp.zeros(n, bool).at[o].set(c))
        masks.append((scatter(order, chosen) & (rows > 0)).reshape(leaf.shape))
        start += len(leaf)
    return masks


def _by_sort(leaves, k):
    masks, start = [], 0
    for leaf in leaves:
        rows = leaf.reshape(len(leaf), -1)
        rank = jnp.clip(rows.shape[1] - k[start : start + len(leaf)], 0, rows.shape[1] - 1)
        threshold = jnp.take_along_axis(jnp.sort(rows, axis=1), rank[:, None], axis=1)
        masks.append(((rows >= threshold) & (rows > 0)).reshape(leaf.shape))
        start += len(leaf)
    return masks


SELECTIONS = {
    'sparse_jax': contextlib.nullcontext,
    'argsort': functools.partial(mock.patch.object, selection, 'select', _by_argsort),
    'sort': functools.partial(mock.patch.object, selection, 'select', _by_sort),
}


def _optimizer(**options):
    inner = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9, nesterov=True))
    return sj.methods.create('sparse_momentum', inner, 0.05, UPDATE_EVERY, 10 * UPDATE_EVERY, **options)


def _lower(tx, shapes):
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params)


class Runner:
    """A compiled step with its state, which times ordinary steps and steps with a mask update."""

    def __init__(self, compiled, params, state, grads):
        self.compiled, self.grads = compiled, grads
        self.params = sj.apply_masks(jax.tree.map(jnp.copy, params), state.masks)
        self.state = jax.tree.map(jnp.copy, state)

    def time(self, count: int) -> float:
        """Returns the seconds of the step that follows step `count`."""
        self.state = jax.block_until_ready(self.state._replace(count=jnp.int32(count)))
        begin = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.compiled(self.params, self.state, self.grads))
        return time.perf_counter() - begin

    def beyond(self) -> tuple[float, float]:
        """Returns the seconds of an ordinary step, and how many more a step with a mask update takes."""
        ordinary = min(self.time(0) for _ in range(3))
        return ordinary, self.time(UPDATE_EVERY - 1) - ordinary


def _inputs(shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return params, jax.tree.map(lambda p: 0.01 * jnp.roll(p, 1), params), jax.jit(_optimizer().init)(params)


def _temporaries(compiled, size: int) -> float:
    """Returns a program's temporary memory in bytes per weight."""
    return compiled.memory_analysis().temp_size_in_bytes / size


def against_sorting(rounds: int) -> None:
    """Prints the table of selections: ours, by argsort, and by sort."""
    shapes = resnet50()
    size = sum(math.prod(shape) for shape in shapes.values())
    params, grads, state = _inputs(shapes)
    runners, memory, seconds = {}, {}, {}
    fixed = _temporaries(_lower(_optimizer(grow=None), shapes).compile(), size)
    for name, patched in SELECTIONS.items():
        with patched():
            lowered = _lower(_optimizer(), shapes)
        begin = time.perf_counter()
        compiled = lowered.compile()
        seconds[name] = time.perf_counter() - begin
        memory[name] = _temporaries(compiled, size) - fixed
        runners[name] = Runner(compiled, params, state, grads)
    with mock.patch.object(numerics, 'one_cpu_device', return_value=False):
        shared = _temporaries(_lower(_optimizer(), shapes).compile(), size) - fixed
    times = {name: [] for name in runners}
    ordinary = {name: [] for name in runners}
    for _ in range(rounds + 1):
        for name, runner in runners.items():
            step, update = runner.beyond()
            ordinary[name].append(step)
            times[name].append(update)
    ours = np.array(times['sparse_jax'][1:])
    print(f'ResNet-50: {len(shapes)} leaves, {size:,} weights; {jax.devices()[0].device_kind}, jax {jax.__version__}')
    print(f'ordinary step {1e3 * np.median(ordinary["sparse_jax"][1:]):.0f} ms')
    print(
        '| selection | mask update, beyond an ordinary step | against sparse_jax | compilation | memory beyond an ordinary step |'
    )
    print('|---|---|---|---|---|')
    for name in runners:
        updates = np.array(times[name][1:])
        ratio = '' if name == 'sparse_jax' else f'{np.median(updates / ours):.1f}x'
        print(
            f'| {name} | {1e3 * np.median(updates):.0f} ms | {ratio} | {seconds[name]:.1f} s | {memory[name]:.2f} bytes a weight |'
        )
    print(f'where all layers share a loop (accelerators; several devices): {shared:.2f} bytes a weight beyond an ordinary step')
    same = all((runners['sparse_jax'].state.masks[n] == runners['argsort'].state.masks[n]).all() for n in shapes)
    print(f'argsort made the same masks: {same}')


def by_size(millions: list[float], rounds: int) -> None:
    """Prints the table of numbers of weights, each as many layers and as a single one."""
    print('| weights | leaves | ordinary step | mask update, beyond an ordinary step | a million weights | compilation |')
    print('|---|---|---|---|---|---|')
    for million in millions:
        for leaves in (max(1, round(million)), 1):
            side = round(math.sqrt(million * 1e6 / leaves))
            shapes = {f'layer{i}': (side, side) for i in range(leaves)}
            if leaves == 1 and million <= 1 and max(1, round(million)) != 1:
                continue
            params, grads, state = _inputs(shapes)
            lowered = _lower(_optimizer(), shapes)
            begin = time.perf_counter()
            compiled = lowered.compile()
            seconds = time.perf_counter() - begin
            runner = Runner(compiled, params, state, grads)
            runner.beyond()
            rows = np.array([runner.beyond() for _ in range(rounds)])
            step, update = 1e3 * np.median(rows, axis=0)
            print(
                f'| {million:g}M | {leaves} | {step:.1f} ms | {update:.1f} ms | {update / million:.2f} ms | {seconds:.1f} s |',
                flush=True,
            )
            if leaves == 1:
                break


def many_leaves(number: int) -> None:
    """Prints how long a tree of many leaves takes to trace and to compile."""
    shapes = {f'layer{i}': (64 + 8 * (i % 10), 96) for i in range(number)}
    for what, options in (('with mask updates', {}), ('with a fixed mask', {'grow': None})):
        begin = time.perf_counter()
        lowered = _lower(_optimizer(**options), shapes)
        traced = time.perf_counter() - begin
        lowered.compile()
        compiled = time.perf_counter() - begin - traced
        print(f'{number} leaves of 10 shapes, {what}: traced in {traced:.1f} s, compiled in {compiled:.1f} s')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--sizes', default='1,4,10,25,50,100', help='millions of weights, separated by commas')
    parser.add_argument(
        '--leaves', type=int, default=500, help='number of leaves of the tree whose compilation is timed; 0 skips it'
    )
    args = parser.parse_args()
    against_sorting(args.rounds)
    if args.sizes:
        by_size([float(x) for x in args.sizes.split(',')], args.rounds)
    if args.leaves:
        many_leaves(args.leaves)


if __name__ == '__main__':
    main()
