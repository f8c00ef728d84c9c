"""Compact storage beside dense storage: bytes of the state, and seconds of a step and of a mask update.

    python -m benchmarks.steps.compact            # both tables, ten minutes on two CPU cores
    python -m benchmarks.steps.compact --only=memory --figure=memory.png

Memory is that of the arrays that there are: weights, gradients, Adam's moments, masks or lists, by allocation, of a network of 101 million
weights, in bytes a dense weight. Steps are of one network in both forms, on the C++ kernels, with SGD and momentum; the two take turns, and
the ratio is the median of those within a round. A mask update is the step that moves the masks and, in the dense storage, the new patterns
that kernels need; in the compact one plan and move.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax as sj
from sparse_jax import models
from sparse_jax.core import layers as layers_lib
from sparse_jax.launch import allocator

SHAPES = {f'layer{i}': (2048, 2048) for i in range(24)} | {'bias': (2048,)}


def _make(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: 0.02 * jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


PARTS = ('weights', 'gradients', 'moments', 'masks or lists')


def memory() -> dict[str, list[float]]:
    """Bytes a dense weight of each part, for each form of the network."""
    rows: dict[str, list[float]] = {}
    whole = sum(int(np.prod(shape)) for shape in SHAPES.values())

    def row(name: str, values: Any, tx: Any, lists: Any) -> None:
        moments = jax.jit(tx.init)(values)
        parts = [_bytes(values), _bytes(jax.tree.map(jnp.zeros_like, values)), _bytes(moments), _bytes(lists)]
        rows[name] = [part / whole for part in parts]

    row('dense network', jax.jit(_make)(), optax.adam(1e-3), ())
    for granularity, density, what in (
        ('unstructured', 0.05, '5% of single weights'),
        ('block:64x64', 0.1, '10% in blocks of 64x64'),
    ):
        rule = sj.methods.rule(
            'rigl', density=density, update_every=100, total_steps=1000, granularity=granularity, distribution='uniform'
        )
        params = jax.jit(_make)()
        state = jax.jit(sj.sparsify(optax.adam(1e-3), rule=rule).init)(params)
        patterns = jax.device_put(sj.kernels.make_patterns(state))
        row(f'{what}, dense storage', params, optax.adam(1e-3), (state._replace(inner_state=()), patterns))
        del params, state, patterns
        for factor in (1.0, 1.25):
            values, layout = sj.compact.init(_make, rule, capacity_factor=factor)
            row(f'{what}, compact' + (f', capacity factor {factor:g}' if factor > 1 else ''), values, optax.adam(1e-3), layout)
    return rows


def table(rows: dict[str, list[float]]) -> str:
    """In markdown."""
    lines = [f'| storage | {" | ".join(PARTS)} | all |', '|---|' + '---:|' * (len(PARTS) + 1)]
    return '\n'.join(
        [*lines, *(f'| {name} | {" | ".join(f"{part:.3f}" for part in (*parts, sum(parts)))} |' for name, parts in rows.items())]
    )


def draw(rows: dict[str, list[float]], path: pathlib.Path) -> None:
    """A bar for each form, of its parts."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.6 * len(rows) + 1.2), layout='constrained')
    names, ends = list(rows), np.zeros(len(rows))
    for part, values in zip(PARTS, zip(*rows.values(), strict=True), strict=True):
        axes.barh(names, values, left=ends, label=part)
        ends += values
    for i, end in enumerate(ends):
        axes.text(end + 0.2, i, f'{end:.2f}', va='center')
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(ends))
    axes.set_xlabel('bytes a weight of the dense network, with Adam, float32')
    axes.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside upper center', ncols=len(PARTS), frameon=False)
    figure.savefig(path, dpi=150)


