"""The cost of sparsity in the optimizer: an ordinary step of sparse momentum against the dense optimizer's.

    python -m benchmarks.steps.optimizer_step

A tree of 25 million float32 weights, `tx.update` and `apply_updates` in one jit with donated state, SGD with momentum and weight
decay. Both take turns in one process; the result is the median over rounds of the ratio within a round. Steps with a mask update are
measured by benchmarks/steps/mask_update.py. Cost: one minute.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax as sj


def _compile(tx, params, grads):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), grads).compile()


def _seconds(function) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layers', type=int, default=25)
    parser.add_argument('--side', type=int, default=1000, help='each layer is a square matrix of this side')
    parser.add_argument('--rounds', type=int, default=20)
    args = parser.parse_args()

    keys = jax.random.split(jax.random.key(0), args.layers)
    params = {f'layer{i}': jax.random.normal(key, (args.side, args.side)) for i, key in enumerate(keys)}
    grads = jax.tree.map(lambda p: 0.01 * p, params)
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9, nesterov=True))
    update_every = 10**6
    sparse = sj.sparse_momentum(0.1, 0.05, update_every, 10 * update_every, weight_decay=5e-4)

    runs = {}
    for name, tx in {'dense': sgd, 'sparse': sparse}.items():
        state = jax.jit(tx.init)(params)
        start = sj.apply_masks(params, sj.get_masks(state)) if name == 'sparse' else params
        runs[name] = [_compile(tx, params, grads), jax.tree.map(jnp.copy, start), state]

    def advance(name):
        compiled, p, state = runs[name]
        p, state = compiled(p, state, grads)
        runs[name] = [compiled, p, state]
        return p, state

    times = {name: [] for name in runs}
    for _ in range(args.rounds + 2):
        for name in runs:
            times[name].append(_seconds(lambda n=name: [advance(n) for _ in range(3)][-1]) / 3)
    dense, ordinary = (np.array(times[name][2:]) for name in ('dense', 'sparse'))

    million = args.layers * args.side**2 / 1e6
    print(f'{million:.0f}M weights, {args.layers} layers, {jax.devices()[0].device_kind}, jax {jax.__version__}')
    print(f'dense step          {1e3 * np.median(dense):8.1f} ms')
    print(f'sparse step         {1e3 * np.median(ordinary):8.1f} ms   {np.median(ordinary / dense):.2f}x the dense step')


if __name__ == '__main__':
    main()
