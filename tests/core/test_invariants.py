"""What holds at every step of any run: exact counts, exact zeros, one compilation, a stable state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparse_jax as sj

pytestmark = pytest.mark.core

SHAPES = {'conv': (3, 3, 2, 8), 'deep': {'w': (24, 16), 'bias': (16,)}, 'head': [(16, 3), (1, 1)]}


def _params(seed, dtype=jnp.float32):
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return jax.tree.unflatten(treedef, [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)])


def _grads(params, t):
    """Gradients that depend on the params, with noise: a quadratic bowl shaken."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), t), len(leaves))
    noise = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, [0.1 * p + n for p, n in zip(leaves, noise, strict=True)])


def _nonzeros(masks) -> int:
    return sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim)


@pytest.mark.parametrize(
    ('dtype', 'density', 'redistribute'),
    [
        (jnp.float32, 0.05, sj.criteria.mean_momentum),
        (jnp.float32, 0.31, None),
        (jnp.float32, 1.0, sj.criteria.mean_momentum),
        (jnp.bfloat16, 0.31, sj.criteria.mean_momentum),
    ],
)
def test_invariants_at_every_step(dtype, density, redistribute, caplog):
    tx = sj.sparsify(
        optax.sgd(0.1, 0.9, nesterov=True),
        density=density,
        update_every=3,
        total_steps=30,
        prune_rate=0.7,
        redistribute=redistribute,
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, t):
        updates, state = tx.update(_grads(params, t), state, params)
        return optax.apply_updates(params, updates), state

    params = _params(0, dtype)
    state = tx.init(params)
    params = sj.apply_masks(params, sj.get_masks(state))
    size = sum(m.size for m in jax.tree.leaves(sj.get_masks(state)) if m.ndim)
    assert _nonzeros(sj.get_masks(state)) == round(density * size)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    with jax.log_compiles(), caplog.at_level('WARNING'):
        params, state = step(params, state, 0)
    once = [r.message for r in caplog.records if 'Finished XLA compilation of jit(step)' in r.message]
    caplog.clear()
    flips = 0
    with jax.log_compiles(), caplog.at_level('WARNING'):
        for t in range(1, 30):
            params, state = step(params, state, jnp.int32(t).item())
            sj.check_sparse(params, state)
            masks = sj.get_masks(state)
            assert _nonzeros(masks) == round(density * size)
            assert jax.tree.structure(masks) == jax.tree.structure(params)
            assert all(m.sum() >= 1 for m in jax.tree.leaves(masks))
            flips += int(state.stats.flipped.sum()) if (t + 1) % 3 == 0 else 0
    compiled = [r.message for r in caplog.records if 'Finished XLA compilation of jit(step)' in r.message]
    assert compiled == [], 'the step was compiled again'
    assert len(once) == 1, 'jax words its message differently now: this test would see nothing'
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert (flips == 0) == (density == 1.0), 'weights must move, unless all exist'


def test_eval_shape_scan_and_loop_agree():
    tx = sj.sparse_momentum(0.05, density=0.2, update_every=4, total_steps=21, weight_decay=1e-3)
    params = _params(1)
    abstract = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    params = sj.apply_masks(params, sj.get_masks(state))

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(_grads(params, t), state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, scanned_state), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(20)))((params, state))
    jitted, carry = jax.jit(lambda c, t: step(c, t)[0]), (params, state)
    for t in range(20):
        carry = jitted(carry, t)
    jax.tree.map(np.testing.assert_array_equal, scanned_state.masks, carry[1].masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), scanned, carry[0])
    assert int(scanned_state.count) == 20


def test_state_maps_as_optax_maps_params():
    """`optax.tree.map_params` calls init with a placeholder: this is how shardings are given to optimizer states."""
    tx = sj.sparse_momentum(0.1, density=0.5, update_every=2, total_steps=10)
    state = tx.init(_params(0))
    marked = optax.tree.map_params(tx, lambda leaf: 'param', state, transform_non_params=lambda leaf: 'other')
    assert set(jax.tree.leaves(marked.masks)) == set(jax.tree.leaves(marked.inner_state[1])) == {'param'}
    assert marked.count == marked.stats.share == 'other'


def test_initial_masks_do_not_look_at_weights_drawn_from_the_same_seed():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {f'w{i}': jax.random.normal(key, (100, 100)) for i, key in enumerate(keys)}
    for seed in (0, jax.random.key(5)):
        masks = sj.get_masks(sj.sparse_momentum(0.1, 0.05, 2, 10, seed=seed).init(params))
        for name, mask in masks.items():  # 500 weights of a standard normal distribution: mean 0, standard error 0.045
            assert abs(float(params[name][mask].mean())) < 0.2


def test_a_key_as_seed_survives_donation():
    tx = sj.sparse_momentum(0.1, 0.5, 2, 10, seed=jax.random.key(1))
    params = {'w': jnp.ones((4, 4))}
    states = [tx.init(params), tx.init(params)]
    donating = jax.jit(lambda s: s._replace(count=s.count + 1), donate_argnums=0)
    donating(states[0])
    assert int(tx.init(params).masks['w'].sum()) == int(donating(states[1]).masks['w'].sum()) == 8


def test_initial_masks_are_a_function_of_the_seed():
    def masks(seed):
        return sj.get_masks(sj.sparse_momentum(0.1, 0.3, 2, 10, seed=seed).init(_params(0)))['conv']

    np.testing.assert_array_equal(masks(3), masks(3))
    assert (masks(3) != masks(4)).any()


@pytest.mark.parametrize('axes', [(4, 2), (1, 8), *(pytest.param(axes, marks=pytest.mark.slow) for axes in ((2, 4), (8, 1)))])
def test_mask_update_is_bit_identical_on_every_mesh_and_gathers_nothing(axes):
    tx = sj.sparsify(
        optax.identity(),
        density=0.1,
        update_every=1,
        total_steps=10,
        momentum=None,
        grow=sj.criteria.momentum,
        prune_rate=lambda t: 0.5,
    )
    params = {'a': jax.random.normal(jax.random.key(0), (64, 128)), 'b': jax.random.normal(jax.random.key(1), (128, 32))}
    grads = jax.tree.map(lambda p: jnp.round(p * 4) / 4, jax.tree.map(lambda p: jnp.roll(p, 1), params))  # ties
    state = tx.init(params)
    params = sj.apply_masks(params, sj.get_masks(state))
    expected = jax.jit(tx.update)(grads, state, params)

    mesh = jax.make_mesh(axes, ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    sharded = NamedSharding(mesh, P('data', 'model'))
    replicated = NamedSharding(mesh, P())
    place = lambda tree: jax.tree.map(
        lambda x: jax.device_put(x, sharded if x.ndim == 2 and x.dtype != jnp.int32 else replicated), tree
    )
    args = place((grads, state, params))
    compiled = jax.jit(tx.update).lower(*args).compile()
    assert 'all-gather' not in compiled.as_text(), 'a sharded leaf is gathered'
    got = compiled(*args)
    jax.tree.map(np.testing.assert_array_equal, got[1].masks, expected[1].masks)
    jax.tree.map(np.testing.assert_array_equal, got[1].stats, expected[1].stats)
    jax.tree.map(np.testing.assert_array_equal, got[0], expected[0])
    assert got[1].masks['a'].sharding.is_equivalent_to(sharded, 2)
