"""The cost of the training loop: launch.py's, with progress, metrics, evaluation and checkpoints, against a bare optax loop.

    python -m benchmarks.steps.training_loop

LeNet-300-100 at 5% on the offline digits, 4,000 steps. Both loops run the same steps over the same arrays; the bare one only draws a
batch and calls the jitted step. The first 100 steps, which include the compilation, are not timed. The two take turns, and the result
is the median ratio. Then the loop runs once more without the network, which gives its own work a step. Cost: two minutes.
"""

import argparse
import contextlib
import io
import pathlib
import tempfile
import time
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax as sj
from configs import mnist_lenet300
from sparse_jax import data as data_lib
from sparse_jax import models, train
from sparse_jax.train import metrics, programs

WARM_UP = 100  # steps that are not timed, since they include the compilation


def _bare(config, data, steps: int) -> float:
    """Returns the seconds of the loop that a user would write."""
    model = models.create('lenet300', input_shape=(28, 28, 1), num_outputs=10)
    params, model_state = model.init(jax.random.key(config.seed))
    schedule = optax.exponential_decay(0.1, 2000, 0.1, staircase=True)
    tx = sj.sparse_momentum(schedule, 0.05, 40, steps, weight_decay=5e-4)
    opt_state = tx.init(params)
    params = sj.apply_masks(params, sj.get_masks(opt_state))

    @jax.jit
    def step(params, opt_state, image, label):
        def loss_fn(params):
            logits, _ = model.apply(params, model_state, image, train=True, rng=None)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    images, labels = data.train
    begin = 0.0
    for t in range(steps):
        if t % 40 == 0:
            order = np.random.default_rng((config.seed, t // 40)).permutation(len(labels))
        index = order[t % 40 * 100 : (t % 40 + 1) * 100]
        params, opt_state, loss = step(params, opt_state, images[index], labels[index])
        if t == WARM_UP - 1:
            jax.block_until_ready(loss)
            begin = time.perf_counter()
    jax.block_until_ready(params)
    return time.perf_counter() - begin


def _ours(config, steps: int) -> float:
    """Returns the seconds of launch.py's loop over the same steps, from the metrics that it writes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config.train.steps, config.log.every = steps, WARM_UP
        config.sparsity.dense_gradient_window, config.sparsity.kernels = None, 'dense'  # the bare loop's step
        train.train(config, pathlib.Path(folder) / 'run')
        speeds = [row['steps_per_second'] for row in metrics.read(pathlib.Path(folder) / 'run') if 'steps_per_second' in row]
    return sum(WARM_UP / speed for speed in speeds[1:])


def _own(config, steps: int) -> float:
    """Seconds a step of launch.py's loop with the network taken out: its program gives back what it got, and everything else runs."""

    def plain(state, batch, patterns, **_):
        del batch, patterns
        return state, {'loss': jnp.float32(0), 'accuracy': jnp.float32(0)}

    program = jax.jit(plain, donate_argnums=0)
    with unittest.mock.patch.object(programs.Programs, '__call__', lambda self, kind, *arguments: program(*arguments)):
        config.sparsity.update_every = steps + 1  # the network's too
        return _ours(config, steps) / (steps - WARM_UP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=4000)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    config = mnist_lenet300.get_config('offline')
    data = data_lib.load(config.data.name, '', download=False, validation=0.0)
    pairs = []
    for _ in range(args.rounds):
        pairs.append((_bare(config, data, args.steps), _ours(mnist_lenet300.get_config('offline'), args.steps)))
    bare, ours = np.array(pairs).T
    own = [_own(mnist_lenet300.get_config('offline'), args.steps) for _ in range(args.rounds)]
    print(
        f"the loop's own work: {1e3 * np.median(own):.3f} ms a step: batches, dispatch, metrics, progress, evaluations, checkpoints"
    )
    print(f'bare loop {np.median(bare):.2f} s, launch.py {np.median(ours):.2f} s: {np.median(ours / bare):.2f}x')


if __name__ == '__main__':
    main()
