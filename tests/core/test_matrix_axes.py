"""Leaves whose inputs and outputs are not their last two axes: the same counts and masks as the same map in the usual layout."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_jax as sj

pytestmark = pytest.mark.core

USUAL = {'a_query': (12, 24), 'b_out': (24, 12), 'c_conv': (3, 3, 4, 8), 'd_fc': (8, 6)}
# The same maps: flax's attention kernels, PyTorch's convolution and linear layer.
OTHER = {'a_query': (12, 4, 6), 'b_out': (4, 6, 12), 'c_conv': (8, 4, 3, 3), 'd_fc': (6, 8)}
AXES = {'a_query': ((0,), (1, 2)), 'b_out': ((0, 1), (2,)), 'c_conv': ((1,), (0,)), 'd_fc': ((1,), (0,))}
GRANULARITIES = {'unstructured': 0.3, 'block:4x3': 0.3, 'block:4x2:kernel': 0.4, 'n_of_m:2:4': 0.5, 'fan_in': 0.3}


def _axes(path, leaf):
    return AXES[path]


def _other(tree):
    """Leaves in the usual layout as they lie in the other one, by numpy."""
    return {
        'a_query': np.asarray(tree['a_query']).reshape(12, 4, 6),
        'b_out': np.asarray(tree['b_out']).reshape(4, 6, 12),
        'c_conv': np.asarray(tree['c_conv']).transpose(3, 2, 0, 1),
        'd_fc': np.asarray(tree['d_fc']).T,
    }


@functools.cache
def _steps(granularity, method):
    options = dict(granularity=granularity, track_exploration=True)
    if granularity != 'n_of_m:2:4' and method == 'rigl':
        options['distribution'] = 'erk'
    make = lambda **more: sj.methods.create(method, optax.sgd(0.1, 0.9), GRANULARITIES[granularity], 2, 9, **options, **more)
    return tuple((jax.jit(tx.init), jax.jit(tx.update)) for tx in (make(), make(matrix_axes=_axes)))


def _cases():
    """Quick are single weights with ERK, and blocks."""
    quick = ('unstructured', 'rigl'), ('block:4x3', 'sparse_momentum')
    pairs = [(granularity, method) for granularity in GRANULARITIES for method in ('sparse_momentum', 'rigl')]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(('granularity', 'method'), _cases())
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
@settings(max_examples=3, deadline=None)
def test_the_same_maps_have_the_same_masks_in_any_layout(granularity, method, seed, ties):
    (init, step), (other_init, other_step) = _steps(granularity, method)
    rng = np.random.default_rng(seed)
    draw = lambda: {name: rng.normal(size=shape).astype(np.float32) for name, shape in USUAL.items()}
    params = draw()
    state, other_state = init(params), other_init(_other(params))
    params = sj.apply_masks(params, sj.get_masks(state))
    others = sj.apply_masks(_other(params), sj.get_masks(other_state))
    for _ in range(4):
        grads = draw()
        grads = jax.tree.map(np.round, grads) if ties else grads
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, other_state = other_step(_other(grads), other_state, others)
        others = optax.apply_updates(others, updates)
        jax.tree.map(np.testing.assert_array_equal, _other(state.masks), other_state.masks)
        jax.tree.map(np.testing.assert_array_equal, _other(params), others)
        jax.tree.map(np.testing.assert_array_equal, state.stats, other_state.stats)
    jax.tree.map(np.testing.assert_array_equal, _other(state.method_state['ever_active']), other_state.method_state['ever_active'])
    assert sj.stats.dead_neurons(state) == sj.stats.dead_neurons(other_state)
    assert sj.stats.dead_neurons(other_state) == sj.stats.dead_neurons(other_state.masks, matrix_axes=_axes)
    assert sj.stats.nonzeros(state) == sj.stats.nonzeros(other_state)


def test_stacked_leaves_are_asked_about_one_layer():
    rng = np.random.default_rng(0)
    usual, other = {'w': rng.normal(size=(3, 12, 24)).astype(np.float32)}, {}
    other['w'] = usual['w'].reshape(3, 12, 4, 6)
    seen = []

    def axes(path, leaf):
        seen.append(leaf.shape)
        return (0,), (1, 2)

    make = lambda **more: sj.sparse_momentum(0.1, 0.3, 1, 9, granularity='fan_in', stacked=lambda *_: True, **more)
    expected, state = make().init(usual), make(matrix_axes=axes).init(other)
    np.testing.assert_array_equal(np.asarray(state.masks['w']).reshape(3, 12, 24), expected.masks['w'])
    assert set(seen) == {(12, 4, 6)}
    assert sj.layer_names(state) == ['w[0]', 'w[1]', 'w[2]']


@pytest.mark.parametrize(
    'granularity', [g if g == 'block:4x2:kernel' else pytest.param(g, marks=pytest.mark.slow) for g in GRANULARITIES]
)
def test_one_shot_pruning(granularity):
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in USUAL.items()}
    _, expected = sj.prune(params, GRANULARITIES[granularity], granularity=granularity)
    _, masks = sj.prune(_other(params), GRANULARITIES[granularity], granularity=granularity, matrix_axes=_axes)
    jax.tree.map(np.testing.assert_array_equal, _other(expected), masks)


def test_attention_of_flax_has_equal_densities_and_blocks():
    """Four maps of 512 to 512: ERK gives them the same number of weights, and blocks of 16x16 fit."""
    x = jnp.ones((1, 3, 512))
    linen = nn.MultiHeadDotProductAttention(num_heads=8, qkv_features=512)
    shapes = {'attention': jax.eval_shape(linen.init, jax.random.key(0), x, x)['params']}
    of_nnx = lambda: nnx.to_pure_dict(nnx.state(nnx.MultiHeadAttention(8, 512, decode=False, rngs=nnx.Rngs(0)), nnx.Param))
    for tree in (shapes, {'attention': jax.eval_shape(of_nnx)}):
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), tree)
        params['attention'] = {name: {'kernel': part['kernel']} for name, part in params['attention'].items()}
        assert params['attention']['query']['kernel'].shape == (512, 8, 64)
        rule = functools.partial(sj.methods.rigl, optax.sgd(0.1), 0.02, 10, 100)
        counts = sj.stats.nonzeros(rule(matrix_axes='flax').init(params))
        assert max(counts.values()) - min(counts.values()) <= 1, counts
        state = rule(matrix_axes='flax', granularity='block:16x16').init(params)
        matrices = [np.asarray(mask).reshape(32, 16, 32, 16) for mask in jax.tree.leaves(sj.get_masks(state))]
        assert all((m.all((1, 3)) == m.any((1, 3))).all() for m in matrices)


def test_kernels_multiply_by_the_pattern_of_the_matrix():
    rng = np.random.default_rng(2)
    params = {'query': {'kernel': rng.normal(size=(16, 4, 8)).astype(np.float32)}}
    state = sj.sparse_momentum(0.1, 0.2, 1, 9, matrix_axes='flax').init(params)
    params = sj.apply_masks(params, sj.get_masks(state))
    pattern = sj.kernels.make_patterns(state)['query']['kernel']
    alone = sj.kernels.make_patterns(sj.get_masks(state), matrix_axes='flax')['query']['kernel']
    np.testing.assert_array_equal(pattern.indices, alone.indices)
    x, w = jnp.asarray(rng.normal(size=(5, 16)), jnp.float32), params['query']['kernel']
    axes = sj.matrix_axes.flax('query/kernel', w)

    def through(w):
        y = sj.kernels.sparse_dot(x, sj.matrix_axes.as_matrix(w, axes), pattern, implementation='reference')
        return jnp.sum(jnp.sin(y))

    value, gradient = jax.value_and_grad(through)(w)
    plain = lambda w: jnp.sum(jnp.sin(jnp.einsum('bi,ihd->bhd', x, w)))
    np.testing.assert_allclose(value, plain(w), rtol=1e-5)
    np.testing.assert_allclose(
        gradient, jnp.where(sj.get_masks(state)['query']['kernel'], jax.grad(plain)(w), 0), rtol=1e-4, atol=1e-5
    )


def test_operations_follow_the_layout():
    params = {'w': jnp.ones((6, 8))}  # [outputs, inputs]
    state = sj.sparse_momentum(0.1, 0.25, 1, 9, matrix_axes='torch').init(params)
    counted = sj.stats.operations(lambda p, x: x @ p['w'].T, params, state, jnp.ones((3, 8)))
    assert (counted.inference, counted.inference_dense) == (3 * 12, 3 * 48)


def test_a_convolution_of_pytorch_has_dead_channels_where_it_has():
    mask = np.ones((5, 4, 3, 3), bool)
    mask[2], mask[:, 1] = False, False
    assert sj.stats.dead_neurons({'w': jnp.asarray(mask)}, matrix_axes='torch') == {'w': (1, 1)}


@pytest.mark.parametrize(
    ('given', 'match'),
    [
        ('keras', "matrix_axes='keras'|unknown|flax"),
        (lambda path: None, r'must be a function \(path, leaf\)'),
        (lambda path, leaf: (0, 1), 'different numbers from 0 to 2'),
        (lambda path, leaf: ((0,), (0, 1)), 'different numbers'),
        (lambda path, leaf: ((0,), (2, 1)), 'rising order'),
        (lambda path, leaf: ((0,), (3,)), 'from 0 to 2'),
        (lambda path, leaf: ((), (0, 1, 2)), 'pair'),
    ],
)
def test_axes_that_are_none_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        sj.sparse_momentum(0.1, 0.3, 1, 9, matrix_axes=given).init({'w': jnp.ones((4, 2, 3))})


def test_what_multiplies_by_the_last_two_axes_says_so():
    params = {'w': jnp.ones((6, 8))}
    state = sj.sparse_momentum(0.1, 0.25, 1, 9, matrix_axes='torch').init(params)
    params = sj.apply_masks(params, sj.get_masks(state))
    with pytest.raises(ValueError, match='not its last two axes'):
        sj.compact.compress(params, state)
    np.testing.assert_array_equal(sj.kernels.freeze(params, state)['w'], params['w'])  # and says so
    with pytest.raises(ValueError, match='matrix_axes'):
        sj.compact.init(lambda: params, sj.methods.rule('rigl', 0.5, 1, 9, matrix_axes='torch'))
    with pytest.raises(ValueError, match='the state knows'):
        sj.kernels.make_patterns(state, matrix_axes='torch')
