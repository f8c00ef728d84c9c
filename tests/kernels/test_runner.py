"""The runner: what it measures, which patterns it gives at which step, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj

TIMING = sj.Timing(update_every=4, total_steps=12)


def _network(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {'a': jax.random.normal(keys[0], (256, 128)), 'b': jax.random.normal(keys[1], (128, 64)), 'bias': jnp.zeros(64)}
    tx = sj.sparsify(optax.sgd(0.1, momentum=0.9), density=0.05, timing=TIMING, redistribute=None)
    opt_state = tx.init(params)
    return sj.apply_masks(params, sj.get_masks(opt_state)), tx, opt_state


def apply(params, x, patterns):
    x = x @ params['a'] if patterns['a'] is None else sj.kernels.sparse_dot(x, params['a'], patterns['a'])
    x = jax.nn.relu(x)
    x = x @ params['b'] if patterns['b'] is None else sj.kernels.sparse_dot(x, params['b'], patterns['b'])
    return x + params['bias']


X = jnp.ones((32, 256))


def test_the_loop_trains_as_the_dense_one():
    """Patterns follow the masks; with a window the gradients of missing weights are zeros outside of it."""
    params, tx, opt_state = _network()
    runner = sj.kernels.Runner(opt_state, TIMING, apply=apply, example=(params, X), window=2)
    gradients = jax.jit(lambda params, x, patterns: jax.grad(lambda p: jnp.mean(apply(p, x, patterns) ** 2))(params))
    compiled = []
    for step in range(12):
        masks = sj.get_masks(opt_state)
        patterns = runner.patterns_at(step)
        for name in ('a', 'b'):
            if patterns[name] is not None:
                np.testing.assert_array_equal(sj.kernels.arguments.mask_of(patterns[name]), masks[name])
                assert patterns[name].dense_gradient == runner.dense_gradients(step) == (step in (2, 3, 6, 7))
        x = jax.random.normal(jax.random.key(step), X.shape)
        grads = gradients(params, x, patterns)
        dense = jax.grad(lambda p, x=x: jnp.mean(apply(p, x, {'a': None, 'b': None}) ** 2))(params)
        for name in ('a', 'b'):
            whole = patterns[name] is None or runner.dense_gradients(step)
            expected = dense[name] if whole else jnp.where(masks[name], dense[name], 0)
            np.testing.assert_allclose(grads[name], expected, rtol=1e-4, atol=1e-6)
        updates, opt_state = jax.jit(tx.update)(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        runner.update(step + 1, opt_state)
        compiled.append(gradients._cache_size())
    assert compiled[-1] <= 2  # with and without dense gradients
    sj.check_sparse(params, opt_state)


def test_the_table_says_what_was_measured():
    params, _, opt_state = _network()
    rows = {row['layer']: row for row in sj.kernels.Runner(opt_state, TIMING, apply=apply, example=(params, X)).table()}
    assert rows.keys() == {'a', 'b'}
    for row in rows.values():
        assert row['density'] == pytest.approx(0.05, rel=0.5) and {'dense', 'cpu'} == row['seconds'].keys()
        assert row['implementation'] == min(
            row['seconds'], key=lambda name: row['seconds'][name] * (0.95 if name == 'dense' else 1)
        )


def test_named_implementations_and_masks():
    params, _, opt_state = _network()
    named = sj.kernels.Runner(opt_state, TIMING, apply=apply, example=(params, X), implementations={'a': 'reference'})
    assert named.patterns['a'].implementation == 'reference' and named.patterns['b'] is None
    masks = {'a': np.kron(np.eye(8, dtype=bool), np.ones((32, 16), bool)), 'b': np.array(True), 'bias': np.array(True)}
    blocks = sj.kernels.Runner(masks, TIMING, apply=apply, example=(params, X), granularity='block:32x16', implementations='cpu')
    assert blocks.patterns['a'].granularity == sj.granularity.Block(32, 16)
    shapes = jax.eval_shape(lambda: (params, X))
    assert sj.kernels.Runner(opt_state, TIMING, apply=apply, example=shapes, implementations='dense').patterns == dict.fromkeys(
        params
    )


def test_what_does_not_fit_is_told():
    params, _, opt_state = _network()
    make = lambda state=opt_state, timing=TIMING, **options: sj.kernels.Runner(
        state, timing, **(dict(apply=apply, example=(params, X)) | options)
    )
    for message, call in (
        ('timing must be a sj.Timing, got int', lambda: make(timing=4)),
        (r'example must be what apply takes before the patterns: \(params, batch\)', lambda: make(example=(params,))),
        ("implementations='cpuu' does not exist. Did you mean 'cpu'", lambda: make(implementations='cpuu')),
        ('window=-1', lambda: make(window=-1)),
        ('expected the state of an optimizer with sparsify', lambda: make(state=params)),
        ('the state knows granularity', lambda: make(granularity='block:32x32')),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotImplementedError, match="implementations='gpu' does not run here"):
        make(implementations='gpu')
    with pytest.raises(ValueError, match='count=-1'):
        make().dense_gradients(-1)
