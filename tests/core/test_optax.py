"""The optax contract over a table of optimizers: each works inside (or around) sparsify, or is refused with the documented error."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj

pytestmark = pytest.mark.core

SETTINGS = dict(density=0.25, update_every=3, total_steps=20)

# inner optimizer -> where its momentum is: the inner state's, or an average of sparsify's own
INNER = {
    'sgd': (lambda: optax.sgd(0.05), 'own'),
    'sgd momentum': (lambda: optax.sgd(0.05, 0.9), 'inner'),
    'sgd nesterov, weight decay': (
        lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.05, 0.9, nesterov=True)),
        'inner',
    ),
    'adam': (lambda: optax.adam(0.01), 'inner'),
    'adamw': (lambda: optax.adamw(0.01, weight_decay=0.1), 'inner'),
    'adam, bfloat16 mu': (lambda: optax.adam(0.01, mu_dtype=jnp.bfloat16), 'inner'),
    'lion': (lambda: optax.lion(0.02), 'inner'),
    'rmsprop': (lambda: optax.rmsprop(0.02), 'own'),
    'rmsprop momentum': (lambda: optax.rmsprop(0.01, momentum=0.9), 'inner'),
    'novograd': (lambda: optax.novograd(0.01), 'own'),
    'adafactor': (lambda: optax.adafactor(0.01), 'own'),
    'muon': (lambda: optax.contrib.muon(0.01), 'own'),
    'clip and adam': (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)), 'inner'),
    'two traces': (lambda: optax.chain(optax.trace(0.5), optax.sgd(0.01, 0.5)), 'own'),
    'schedule': (lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 20), 0.9), 'inner'),
    'inject_hyperparams': (lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.05, momentum=0.9), 'inner'),
    'partition': (
        lambda: optax.partition({'a': optax.sgd(0.05, 0.9), 'b': optax.adam(0.01)}, {'mu': 'a', 'layers': ['b', 'a'], 'bias': 'b'}),
        'own',
    ),
    'masked': (
        lambda: optax.chain(
            optax.masked(optax.trace(0.9), {'mu': True, 'layers': [True, False], 'bias': True}), optax.scale(-0.02)
        ),
        'own',
    ),
    'MultiSteps': (lambda: optax.MultiSteps(optax.sgd(0.05, 0.9), 2).gradient_transformation(), 'inner'),
    'apply_if_finite': (lambda: optax.apply_if_finite(optax.sgd(0.05, 0.9), 10), 'inner'),
}


def _params():
    keys = jax.random.split(jax.random.key(0), 4)
    return {  # a parameter may be called like an optimizer's field
        'mu': jax.random.normal(keys[0], (12, 8)),
        'layers': [jax.random.normal(keys[1], (8, 6)), jax.random.normal(keys[2], (3, 3, 2, 4))],
        'bias': jax.random.normal(keys[3], (6,)),
    }


def _loss(params, t):
    target = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype).reshape(p.shape) + t), params)
    return sum(jnp.sum((p - x) ** 2) for p, x in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))


def _train(tx, params, steps=10, state=None):
    state = tx.init(params) if state is None else state
    params = sj.apply_masks(params, sj.get_masks(state))

    @jax.jit
    def step(params, state, t):
        updates, state = tx.update(jax.grad(_loss)(params, t), state, params, unexpected=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    for t in range(steps):
        params, state = step(params, state, 0.01 * t)
        sj.check_sparse(params, state)
    return params, state


def _nonzeros(state) -> int:
    return sum(int(m.sum()) for m in jax.tree.leaves(sj.get_masks(state)) if m.ndim)


QUICK = ('sgd', 'adam', 'lion', 'muon', 'partition', 'MultiSteps', 'adam, bfloat16 mu')


@pytest.mark.parametrize('name', [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in INNER])
def test_every_inner_optimizer_trains_sparse(name):
    make, momentum_from = INNER[name]
    tx = optax.with_extra_args_support(sj.sparsify(make(), **SETTINGS))
    params = _params()
    start = tx.init(params)
    before = float(_loss(sj.apply_masks(params, start.masks), 0.0))
    params, state = _train(tx, params)
    assert _nonzeros(state) == round(0.25 * (96 + 48 + 72))
    assert float(_loss(params, 0.1)) < before
    assert bool(state.method_state) == (momentum_from == 'own')
    assert int(state.stats.flipped.sum()) > 0 and float(state.stats.share.sum()) == pytest.approx(1, abs=1e-5)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


def test_adams_momentum_is_normalized():
    tx = optax.adam(0.01)
    params = {'w': jnp.ones((2, 2)), 'nu': jnp.ones(2)}
    _, state = tx.update({'w': jnp.full((2, 2), 3.0), 'nu': jnp.zeros(2)}, tx.init(params))
    found = sj.momentum.find(state, jax.tree.structure(params))
    np.testing.assert_allclose(found['w'], 0.1 * 3 / (np.sqrt(0.001 * 9) + 1e-8), rtol=1e-6)


def test_params_may_be_a_namedtuple_with_an_optimizers_field_names():
    class Params(NamedTuple):
        trace: jax.Array
        mu: jax.Array

    params = Params(jnp.ones((4, 4)), jnp.ones((4, 2)))
    state = optax.adam(0.1).init(params)
    assert sj.momentum.find(state, jax.tree.structure(params)).trace.shape == (4, 4)
    assert _nonzeros(_train(optax.with_extra_args_support(sj.sparsify(optax.adam(0.01), **SETTINGS)), params)[1]) == 6


def test_own_average_is_a_float32_ema_without_debias():
    tx = sj.sparsify(optax.sgd(0.1), density=0.5, update_every=100, total_steps=1000)
    params = {'w': jnp.ones((2, 2), jnp.bfloat16), 'bias': jnp.ones(2)}
    state = tx.init(params)
    for g in (1.0, 2.0):
        _, state = tx.update(jax.tree.map(lambda p, g=g: jnp.full_like(p, g), params), state, params)
    average = state.method_state['gradient_average']
    assert average['w'].dtype == jnp.float32 and average['bias'].shape == ()
    np.testing.assert_allclose(average['w'], 0.9 * 0.1 * 1.0 + 0.1 * 2.0, rtol=1e-6)


def test_momentum_can_be_named_or_computed():
    settings = dict(density=0.5, update_every=1, total_steps=10)
    params = {'w': jnp.ones((4, 4))}
    for momentum in ('nu', lambda state: state[0].mu):
        tx = sj.sparsify(optax.adam(0.1), momentum=momentum, **settings)
        assert _nonzeros(_train(optax.with_extra_args_support(tx), params, steps=3)[1]) == 8
    with pytest.raises(ValueError, match="momentum='velocity' names 0 fields"):
        sj.sparsify(optax.adam(0.1), momentum='velocity', **settings).init(params)
    with pytest.raises(ValueError, match='must return a tree like the params'):
        sj.sparsify(optax.adam(0.1), momentum=lambda state: state, **settings).init(params)


OUTER = {
    'chain with clipping before': lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    'partition': lambda tx: optax.partition({'s': tx, 'd': optax.adam(0.01)}, {'mu': 's', 'layers': ['s', 'd'], 'bias': 'd'}),
    'masked': lambda tx: optax.masked(tx, {'mu': True, 'layers': [True, False], 'bias': False}),
    'MultiSteps': lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 10),
    'with_extra_args_support': optax.with_extra_args_support,
}


@pytest.mark.parametrize('name', OUTER)
def test_sparsify_works_inside(name):
    tx = OUTER[name](sj.sparsify(optax.sgd(0.02, 0.9), **SETTINGS))
    _, state = _train(optax.with_extra_args_support(tx), _params())
    size = 96 + 48 + (0 if name in ('partition', 'masked') else 72)
    assert _nonzeros(state) == round(0.25 * size)


def test_multi_steps_and_apply_if_finite_do_not_count_skipped_steps():
    params = _params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optax.MultiSteps(sj.sparsify(optax.sgd(0.1, 0.9), **SETTINGS), 2)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(3):
        _, state = step(zeros, state, params)
    assert int(state.inner_opt_state.count) == 1

    tx = optax.apply_if_finite(sj.sparsify(optax.sgd(0.1, 0.9), **SETTINGS), 10)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for value in (0.0, jnp.nan, 0.0):
        _, state = step(jax.tree.map(lambda p, v=value: jnp.full_like(p, v), params), state, params)
    assert int(state.inner_state.count) == 2 and int(state.total_notfinite) == 1


@pytest.mark.parametrize('late', [optax.clip(1e-3), optax.add_decayed_weights(0.1), optax.scale(0.5)])
def test_check_sparse_tells_of_a_transformation_in_the_wrong_place(late):
    tx = optax.chain(sj.sparsify(optax.sgd(0.3, 0.9), density=0.25, update_every=1, total_steps=20), late)
    with pytest.raises(ValueError, match=r'weights off the mask are not zero: (layers|mu).*may stand after sparsify'):
        _train(optax.with_extra_args_support(tx), _params())


def test_inject_hyperparams_around_works_with_static_args():
    arguments = dict(density=0.25, update_every=3, total_steps=20)
    with pytest.raises(ValueError, match=r'update_every must be a Python number.*static_args'):
        optax.inject_hyperparams(sj.sparse_momentum)(0.05, **arguments).init(_params())
    static = ('density', 'update_every', 'total_steps', 'prune_rate', 'start_step', 'track_exploration', 'seed')
    tx = optax.inject_hyperparams(sj.sparse_momentum, static_args=static)(0.05, **arguments)
    _, state = _train(tx, _params())
    assert _nonzeros(state) == 54
    assert float(state.hyperparams['learning_rate']) == pytest.approx(0.05)


def test_lookahead_is_refused():
    params = _params()
    inside = sj.sparsify(optax.lookahead(optax.sgd(0.1), 5, 0.5), **SETTINGS)
    with pytest.raises(ValueError, match='optax.lookahead is not supported'):
        inside.init(params)
    tx = optax.lookahead(sj.sparsify(optax.sgd(0.1, 0.9), **SETTINGS), 2, 0.5, reset_state=True)
    params = optax.LookaheadParams.init_synced(params)
    state = tx.init(params)
    with pytest.raises(ValueError, match='the mask of .* not bool'):
        for _ in range(2):
            _, state = tx.update(jax.tree.map(jnp.ones_like, params.fast), state, params)


def test_check_sparse_tells_of_lookahead_outside():
    tx = optax.lookahead(sj.sparsify(optax.sgd(0.1, 0.9), density=0.25, update_every=1, total_steps=50), 4, 0.5)
    fast = _params()
    state = tx.init(optax.LookaheadParams.init_synced(fast))
    params = optax.LookaheadParams.init_synced(sj.apply_masks(fast, sj.get_masks(state)))
    step = jax.jit(lambda p, s: tx.update(jax.grad(_loss)(p.fast, 0.0), s, p))
    with pytest.raises(ValueError, match='weights off the mask are not zero'):
        for _ in range(8):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
            sj.check_sparse(params.fast, state)


def test_bfloat16_params_with_float32_updates_stay_exactly_sparse():
    tx = sj.sparsify(optax.adam(0.01, mu_dtype=jnp.float32), **SETTINGS)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), _params())
    params, state = _train(optax.with_extra_args_support(tx), params)
    assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(params))
    assert _nonzeros(state) == 54
