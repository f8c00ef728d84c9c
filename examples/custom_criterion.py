"""A custom growth criterion on a plain dict of weights: grow where the momentum is large and the inputs are in use.

    python examples/custom_criterion.py

Run it in the repository, with ``.venv/bin/python`` after ``make train``, or with any Python after ``pip install '.[train]'``.

A criterion is a function of one layer's weight, mask, gradient and momentum that returns scores of the layer's shape. Cost: ten
seconds on a CPU.
"""

import jax
import jax.numpy as jnp
import optax

import sparse_jax as sj
from sparse_jax import data


def momentum_of_used_inputs(info: sj.criteria.LeafInfo) -> jax.Array:
    """|momentum|, doubled where the input already has a weight: inputs that matter gather weights."""
    used = info.mask.any(axis=-1, keepdims=True)  # the last axis is the outputs
    return jnp.abs(info.momentum) * (1.0 + used)


digits = data.load('mnist_offline', 'data/mnist')
keys = jax.random.split(jax.random.key(0), 2)
params = {
    'hidden': jax.random.normal(keys[0], (784, 300)) / 28,
    'out': jax.random.normal(keys[1], (300, 10)) / 17,
    'bias': jnp.zeros(10),
}


def logits(params, images):
    return jax.nn.relu(images.reshape(len(images), -1) @ params['hidden']) @ params['out'] + params['bias']


def loss(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch['input']), batch['label']).mean()


steps = 600
tx = sj.sparsify(
    optax.sgd(0.1, 0.9),
    density=0.05,
    update_every=40,
    total_steps=steps,
    grow=momentum_of_used_inputs,
)
opt_state = tx.init(params)
params = sj.apply_masks(params, sj.get_masks(opt_state))


@jax.jit
def step(params, opt_state, batch):
    updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


for batch in data.batches(digits, batch_size=100, seed=0, num_batches=steps):
    params, opt_state = step(params, opt_state, batch)

sj.check_sparse(params, opt_state)
accuracy = jnp.mean(jnp.argmax(logits(params, digits.test.inputs), axis=-1) == digits.test.labels)
print(sj.stats.table(opt_state))
print(f'test accuracy {accuracy:.1%}')
