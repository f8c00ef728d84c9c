"""A Transformer of 1.5 billion weights, 5% of which exist, trained where the dense one has no room: compact storage in a loop of one's own.

    python -m benchmarks.steps.compact_transformer                            # 20 steps, six minutes on two CPU cores
    python -m benchmarks.steps.compact_transformer --depth=2 --features=128   # a small one, in seconds

Weights, gradients and Adam's moments are of existing weights only, from the first step on: see sj.compact. Every fifth step RigL moves
weights of some leaves, which take turns, to where the gradients of missing ones are largest. The text is Python's own standard library, by bytes. --dense says what the dense
network's step takes by XLA's count; it is compiled, and not run.
"""

import argparse
import functools
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax as sj
from sparse_jax import data, models
from sparse_jax.core import layers as layers_lib


def dense_bytes(model: models.Model, shape: tuple[int, int]) -> int:
    """Bytes of the dense step of the same network with the same optimizer: arguments, results that are no arguments, and temporaries."""
    tx = optax.adamw(3e-4)

    def step(params, opt_state, tokens, labels):
        def loss(params):
            logits, _ = model.apply(params, {}, tokens, train=True, rng=None)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = jax.eval_shape(lambda: model.init(jax.random.key(0))[0])
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), tokens, tokens)
    counted: Any = lowered.compile().memory_analysis()
    return counted.argument_size_in_bytes + counted.output_size_in_bytes - counted.alias_size_in_bytes + counted.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(depth=30, features=2048, heads=16, length=128, batch=4, steps=20, every=5, groups=4).items():
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--density', type=float, default=0.05)
    parser.add_argument('--dense', action='store_true')
    args = parser.parse_args()

    text = data.load('stdlib', length=args.length, validation=0.02)
    options = dict(depth=args.depth, features=args.features, heads=args.heads)
    model = models.create('transformer', input_shape=(args.length,), num_outputs=text.num_outputs, **options)
    if args.dense:
        print(f'the dense network: {dense_bytes(model, (args.batch, args.length)) / 2**30:.1f} GiB')
        return
    rule = sj.methods.rule(
        'rigl',
        density=args.density,
        update_every=args.every,
        total_steps=2 * args.steps,
        stacked=model.stacked,
        distribution='uniform',
    )
    values, layout = sj.compact.init(lambda: model.init(jax.random.key(0))[0], rule)
    tx = sj.compact.check(optax.adamw(3e-4), values, layout)
    opt_state = jax.jit(tx.init)(values)

    def loss(values, probes, layout, tokens, labels):
        patterns = sj.compact.with_probes(layout, probes)
        logits, _ = model.apply(values, {}, tokens, train=True, rng=None, patterns=patterns)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(values, opt_state, layout, probes, tokens, labels):
        (value, (grads, scores)) = jax.value_and_grad(loss, (0, 1))(values, probes, layout, tokens, labels)
        updates, opt_state = tx.update(grads, opt_state, values)
        return optax.apply_updates(values, updates), opt_state, value, scores

    move = jax.jit(sj.compact.move, donate_argnums=0)
    whole = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(jax.eval_shape(lambda: model.init(jax.random.key(0))[0])))
    held = sum(x.nbytes for x in jax.tree.leaves((values, opt_state, layout))) + sum(x.nbytes for x in jax.tree.leaves(values))
    print(
        f'{whole:,} weights: with gradients and moments 16 bytes each, {16 * whole / 2**30:.1f} GiB, if they were dense; {held / 2**30:.2f} GiB as it is'
    )
    names = [path for path, mask in layers_lib.leaf_paths(jax.eval_shape(lambda: sj.compact.masks(layout))) if mask.ndim]
    random, none = np.random.default_rng(0), sj.compact.probes(layout, leaves=lambda path: False)
    for t in range(1, args.steps + 1):
        rows = random.integers(len(text.train.labels), size=args.batch)
        is_update = rule.timing.is_update(t)
        turn = t // args.every % args.groups
        probes = (
            sj.compact.probes(layout, leaves=lambda path, turn=turn: names.index(path) % args.groups == turn) if is_update else none
        )
        begin = time.perf_counter()
        batch = jnp.asarray(text.prepare(text.train.inputs[rows])), jnp.asarray(text.train.labels[rows], jnp.int32)
        values, opt_state, value, scores = step(values, opt_state, layout, probes, *batch)
        if is_update:
            plan = sj.compact.plan(values, layout, scores, t, jax.random.key(1), rule)
            if not sj.compact.fits(plan, layout):  # of single layers the budget of RigL stays: it always fits
                (values, opt_state), layout = sj.compact.reserve((values, opt_state), layout, plan)
                plan = sj.compact.plan(values, layout, scores, t, jax.random.key(1), rule)
            del scores, probes
            values, opt_state = move((values, opt_state), plan)
            layout = plan.layout
        note = f'  {int(plan.stats.grown.sum()):,} weights have moved' if is_update else ''
        print(f'step {t}: loss {float(value):.4f}, {time.perf_counter() - begin:.1f} s{note}', flush=True)
    print(f'peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB')


if __name__ == '__main__':
    main()
