"""The cost of sparsity in the optimizer: an ordinary step against the dense optimizer's, and a mask update against argsort.

    python -m benchmarks.optimizer_step

A tree of 25 million float32 weights, `tx.update` and `apply_updates` in one jit, the state donated, SGD with momentum and weight
decay. The rivals take turns in one process; each figure is the median over rounds of the ratio within a round. Cost: two minutes.
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


def _time(function) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


@jax.jit
def _argsort_update(params, momenta, masks):
    """Prune half and regrow in each layer by two argsorts a layer: what libraries without exact selection do."""

    def one(p, m, mask):
        k = mask.sum() // 2
        by_size = jnp.argsort(jnp.where(mask, jnp.abs(p), jnp.inf).reshape(-1))
        kept = mask.reshape(-1) & ~jnp.zeros(mask.size, bool).at[by_size].set(jnp.arange(mask.size) < k)
        by_momentum = jnp.argsort(jnp.where(kept, -jnp.inf, jnp.abs(m).reshape(-1)), descending=True)
        return (kept | jnp.zeros(mask.size, bool).at[by_momentum].set(jnp.arange(mask.size) < k)).reshape(mask.shape)

    return jax.tree.map(one, params, momenta, masks)


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
            times[name].append(_time(lambda n=name: [advance(n) for _ in range(3)][-1]) / 3)
    dense, ordinary = (np.array(times[name][2:]) for name in ('dense', 'sparse'))

    updates, sorts = [], []
    for _ in range(3):
        compiled, p, state = runs['sparse']
        runs['sparse'] = [compiled, p, state._replace(count=jnp.int32(update_every - 1))]
        updates.append(_time(lambda: advance('sparse')))
        _, p, state = runs['sparse']
        momenta = state.inner_state[1][0].trace
        jax.block_until_ready(_argsort_update.lower(p, momenta, state.masks).compile())
        sorts.append(_time(lambda p=p, m=momenta, s=state: _argsort_update(p, m, s.masks)))

    million = args.layers * args.side**2 / 1e6
    print(f'{million:.0f}M weights, {args.layers} layers, {jax.devices()[0].device_kind}, jax {jax.__version__}')
    print(f'dense step          {1e3 * np.median(dense):8.1f} ms')
    print(f'sparse step         {1e3 * np.median(ordinary):8.1f} ms   {np.median(ordinary / dense):.2f}x the dense step')
    print(f'mask update step    {1e3 * np.median(updates[1:]):8.1f} ms')
    ratio = np.median(np.array(sorts[1:]) / np.array(updates[1:]))
    print(f'argsort mask update {1e3 * np.median(sorts[1:]):8.1f} ms   {ratio:.1f}x the mask update step')


if __name__ == '__main__':
    main()
