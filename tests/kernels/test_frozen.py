"""Frozen weights: against float64, in every form; their errors; exported programs."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import export

import sparse_jax as sj
from sparse_jax import kernels, models
from tests.kernels import kernel_cases

IMPLEMENTATIONS = ('reference', 'cpu')


def _masked(seed, shape, density, block=(1, 1)):
    random = np.random.default_rng(seed)
    units = random.random((*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))) < density
    mask = np.repeat(np.repeat(units, block[0], axis=-2), block[1], axis=-1)[..., : shape[-2], : shape[-1]]
    return np.where(mask, random.standard_normal(shape), 0).astype(np.float32), mask


@pytest.fixture(scope='module')
def matrix():
    w, mask = _masked(0, (40, 50), 0.1)
    run = jax.jit(lambda x, weight: kernels.sparse_dot(x, weight, implementation='cpu'))
    return w, kernels.freeze({'w': w}, {'w': mask})['w'], run


@pytest.mark.parametrize('batch', [*range(1, 34), 64, 65, 130, 257, 300, 600])
def test_a_matrix_of_any_batch(matrix, batch):
    w, weight, run = matrix
    x = np.random.default_rng(batch).standard_normal((batch, 40)).astype(np.float32)
    np.testing.assert_allclose(run(x, weight), x.astype(np.float64) @ w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('case', [*kernel_cases.CASES, *kernel_cases.EXTREMES], ids=str)
def test_convolutions_are_those_of_float64(case, implementation):
    strides, padding, dilation, block = case[6], case[7], case[8], case[10]
    x, mask, w, dy = kernel_cases.make(case)
    granularity = 'unstructured' if block is None else f'block:{block[0]}x{block[1]}'
    weight = kernels.freeze(w, mask, granularity=granularity)
    assert weight.values.size >= mask.sum()
    np.testing.assert_array_equal(weight.to_dense(), w)
    y = kernels.sparse_conv(
        jnp.asarray(x), weight, strides=strides, padding=padding, dilation=dilation, implementation=implementation
    )
    expected = kernel_cases.convolution(x, w, dy, strides, padding, dilation)[0]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * max(1e-30, np.abs(expected).max()))


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    shape=st.sampled_from([(1, 1), (33, 17), (300, 64), (1000, 70)]),
    block=st.sampled_from([(1, 1), (8, 4), (16, 32)]),
    batch=st.sampled_from([1, 2, 3, 20]),
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_any_mask(seed, density, shape, block, batch):
    block = block if shape[0] >= block[0] and shape[1] >= block[1] else (1, 1)
    w, mask = _masked(seed, shape, density, block)
    weight = kernels.freeze(w, mask, granularity='unstructured' if block == (1, 1) else f'block:{block[0]}x{block[1]}')
    x = np.random.default_rng(seed).standard_normal((batch, shape[0])).astype(np.float32)
    expected = x.astype(np.float64) @ w
    for implementation in IMPLEMENTATIONS:
        y = kernels.sparse_dot(jnp.asarray(x), weight, implementation=implementation)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.sqrt(shape[0]))


def test_layers_in_rows_are_scanned():
    w = np.stack([_masked(0, (20, 30), 0.1)[0], _masked(1, (20, 30), 0.4)[0]])
    weight = kernels.freeze({'w': w}, {'w': w != 0}, stacked=lambda path, leaf: True)['w']
    assert weight.shape == w.shape and weight.values.shape == (2, max(np.count_nonzero(w, axis=(1, 2))))
    np.testing.assert_array_equal(weight.to_dense(), w)
    x = np.ones((3, 20), np.float32)
    _, y = jax.lax.scan(lambda carry, row: (carry, kernels.sparse_dot(carry, row)), jnp.asarray(x), weight)
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r'holds several layers.*as lax\.scan does'):
        kernels.sparse_dot(jnp.asarray(x), weight)


@pytest.mark.parametrize('name', ['lenet5', 'vgg_like'])
def test_a_model_takes_frozen_params(name):
    shape = (28, 28, 1) if name == 'lenet5' else (32, 32, 3)
    model = models.create(name, input_shape=shape, num_outputs=10)
    params, state = model.init(jax.random.key(0))
    tx = sj.sparse_momentum(0.1, density=0.2, update_every=10, total_steps=100)
    opt_state = tx.init(params)
    params = sj.apply_masks(params, sj.get_masks(opt_state))
    frozen = kernels.freeze(params, opt_state)
    x = jax.random.normal(jax.random.key(1), (3, *shape))
    expected = model.apply(params, state, x, train=False)[0]
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(
        jax.jit(lambda p, x: model.apply(p, state, x, train=False)[0])(frozen, x), expected, rtol=1e-4, atol=1e-5
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.float32]
    assert sum(sizes) < 0.25 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_transformer_takes_frozen_params():
    model = models.create('transformer', input_shape=(16,), num_outputs=32, features=32, depth=2, heads=2)
    params, state = model.init(jax.random.key(0))
    tx = sj.sparse_momentum(0.1, density=0.2, update_every=10, total_steps=100, stacked=model.stacked)
    opt_state = tx.init(params)
    params = sj.apply_masks(params, sj.get_masks(opt_state))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 32)
    expected = model.apply(params, state, tokens, train=False)[0]
    assert np.abs(expected).max() > 1e-3
    got = model.apply(kernels.freeze(params, opt_state), state, tokens, train=False)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_dense_leaves_and_other_shapes_stay_as_they_are():
    params = {'w': np.eye(4, dtype=np.float32), 'dense': np.ones((2, 2), np.float32), 'deep': np.ones((2, 2, 2), np.float32)}
    frozen = kernels.freeze(params, {'w': np.eye(4, dtype=bool), 'dense': np.array(True), 'deep': np.ones((2, 2, 2), bool)})
    assert frozen['dense'] is params['dense'] and frozen['deep'] is params['deep']
    assert isinstance(frozen['w'], kernels.CompactWeight) and frozen['w'].dtype == jnp.float32


def test_what_is_not_exact_is_refused():
    w, mask = _masked(0, (8, 8), 0.5)
    with pytest.raises(ValueError, match=r'w has \d+ weights off its mask.*apply it first, with sj.apply_masks'):
        kernels.freeze({'w': np.ones((8, 8), np.float32)}, {'w': mask})
    with pytest.raises(ValueError, match='masks must be a tree like params'):
        kernels.freeze({'w': w}, {'v': mask})
    with pytest.raises(ValueError, match=r'w has shape \(8, 8\), its mask has shape \(4, 4\)'):
        kernels.freeze({'w': w}, {'w': mask[:4, :4]})
    with pytest.raises(ValueError, match='does not consist of whole'):
        kernels.freeze({'w': w}, {'w': mask}, granularity='block:4x4')
    with pytest.raises(ValueError, match='w is traced'):
        jax.jit(lambda w: kernels.freeze({'w': w}, {'w': mask}))(w)
    tx = sj.sparse_momentum(0.1, density=0.5, update_every=10, total_steps=100)
    with pytest.raises(ValueError, match='freeze: the state knows granularity'):
        kernels.freeze({'w': w}, tx.init({'w': w}), granularity='block:4x4')


def test_what_does_not_fit_is_told():
    w, mask = _masked(0, (8, 6), 0.5)
    weight, x = kernels.freeze(w, mask), jnp.ones((2, 8))
    for message, call in (
        (r'x of shape \(2, 3\) has 3 features, w of shape \(8, 6\) takes 8', lambda: kernels.sparse_dot(jnp.ones((2, 3)), weight)),
        ('x and w must be of one floating-point type', lambda: kernels.sparse_dot(x.astype('bfloat16'), weight)),
        ('pass neither pattern nor dense_gradient', lambda: kernels.sparse_dot(x, weight, kernels.make_pattern(mask))),
        ('w must have 4 axes', lambda: kernels.sparse_conv(jnp.ones((1, 4, 4, 8)), weight)),
        (
            '7 pointers',
            lambda: kernels.sparse_dot(
                x, dataclasses.replace(weight, layout=dataclasses.replace(weight.layout, pointers=jnp.zeros(3, 'int32')))
            ),
        ),
        ('pattern must come from make_pattern', lambda: kernels.sparse_dot(x, jnp.asarray(w))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for implementation in IMPLEMENTATIONS:
        with pytest.raises(NotImplementedError, match='frozen weights are for inference, and have no gradients'):
            jax.vjp(functools.partial(kernels.sparse_dot, implementation=implementation), x, weight)
    with pytest.raises(NotImplementedError, match="implementation='gpu' does not run here"):
        kernels.sparse_dot(x, weight, implementation='gpu')


@pytest.mark.parametrize('place', ['indices', 'pointers'])
def test_lists_of_another_weight_do_no_harm(place):
    """Memory that is not theirs is neither read nor written; what lists are wrong gives is not defined, but for an error."""
    w, mask = _masked(0, (64, 48), 0.2)
    weight = kernels.freeze(w, mask)
    for value in (-1, 10**6, 2**31 - 1):
        lists = dataclasses.replace(weight.layout, **{place: jnp.full_like(getattr(weight.layout, place), value)})
        for batch in (1, 20):
            run = lambda batch=batch, lists=lists: kernels.sparse_dot(
                jnp.ones((batch, 64)), dataclasses.replace(weight, layout=lists)
            )
            if place == 'indices':
                assert run().shape == (batch, 48)
            else:
                with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match='the pattern does not belong to this weight'):
                    run().block_until_ready()


def test_a_program_for_other_machines_is_exported():
    """The kernel's custom call is of this machine; what was frozen for the reference is plain XLA."""
    w, mask = _masked(0, (20, 30), 0.2)
    x = jnp.ones((4, 20))
    predict = lambda weight, x: kernels.sparse_dot(x, weight)
    portable = kernels.freeze(w, mask, implementation='reference')
    stored = export.export(jax.jit(predict))(portable, x)
    closed = export.export(jax.jit(lambda x: predict(portable, x)))(x).serialize()
    np.testing.assert_allclose(export.deserialize(closed).call(x), x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stored.call(portable, x), x @ w, rtol=1e-5, atol=1e-5)
    own = kernels.freeze(w, mask, implementation='cpu')
    with pytest.raises(ValueError, match='custom calls whose targets have no compatibility guarantees'):
        export.export(jax.jit(lambda x: predict(own, x)))(x)
    check = export.DisabledSafetyCheck.custom_call('sparse_jax_frozen')
    here = export.export(jax.jit(lambda x: predict(own, x)), disabled_checks=[check])(x).serialize()
    np.testing.assert_allclose(export.deserialize(here).call(x), x @ w, rtol=1e-5, atol=1e-5)
