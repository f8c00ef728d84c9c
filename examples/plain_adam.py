"""RigL around Adam on a plain dict of weights, with the multiply-adds that it takes.

    python examples/plain_adam.py

Run it in the repository, with ``.venv/bin/python`` after ``make train``, or with any Python after ``pip install '.[train]'``.

It works with any optax optimizer and any pytree; ``sparse_jax.data`` only provides the digits. Cost: ten seconds on a CPU.
"""

import jax
import jax.numpy as jnp
import optax

import sparse_jax as sj
from sparse_jax import data

digits = data.load('mnist_offline', 'data/mnist')
keys = jax.random.split(jax.random.key(0), 3)
params = {
    f'layer{i}': {'kernel': jax.random.normal(key, (n, m)) * n**-0.5, 'bias': jnp.zeros(m)}
    for i, (key, n, m) in enumerate(zip(keys, (784, 300, 100), (300, 100, 10), strict=True))
}


def logits(params, images):
    x = images.reshape(len(images), -1)
    for name in ('layer0', 'layer1'):
        x = jax.nn.relu(x @ params[name]['kernel'] + params[name]['bias'])
    return x @ params['layer2']['kernel'] + params['layer2']['bias']


def loss(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch['input']), batch['label']).mean()


steps, update_every = 600, 20
tx = sj.methods.rigl(optax.adam(2e-3), 0.05, update_every, steps, track_exploration=True)
opt_state = tx.init(params)
params = sj.apply_masks(params, sj.get_masks(opt_state))


@jax.jit
def step(params, opt_state, batch):
    updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


for batch in data.batches(digits, batch_size=100, seed=0, num_batches=steps):
    params, opt_state = step(params, opt_state, batch)

sj.check_sparse(params, opt_state)
masks = sj.get_masks(opt_state)
print(sj.stats.table(opt_state))
# for a batch of 100; RigL needs the gradients of missing weights only in the step of each update
cost = sj.stats.operations(logits, params, masks, digits.test.inputs[:100], dense_gradient_window=1, update_every=update_every)
print(cost.table())
accuracy = jnp.mean(jnp.argmax(logits(params, digits.test.inputs), axis=-1) == digits.test.labels)
print(f'test accuracy {accuracy:.1%}')
