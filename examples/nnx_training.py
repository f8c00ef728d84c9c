"""Sparse momentum in a flax.nnx training loop with nnx.Optimizer.

    python examples/nnx_training.py

Run it in the repository, with ``.venv/bin/python`` after ``make train``, or with any Python after ``pip install '.[train]'``.

The masks live in the optimizer's state. The model's weights are masked once, after the optimizer is constructed; from then on every
update keeps them exactly sparse. Cost: fifteen seconds on a CPU.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sparse_jax as sj
from sparse_jax import data


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 16, (5, 5), strides=(2, 2), rngs=rngs)
        self.hidden = nnx.Linear(14 * 14 * 16, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)  # stays dense: its name says so
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x)).reshape(len(x), -1)
        return self.out(nnx.relu(self.norm(self.hidden(x))))


digits = data.load('mnist_offline', 'data/mnist')
steps = 400
model = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, sj.sparse_momentum(0.05, density=0.1, update_every=40, total_steps=steps), wrt=nnx.Param)


def apply_masks(model, optimizer):
    """Sets the model's weights to exact zeros off the masks."""
    nnx.update(model, sj.apply_masks(nnx.state(model, nnx.Param), sj.get_masks(optimizer.opt_state)))


apply_masks(model, optimizer)


@nnx.jit
def step(model, optimizer, batch):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch['input']), batch['label']).mean()

    optimizer.update(model, nnx.grad(loss)(model))


for batch in data.batches(digits, batch_size=100, seed=0, num_batches=steps):
    step(model, optimizer, batch)

sj.check_sparse(nnx.state(model, nnx.Param), optimizer.opt_state)
print(sj.stats.table(optimizer.opt_state))
accuracy = jnp.mean(jnp.argmax(model(jax.device_put(digits.test.inputs)), axis=-1) == digits.test.labels)
print(f'test accuracy {accuracy:.1%}')
