"""Compact training: weights, gradients and Adam's moments of the 5% of the weights that exist, and RigL, which moves them.

    python examples/compact_training.py

Run it in the repository, with ``.venv/bin/python`` after ``make train``, or with any Python after ``pip install '.[train]'``.

The network multiplies by ``sj.kernels.sparse_dot(x, values, layout)``. In the steps that move weights a probe is differentiated too, whose
gradient says where missing weights would help. Cost: half a minute on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import sparse_jax as sj
from sparse_jax import data

digits = data.load('mnist_offline', 'data/mnist')
steps = 600
rule = sj.methods.rule('rigl', density=0.05, update_every=20, total_steps=steps)


def make():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        f'layer{i}': {'kernel': jax.random.normal(key, (n, m)) * n**-0.5, 'bias': jnp.zeros(m)}
        for i, (key, n, m) in enumerate(zip(keys, (784, 300, 100), (300, 100, 10), strict=True))
    }


values, layout = sj.compact.init(make, rule)  # a dense tree is never there
tx = sj.compact.check(optax.adam(2e-3), values, layout)  # works element by element
opt_state = tx.init(values)


def logits(values, layout, images):
    x = images.reshape(len(images), -1)
    for name in ('layer0', 'layer1', 'layer2'):
        x = sj.kernels.sparse_dot(x, values[name]['kernel'], layout[name]['kernel']) + values[name]['bias']
        x = x if name == 'layer2' else jax.nn.relu(x)
    return x


def loss(values, probes, layout, batch):
    outputs = logits(values, sj.compact.with_probes(layout, probes), batch['input'])
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch['label']).mean()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(values, opt_state, layout, probes, batch):
    grads, scores = jax.grad(loss, (0, 1))(values, probes, layout, batch)
    updates, opt_state = tx.update(grads, opt_state, values)
    return optax.apply_updates(values, updates), opt_state, scores


move = jax.jit(sj.compact.move, donate_argnums=0)
probes = {True: sj.compact.probes(layout), False: sj.compact.probes(layout, leaves=lambda path: False)}
for t, batch in enumerate(data.batches(digits, batch_size=100, seed=0, num_batches=steps), start=1):
    is_update = rule.timing.is_update(t)
    values, opt_state, scores = step(values, opt_state, layout, probes[is_update], batch)
    if is_update:
        plan = sj.compact.plan(values, layout, scores, t, jax.random.key(1), rule)
        while not sj.compact.fits(plan, layout):  # where budgets move between layers; here each keeps its own
            (values, opt_state), layout = sj.compact.reserve((values, opt_state), layout, plan)
            plan = sj.compact.plan(values, layout, scores, t, jax.random.key(1), rule)
        values, opt_state = move((values, opt_state), plan)
        layout = plan.layout

masks = sj.compact.masks(layout)
nonzeros, size = sum(sj.stats.nonzeros(masks).values()), sum(mask.size for mask in jax.tree.leaves(masks) if mask.ndim)
held = sum(x.nbytes for x in jax.tree.leaves((values, values, opt_state, layout)))
print(f'weights, gradients, moments and lists: {held:,} bytes; of dense arrays {16 * size:,}')
print(f'all {nonzeros} {size} {nonzeros / size:.2%}')
accuracy = jnp.mean(jnp.argmax(logits(values, layout, digits.test.inputs), axis=-1) == digits.test.labels)
print(f'test accuracy {accuracy:.1%}')
