"""Fine-tuning under a fixed mask: a dense network is pruned once by magnitude and then trained further with that mask.

    python examples/fixed_mask.py

Run it in the repository, with ``.venv/bin/python`` after ``make train``, or with any Python after ``pip install '.[train]'``.

``sj.methods.static`` never moves a weight, and ``sj.set_masks`` replaces its masks by given ones. Cost: ten seconds on a CPU.
"""

import jax
import jax.numpy as jnp
import optax

import sparse_jax as sj
from sparse_jax import data

digits = data.load('mnist_offline', 'data/mnist')
keys = jax.random.split(jax.random.key(0), 2)
params = {'hidden': jax.random.normal(keys[0], (784, 300)) / 28, 'out': jax.random.normal(keys[1], (300, 10)) / 17}


def logits(params, images):
    return jax.nn.relu(images.reshape(len(images), -1) @ params['hidden']) @ params['out']


def loss(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch['input']), batch['label']).mean()


def accuracy(params):
    return jnp.mean(jnp.argmax(logits(params, digits.test.inputs), axis=-1) == digits.test.labels)


def train(tx, params, opt_state, steps, seed):
    @jax.jit
    def step(params, opt_state, batch):
        updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for batch in data.batches(digits, batch_size=100, seed=seed, num_batches=steps):
        params, opt_state = step(params, opt_state, batch)
    return params, opt_state


dense = optax.sgd(0.1, 0.9)
params, _ = train(dense, params, dense.init(params), steps=300, seed=0)
print(f'dense: test accuracy {accuracy(params):.1%}')

# exactly the largest twentieth of each layer's weights
masks = jax.tree.map(lambda p: sj.selection.select_largest(jnp.abs(p), p.size // 20, jnp.ones(p.shape, bool)), params)
tx = sj.methods.static(optax.sgd(0.05, 0.9), density=0.05)
opt_state = sj.set_masks(tx.init(params), masks)
params = sj.apply_masks(params, masks)
print(f'pruned to 5%: test accuracy {accuracy(params):.1%}')

params, opt_state = train(tx, params, opt_state, steps=300, seed=1)
sj.check_sparse(params, opt_state)
print(sj.stats.table(opt_state))
print(f'fine-tuned under the mask: test accuracy {accuracy(params):.1%}')
