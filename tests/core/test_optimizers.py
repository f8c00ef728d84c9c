"""Every transformation of optax and optax.contrib inside sparsify: it works and grows where gradients are large, or it is refused."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj
from sparse_jax.core import inner as inner_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import momentum as momentum_lib
from tests.core import optimizers

CASES = optimizers.cases()
WORK = [name for name, case in CASES.items() if not case.refused]
pytestmark = pytest.mark.core

SETTINGS = dict(density=0.5, update_every=4, total_steps=1000)
STEPS = 4


def _gradients(params):
    """Of 'a' they fall along the columns, from 1 to 2^-15; those of 'b' are all alike, and smaller."""
    columns = jnp.broadcast_to(2.0 ** -jnp.arange(16.0), (16, 16))
    grads = {'a': columns, 'b': jnp.full((16, 16), 1e-5), 'bias': jnp.full(4, 0.1)}
    return {name: grads[name] for name in params}


def test_every_transformation_of_optax_has_a_case():
    assert set(optimizers.CASES) <= set(optimizers.public()), 'a case for what optax does not have'
    names = list(CASES)
    assert len(names) > 100 and {'optax.adam', 'optax.contrib.adopt', 'optax.contrib.dog', 'optax.monitor'} <= set(names)


def test_the_page_shows_this_table():
    if f'optax {optax.__version__}' not in optimizers.PAGE.read_text():
        pytest.skip('the page is of another version of optax: python -m tests.core.optimizers, and its first lines, make it anew')
    assert optimizers.page_with(optimizers.table()) == optimizers.PAGE.read_text()


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.refused])
def test_refused_with_the_reason(name):
    tx = sj.sparsify(CASES[name].make(), **SETTINGS)
    with pytest.raises(ValueError, match='^inner'):
        tx.init(CASES[name].params)


def _is_a_part(name: str) -> bool:
    rate = inspect.signature(optimizers.public()[name]).parameters.get('learning_rate') if name in optimizers.public() else None
    return rate is None and name not in ('optax.chain', 'optax.masked', 'optax.partition', 'optax.trace')


@functools.cache
def _masks():
    return sj.sparsify(optax.sgd(0.1), **SETTINGS).init(optimizers.PARAMS).masks


# quick: those that people name; slow: what they are made of
@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if _is_a_part(n) else n for n in WORK])
def test_momentum_rises_with_the_gradient(name):
    """What growth and redistribution read of an optimizer never falls where gradients rise, within a layer and between layers."""
    case = CASES[name]
    inner, masks = optax.with_extra_args_support(case.make()), {path: _masks()[path] for path in case.params}
    params = sj.apply_masks(case.params, masks)
    inner_lib.check(inner, params, layers_lib.layer_table(masks, lambda _, mask: mask.ndim > 0, None))
    option, inner_state, grads = inner_lib.facts(inner, params).momentum, inner.init(params), _gradients(params)
    found = momentum_lib.is_found(inner_state, jax.tree.structure(params), option)
    average = None if found else jax.tree.map(lambda m: jnp.zeros(m.shape), masks)

    def step(params, inner_state, average):
        read = momentum_lib.Read(grads, inner_state, average, None, None, params)
        updates, inner_state, average, momentum = momentum_lib.advance(inner, option, read, case.extra(grads))
        params = sj.apply_masks(jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), masks)
        return params, inner_state, average, momentum

    momentum = None
    for _ in range(STEPS):
        params, inner_state, average, momentum = step(params, inner_state, average)
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))
    size = {name: np.abs(np.asarray(momentum[name], np.float64)) for name in 'ab'}
    for smaller, larger in zip(size['a'].T[1:], size['a'].T, strict=False):
        assert (smaller <= 1.01 * larger + 1e-12).all(), 'a smaller gradient has a larger momentum'
    mean = {name: size[name][np.asarray(masks[name])].mean() for name in 'ab'}
    assert mean['b'] <= 1.01 * mean['a'], 'the layer of smaller gradients has the larger share'


@pytest.mark.parametrize('make', [optax.contrib.adopt, pytest.param(optax.lars, marks=pytest.mark.slow)])
def test_growth_and_shares_follow_the_gradients(make):
    """The update itself, for an optimizer whose mu is normalized already, and one that scales layers apart."""
    params = optimizers.PARAMS
    tx = sj.sparsify(make(1e-6), **SETTINGS)
    update, state = jax.jit(tx.update), tx.init(params)
    params = sj.apply_masks(params, state.masks)
    grads = {'a': jnp.where(jnp.arange(16) < 8, 1.0, 1e-9) * jnp.ones((16, 16)), 'b': jnp.full((16, 16), 1e-9), 'bias': jnp.ones(4)}
    for _ in range(STEPS):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    missing = ~np.asarray(state.masks['a'])
    assert state.grown['a'][:, 8:].sum() == 0 or not missing[:, :8].any(), (
        'grown where gradients are small, with room where they are not'
    )
    assert state.stats.share[0] > state.stats.share[1]
    assert sum(sj.stats.nonzeros(state).values()) == 256


def test_of_several_momenta_none_is_taken():
    """Whatever each of them is: one that is normalized already, and one that is not."""
    inner = optax.chain(optax.contrib.scale_by_adopt(), optax.scale_by_lion(), optax.scale(-1e-3))
    params = optimizers.PARAMS
    tx = sj.sparsify(inner, **SETTINGS)
    state = tx.init(params)
    assert list(state.method_state) == ['gradient_average']
    _, state = jax.eval_shape(tx.update, params, state, params)
    assert list(state.method_state) == ['gradient_average']


def test_an_optimizer_that_remembers_its_start_is_given_sparse_params():
    params = {'w': jax.random.normal(jax.random.key(1), (16, 16))}
    for make in (optax.contrib.dog, optax.contrib.dowg, optax.contrib.prodigy):
        tx = sj.methods.static(make(), 0.05, 100, 1000)
        state = tx.init(params)
        sparse = sj.apply_masks(params, state.masks)
        for got, wanted in zip(jax.tree.leaves(state.inner_state), jax.tree.leaves(make().init(sparse)), strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert jax.tree.structure(jax.eval_shape(tx.init, params)) == jax.tree.structure(state)
    optax.tree_map_params(tx, lambda x: x, state)  # init with optax's placeholders
    dog = sj.methods.static(optax.contrib.dog(1.0), 0.05, 100, 1000)
    state = dog.init(params)
    sparse = sj.apply_masks(params, state.masks)
    updates, _ = dog.update({'w': sparse['w'] - 1}, state, sparse)
    assert optax.tree.norm(updates) < 1e-4, 'its first step is as long as the weights have come: not at all'


def test_a_users_optimizer_with_weights_of_its_own_is_refused():
    """An average of weights inside would keep what the masks remove."""

    def average_of_weights(decay):
        init = lambda params: {'average': params}

        def update(updates, state, params):
            average = jax.tree.map(lambda a, p, u: decay * a + (1 - decay) * (p + u), state['average'], params, updates)
            return jax.tree.map(lambda a, p: a - p, average, params), {'average': average}

        return optax.GradientTransformation(init, update)

    tx = sj.sparsify(optax.chain(optax.sgd(0.1), average_of_weights(0.9)), **SETTINGS)
    with pytest.raises(ValueError, match=r"keeps weights of its own, in \[1\]\['average'\]\['a'\] of its state"):
        tx.init(optimizers.PARAMS)


def test_a_frozen_leaf_is_found_out():
    labels = {'a': 'frozen', 'b': 'trained', 'bias': 'trained'}
    parts = lambda trained: optax.partition({'trained': trained, 'frozen': optax.set_to_zero()}, labels)
    with pytest.raises(ValueError, match=r"inner never changes a \(optax.set_to_zero\).*dense=\('a',\).*optax.partition"):
        sj.sparsify(parts(optax.adam(0.1)), **SETTINGS).init(optimizers.PARAMS)
    # the two right ways, and masks that do not move
    for tx in (
        sj.sparsify(parts(optax.adam(0.1)), dense=('a',), **SETTINGS),
        parts(sj.sparsify(optax.adam(0.1), **SETTINGS)),
    ):
        state = tx.init(optimizers.PARAMS)
        assert sj.stats.nonzeros(state) == {'b': 128}
    assert sj.stats.density(sj.methods.static(parts(optax.adam(0.1)), 0.5, 4, 1000).init(optimizers.PARAMS)) == 0.5
