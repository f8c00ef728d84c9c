"""Lottery tickets: train, prune a part of the weights, rewind the others to an early step, again, until 5% are left.

    python examples/lottery.py

Run it in the repository, with ``.venv/bin/python`` after ``make train``, or with any Python after ``pip install '.[train]'``.

Six trainings of 400 steps, where sparse momentum and RigL take one. Cost: half a minute on a CPU. Reference: Frankle et al., Linear mode
connectivity and the lottery ticket hypothesis, 2020.
"""

import jax
import jax.numpy as jnp
import optax

import sparse_jax as sj
from sparse_jax import data, models

digits = data.load('mnist_offline', 'data/mnist')
network = models.create('lenet300', input_shape=(28, 28, 1), num_outputs=10)
density, rounds, steps, rewind_step = 0.05, 5, 400, 40

# A fixed mask, and whichever is given to the state: one program for all rounds.
tx = sj.methods.static(optax.adam(2e-3), density=density, update_every=steps, total_steps=steps)


def loss(params, batch):
    logits, _ = network.apply(params, {}, batch['input'], train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()


@jax.jit
def step(params, opt_state, batch):
    updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train(params, masks, start):
    """The params after each step from this one on, under a mask."""
    params, opt_state = sj.apply_masks(params, masks), sj.set_masks(tx.init(params), masks)
    for batch in list(data.batches(digits, batch_size=100, seed=0, num_batches=steps))[start:]:
        params, opt_state = step(params, opt_state, batch)
        yield params


start, _ = network.init(jax.random.key(0))
everything, masks = sj.prune(start, 1.0)
*trained, params = train(everything, masks, 0)
rewound = trained[rewind_step - 1]
for i in range(1, rounds + 1):
    _, masks = sj.prune(params, density ** (i / rounds), prune_scope='global')
    *_, params = train(rewound, masks, rewind_step)
    logits, _ = network.apply(params, {}, digits.test.inputs, train=False)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == digits.test.labels)
    print(f'round {i}: {density ** (i / rounds):.1%} of the weights, test accuracy {accuracy:.1%}')

nonzeros, size = sum(sj.stats.nonzeros(masks).values()), sum(mask.size for mask in jax.tree.leaves(masks) if mask.ndim)
print(f'all {nonzeros} {size} {nonzeros / size:.2%}')
