"""Eight sparse networks at once under jax.vmap, each with masks of its own.

    python examples/ensemble.py

Run it in the repository, with ``.venv/bin/python`` after ``make train``, or with any Python after ``pip install '.[train]'``.

The count of steps is one for all members: batched, it would turn the condition around a mask update into a select, and every step would
take as long as an update. The example prints both. Cost: half a minute on a CPU.
"""

import time

import jax
import jax.numpy as jnp
import optax

import sparse_jax as sj
from sparse_jax import data

MEMBERS, STEPS, EVERY = 8, 400, 40
digits = data.load('mnist_offline', 'data/mnist')


def optimizer(seed=0):
    return sj.sparse_momentum(0.05, density=0.1, update_every=EVERY, total_steps=STEPS, seed=seed)


def init(key):
    keys = jax.random.split(key, 3)
    shapes = {'hidden': (784, 64), 'out': (64, 10)}
    params = {name: jax.random.normal(k, s) * s[0] ** -0.5 for k, (name, s) in zip(keys, shapes.items(), strict=False)}
    state = optimizer(seed=keys[2]).init(params)  # a key a member: first masks of its own
    return sj.apply_masks(params, state.masks), state


def logits(params, x):
    return jax.nn.relu(x.reshape(len(x), -1) @ params['hidden']) @ params['out']


def step(params, state, x, y):
    loss = lambda p: optax.losses.softmax_cross_entropy_with_integer_labels(logits(p, x), y).mean()
    updates, state = optimizer().update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


params, states = jax.jit(jax.vmap(init))(jax.random.split(jax.random.key(0), MEMBERS))
states = states._replace(count=jnp.int32(0))
axes = jax.tree.map(lambda _: 0, states)._replace(count=None)
train = jax.jit(jax.vmap(step, in_axes=(0, axes, None, None), out_axes=(0, axes)))

batches = list(data.batches(digits, batch_size=100, seed=0, num_batches=STEPS))
for batch in batches:
    params, states = train(params, states, batch['input'], batch['label'])

batched = jax.jit(jax.vmap(step, in_axes=(0, 0, None, None)))
per_member = states._replace(count=jnp.full(MEMBERS, 1, jnp.int32))
for name, run, state in (('one count', train, states._replace(count=jnp.int32(1))), ('a count a member', batched, per_member)):
    times = []
    for batch in batches[:10]:
        start = time.perf_counter()
        jax.block_until_ready(run(params, state, batch['input'], batch['label']))
        times.append(time.perf_counter() - start)
    print(f'{name}: {1e3 * sorted(times)[5]:.2f} ms a step')

for i in range(MEMBERS):
    member, masks = jax.tree.map(lambda x, i=i: x[i], (params, states.masks))
    accuracy = jnp.mean(jnp.argmax(logits(member, digits.test.inputs), axis=-1) == digits.test.labels)
    print(f'member {i}: test accuracy {accuracy:.1%}')
print(sj.stats.table(jax.tree.map(lambda x, i=i: x if x.ndim == 0 else x[i], states)))
