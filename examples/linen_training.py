"""Sparse momentum in a flax.linen training loop with TrainState and a dense last layer.

    python examples/linen_training.py

Run it in the repository, with ``.venv/bin/python`` after ``make train``, or with any Python after ``pip install '.[train]'``.

Cost: ten seconds on a CPU.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import sparse_jax as sj
from sparse_jax import data


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(300, name='hidden')(x))
        return nn.Dense(10, name='out')(x)


digits = data.load('mnist_offline', 'data/mnist')
steps = 600
network = Network()
params = network.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))['params']
tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    sj.sparse_momentum(0.1, density=0.05, update_every=40, total_steps=steps, dense=['out/*']),
)
state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)
state = state.replace(params=sj.apply_masks(state.params, sj.get_masks(state.opt_state)))


@jax.jit
def step(state, batch):
    def loss(params):
        logits = state.apply_fn({'params': params}, batch['input'])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


for batch in data.batches(digits, batch_size=100, seed=0, num_batches=steps):
    state = step(state, batch)

sj.check_sparse(state.params, state.opt_state)
print(sj.stats.table(state.opt_state))
accuracy = jnp.mean(jnp.argmax(network.apply({'params': state.params}, digits.test.inputs), axis=-1) == digits.test.labels)
print(f'test accuracy {accuracy:.1%}')