class Network:
    """A network at 5% in both forms: functions that do a step, and a mask update, and wait for it."""

    def __init__(self, name: str, shape: tuple[int, ...], batch: int, method: str, density: float):
        options: dict[str, Any] = dict(layout='auto') if len(shape) == 3 else dict(depth=4, features=512, heads=8)
        tokens = 257 if len(shape) == 1 else 10
        model = models.create(name, input_shape=shape, num_outputs=tokens, **options)
        random = np.random.default_rng(0)
        x = (
            random.integers(tokens, size=(batch, *shape))
            if len(shape) == 1
            else random.standard_normal((batch, *shape), np.float32)
        )
        labels = random.integers(tokens, size=(batch, *shape) if len(shape) == 1 else batch)
        self._batch = jnp.asarray(x, jnp.int32 if len(shape) == 1 else jnp.float32), jnp.asarray(labels, jnp.int32)
        rule = sj.methods.rule(
            method, density=density, update_every=100, total_steps=10_000, stacked=model.stacked, distribution='uniform'
        )
        self._rule, self._inner = rule, optax.sgd(0.01, momentum=0.9)
        tx = sj.sparsify(self._inner, rule=rule)
        params, self._model_state = model.init(jax.random.key(0))
        self._opt_state = jax.jit(tx.init)(params)
        masks = sj.get_masks(self._opt_state)
        self._params = sj.apply_masks(params, masks)
        self._patterns = self._patterns_of(self._opt_state)
        capacity_factor = 1.25 if rule.redistribute is not None else 1.0
        self._values, self._layout = sj.compact.compress(
            self._params, self._opt_state, capacity_factor=capacity_factor, implementation='cpu'
        )
        self._compact_state = self._inner.init(self._values)
        self._scores = self._layout_scores()

        def loss(params, patterns):
            logits, state = model.apply(
                params, self._model_state, self._batch[0], train=True, rng=jax.random.key(0), patterns=patterns
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, self._batch[1]).mean(), state

        def step(tx, params, state, patterns, **options):
            grads, _ = jax.grad(loss, has_aux=True)(params, patterns)
            if options:  # the gradients of missing weights are zeros
                grads = sj.apply_masks(grads, sj.get_masks(state))
            updates, state = tx.update(grads, state, params, **options)
            return optax.apply_updates(params, updates), state

        jitted = functools.partial(jax.jit, donate_argnums=(0, 1))
        self._dense_step = jitted(functools.partial(step, tx, update_masks=False))
        self._compact_step = jitted(functools.partial(step, self._inner))
        self._update = jax.jit(functools.partial(tx.update, update_masks=True))
        self._move = jax.jit(sj.compact.move)

    def _layout_scores(self) -> Any:
        leaves = layers_lib.leaf_paths(self._params)
        compact = {path for path, mask in layers_lib.leaf_paths(sj.get_masks(self._opt_state)) if mask.ndim}
        noise = [
            jax.random.normal(jax.random.key(i), x.shape, jnp.bfloat16) if path in compact else None
            for i, (path, x) in enumerate(leaves)
        ]
        return jax.tree.unflatten(jax.tree.structure(self._params), noise)

    def _patterns_of(self, state: Any) -> Any:
        implementations = {path: 'cpu' for path, mask in layers_lib.leaf_paths(sj.get_masks(state)) if mask.ndim}
        return jax.device_put(sj.kernels.make_patterns(state, implementations=implementations))

    def dense_step(self) -> None:
        self._params, self._opt_state = jax.block_until_ready(self._dense_step(self._params, self._opt_state, self._patterns))

    def compact_step(self) -> None:
        self._values, self._compact_state = jax.block_until_ready(
            self._compact_step(self._values, self._compact_state, self._layout)
        )

    def dense_update(self) -> None:
        grads = jax.tree.map(jnp.ones_like, self._params)
        _, state = jax.block_until_ready(self._update(grads, self._opt_state, self._params))
        jax.block_until_ready(self._patterns_of(state))

    def compact_update(self) -> None:
        scores = None if self._rule.grow is sj.criteria.random else self._scores
        plan = sj.compact.plan(self._values, self._layout, scores, 1, jax.random.key(0), self._rule)
        sj.compact.fits(plan, self._layout)
        jax.block_until_ready(self._move((self._values, self._compact_state), plan))


def _turns(one: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of their ratio within a round."""
    seconds = []
    for i in range(rounds + 2):
        row = []
        for run in (one, other):
            begin = time.perf_counter()
            run()
            row.append(time.perf_counter() - begin)
        if i >= 2:
            seconds.append(row)
    a = np.array(seconds)
    return float(np.median(a[:, 0])), float(np.median(a[:, 1])), float(np.median(a[:, 1] / a[:, 0]))


def speed(rounds: int) -> str:
    """The table of seconds, in markdown."""
    lines = [
        '| network, method, 5% | step, dense storage | compact | ratio | mask update, dense storage | compact | ratio |',
        '|---|---:|---:|---:|---:|---:|---:|',
    ]
    for name, shape, batch in (
        ('lenet300', (28, 28, 1), 100),
        ('vgg_d', (32, 32, 3), 64),
        ('wrn_16_8', (32, 32, 3), 64),
        ('transformer', (128,), 16),
    ):
        for method in ('rigl', 'sparse_momentum') if name == 'vgg_d' else ('rigl',):
            network = Network(name, shape, batch, method, 0.05)
            step = _turns(network.dense_step, network.compact_step, rounds)
            update = _turns(network.dense_update, network.compact_update, max(3, rounds // 3))
            cells = [
                f'{1e3 * step[0]:.1f} ms',
                f'{1e3 * step[1]:.1f} ms',
                f'{step[2]:.2f}',
                f'{1e3 * update[0]:.0f} ms',
                f'{1e3 * update[1]:.0f} ms',
                f'{update[2]:.2f}',
            ]
            lines.append(f'| {name}, {method} | {" | ".join(cells)} |')
            print(lines[-1], flush=True)
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=('memory', 'speed'), default='', help='one table')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--figure', type=pathlib.Path, help='file to draw the memory into')
    args = parser.parse_args()
    if args.only != 'speed':
        rows = memory()
        print(table(rows), flush=True)
        if args.figure:
            draw(rows, args.figure)
    if args.only != 'memory':
        print(speed(args.rounds))


if __name__ == '__main__':
    allocator.keep_memory()
    main()
