"""Training steps of networks of one's own, through kernels.Runner and sj.nnx, beside the same network as XLA compiles it.

    python -m benchmarks.steps.own_loop

The networks are in flax.nnx: a CNN 3-64-128-128-256 on 32x32 images, and an MLP 784-2048-2048-10; both at 5% with sparse momentum. The rival
is the dense network with SGD and momentum. Prints a table in markdown: milliseconds of an ordinary step and of one in the window of dense
gradients, medians of steps that take turns, and the ratio of an average step in 540 of which 22 are in the window.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparse_jax as sj

_EVERY, _WINDOW, _STEPS = 540, 22, 54_000


class CNN(nnx.Module):
    """3-64-128-128-256, 3x3, stride 2 from the second layer on."""

    def __init__(self, rngs: nnx.Rngs):
        channels = (3, 64, 128, 128, 256)
        pairs = list(itertools.pairwise(channels))
        self.convs = nnx.List([nnx.Conv(*pair, (3, 3), strides=2 if i else 1, rngs=rngs) for i, pair in enumerate(pairs)])
        self.out = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.out(x.mean((1, 2)))


class MLP(nnx.Module):
    """784-2048-2048-10."""

    def __init__(self, rngs: nnx.Rngs):
        sizes = (784, 2048, 2048, 10)
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def stepper(model: Any, tx: optax.GradientTransformation) -> Callable[[Any, Any, Any, Any], Any]:
    """The jitted step as a function of arrays: (params, opt_state, batch, patterns) to the first two."""
    graph, _, others = nnx.split(model, nnx.Param, ...)

    def step(params, opt_state, x, y, patterns):
        def loss(params):
            net = nnx.merge(graph, params, others)
            if patterns is not None:
                sj.nnx.set_patterns(net, patterns)
            return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step, donate_argnums=(0, 1))


def measure(network: type, shape: tuple[int, ...], batch: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of steps: dense, sparse, and sparse in the window; they take turns."""
    random = np.random.default_rng(0)
    x, y = jnp.asarray(random.standard_normal((batch, *shape), np.float32)), jnp.asarray(random.integers(0, 10, batch))
    dense, timing = network(nnx.Rngs(0)), sj.Timing(update_every=_EVERY, total_steps=_STEPS)
    sparse = sj.nnx.sparsify(dense)
    plain = optax.sgd(0.01, momentum=0.9, nesterov=True)
    tx = sj.sparsify(plain, density=0.05, timing=timing)
    state = tx.init(nnx.state(sparse, nnx.Param))
    sj.nnx.apply_masks(sparse, state)
    runner = sj.nnx.runner(sparse, state, timing, x)
    copied = lambda model: jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    contenders = {
        'dense': [stepper(dense, plain), copied(dense), plain.init(copied(dense)), None],
        'sparse': [stepper(sparse, tx), copied(sparse), state, runner.patterns_at(0)],
        'window': [stepper(sparse, tx), copied(sparse), jax.tree.map(jnp.copy, state), runner.patterns_at(_EVERY - 1)],
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, contender in contenders.items():
            step, params, opt_state, patterns = contender
            begin = time.perf_counter()
            contender[1:3] = jax.block_until_ready(step(params, opt_state, x, y, patterns))
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - begin))
    for row in runner.table():
        print(f'  {row["layer"]}: {row["implementation"]}', flush=True)
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description='Steps of networks of one own.')
    parser.add_argument('--rounds', type=int, default=20)
    args = parser.parse_args()
    rows = []
    for name, network, shape, batch in (
        ('CNN', CNN, (32, 32, 3), 64),
        ('MLP', MLP, (784,), 16),
        ('MLP', MLP, (784,), 64),
        ('MLP', MLP, (784,), 128),
    ):
        print(f'{name}, batch {batch}:', flush=True)
        took = measure(network, shape, batch, args.rounds)
        average = ((_EVERY - _WINDOW) * took['sparse'] + _WINDOW * took['window']) / _EVERY
        rows.append(
            f'| {name} | {batch} | {took["dense"]:.1f} | {took["sparse"]:.1f} | {took["window"]:.1f} | {took["dense"] / average:.2f}x |'
        )
    print('\n| network | batch | dense, XLA | sparse | in the window | an average step |\n|---|---:|---:|---:|---:|---:|')
    print('\n'.join(rows))


if __name__ == '__main__':
    main()
