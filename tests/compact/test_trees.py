"""Compact trees and optimizers: which optimizers are right, which are refused, and bad input."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj
from sparse_jax.core.granularity import Block, Unstructured
from tests.compact.test_lists import random_mask

OPTIMIZERS = {
    'sgd': optax.sgd(0.1, momentum=0.9, nesterov=True),
    'adam': optax.adam(1e-2),
    'adamw': optax.adamw(1e-2, weight_decay=0.1),
    'lion': optax.lion(1e-3),
    'adagrad': optax.adagrad(0.1),
    'chain': optax.chain(optax.clip(0.5), optax.add_decayed_weights(0.01), optax.rmsprop(1e-2, momentum=0.9)),
    'ema': optax.chain(optax.scale_by_adam(mu_dtype=jnp.bfloat16), optax.scale_by_learning_rate(0.01)),
}


# By an optimised program a reciprocal square root is another instruction in an array's last few entries than before them: a unit in the last
# place. Without optimisations, and in the others, all bits are equal.
ROUNDED = () if os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS') else ('adagrad', 'chain')


def _trees(granularity):
    masks = {'w': random_mask((32, 24), granularity, 0.3, 0), 'bias': np.array(True)}
    random = np.random.default_rng(0)
    draw = lambda: {'w': jnp.asarray(random.standard_normal((32, 24)) * masks['w'], jnp.float32), 'bias': jnp.ones(24)}
    return draw, jax.tree.map(jnp.asarray, masks)


@pytest.mark.parametrize('granularity', (Unstructured(), Block(8, 8)), ids=str)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizers_work_on_values_as_on_whole_arrays(name, granularity):
    draw, masks = _trees(granularity)
    tx, params = OPTIMIZERS[name], draw()
    values, layout = sj.compact.compress(params, masks, granularity=granularity)
    compress = lambda tree: sj.compact.compress(tree, masks, granularity=granularity)[0]
    assert sj.compact.check(tx, values, layout) is tx
    dense_state, state = tx.init(params), tx.init(values)
    step = jax.jit(tx.update)
    for _ in range(4):
        grads = draw()
        updates, dense_state = step(grads, dense_state, params)
        params = sj.apply_masks(optax.apply_updates(params, updates), masks)
        updates, state = step(compress(grads), state, values)
        values = optax.apply_updates(values, updates)
        close = functools.partial(
            np.testing.assert_allclose, rtol=2e-6 if name in ROUNDED else 0, atol=2e-7 if name in ROUNDED else 0
        )
        jax.tree.map(close, sj.compact.expand(values, layout), params)


REFUSED = {
    'muon': (lambda: optax.contrib.muon(1e-2), ''),
    'adafactor': (lambda: optax.adafactor(1e-2), 'updates of the values of w'),
    'adafactor, factored': (lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2), ''),
    'adaptive_grad_clip': (lambda: optax.chain(optax.adaptive_grad_clip(1e-3), optax.sgd(1.0)), 'updates of the values of w'),
    'centralize': (lambda: optax.chain(optax.centralize(), optax.sgd(1.0)), 'updates of the values of w'),
    'sm3': (lambda: optax.sm3(1e-2), ''),
    'flatten': (lambda: optax.flatten(optax.adam(1e-2)), 'cannot be moved with the units'),
    'decay by axes': (
        lambda: optax.adamw(1e-2, weight_decay=0.5, mask=lambda p: jax.tree.map(lambda x: x.ndim == 2, p)),
        'updates of the values of w',
    ),
}


@pytest.mark.parametrize('granularity', (Unstructured(), Block(8, 8)), ids=str)
@pytest.mark.parametrize('name', REFUSED)
def test_optimizers_of_whole_matrices_are_refused(name, granularity):
    make, message = REFUSED[name]
    draw, masks = _trees(granularity)
    values, layout = sj.compact.compress(draw(), masks, granularity=granularity)
    with pytest.raises(ValueError) as error:
        sj.compact.check(make(), values, layout)
    assert str(error.value).startswith('the optimizer does not work element by element: ') and message in str(error.value)


def test_an_optimizer_that_cannot_be_tried_is_told():
    draw, masks = _trees(Unstructured())
    values, layout = sj.compact.compress(draw(), masks)

    def fail(*args, **kwargs):
        raise TypeError('no')

    with pytest.raises(ValueError, match='could not be tried on a small tree of values: TypeError: no'):
        sj.compact.check(optax.GradientTransformation(lambda params: (), fail), values, layout)


def test_a_dense_leaf_may_end_in_the_name_of_a_compact_one():
    params = {'kernel': jnp.eye(6), 'head': {'kernel': jnp.ones((3, 5))}}
    values, layout = sj.compact.compress(params, {'kernel': params['kernel'] != 0, 'head': {'kernel': jnp.array(True)}})
    sj.compact.check(optax.adam(1e-3), values, layout)


def test_norms_of_leaves_are_right():
    draw, masks = _trees(Unstructured())
    values, layout = sj.compact.compress(draw(), masks, granularity='unstructured')
    sj.compact.check(optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(1e-2)), values, layout)
    sj.compact.check(optax.partition({'a': optax.adam(1e-3), 'b': optax.sgd(0.1)}, {'w': 'a', 'bias': 'b'}), values, layout)


def _compress(params, masks, **options):
    return sj.compact.compress(params, masks, **options)


EYE = jnp.eye(4)
WRONG = [
    (lambda: _compress({'w': EYE}, {'v': EYE != 0}), 'masks must be a tree like params'),
    (lambda: _compress({'w': EYE}, {'w': jnp.ones((4, 3), bool)}), 'w has shape (4, 4), its mask has shape (4, 3)'),
    (lambda: _compress({'w': jnp.ones((4, 4))}, {'w': EYE != 0}), 'w has 12 weights off its mask that are not zero'),
    (lambda: _compress({'w': EYE}, {'w': EYE != 0}, granularity='block:2x2'), 'does not consist of whole blocks of 2x2'),
    (
        lambda: _compress({'w': jnp.ones((2, 3, 4))}, {'w': jnp.ones((2, 3, 4), bool)}),
        "Keep it dense (dense=('w',)), reshape it, or say that",
    ),
    (lambda: _compress({'w': EYE}, {'w': EYE != 0}, capacity_factor=0.5), 'capacity_factor=0.5: must be a number of at least 1'),
    (lambda: _compress({'w': EYE}, {'w': EYE != 0}, granularity='block'), 'must be'),
    (lambda: jax.jit(lambda w: _compress({'w': w}, {'w': EYE != 0})[0])(EYE), 'w is traced'),
    (lambda: sj.compact.expand({'w': EYE}, {'w': None}), 'layout has no compact leaf'),
    (
        lambda: sj.compact.expand({'v': jnp.zeros(4)}, _compress({'w': EYE}, {'w': EYE != 0}, capacity_factor=1)[1]),
        'its path ends with no leaf’s path',
    ),
    (lambda: sj.compact.probes({'w': None}), 'layout has no compact leaf'),
    (
        lambda: sj.compact.init(
            lambda: {'w': jnp.ones((2, 3, 4))}, sj.methods.rule('set', density=0.5, update_every=1, total_steps=9)
        ),
        'init: w has layers of shape (2, 3, 4)',
    ),
]


@pytest.mark.parametrize('number', range(len(WRONG)))
def test_bad_input_is_told_in_one_line(number):
    call, message = WRONG[number]
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and '\n' not in str(error.value)


def test_capacities_at_their_ends():
    full, masks = {'w': jnp.ones((4, 4))}, {'w': jnp.ones((4, 4), bool)}
    values, layout = sj.compact.compress(full, masks)
    assert values['w'].shape == (16,), 'no more room than there are units'
    one = {'w': jnp.zeros((4, 4)).at[2, 3].set(5.0)}
    values, layout = sj.compact.compress(one, {'w': one['w'] != 0}, capacity_factor=3)
    assert values['w'].tolist() == [5, 0, 0] and layout['w'].capacity == 3
    y = sj.kernels.sparse_dot(jnp.ones((1, 4)), values['w'], layout['w'])
    assert y.tolist() == [[0, 0, 0, 5]]
    gradient = jax.grad(lambda v: sj.kernels.sparse_dot(jnp.ones((1, 4)), v, layout['w']).sum())(values['w'])
    assert gradient.tolist() == [1, 0, 0]


def test_what_belongs_to_which_leaf():
    params = {'w': jnp.diag(jnp.arange(1.0, 17)), 'bias': jnp.arange(16.0)}  # as many as there are units
    masks = {'w': params['w'] != 0, 'bias': jnp.array(True)}
    values, layout = sj.compact.compress(params, masks, capacity_factor=1)
    rule = sj.methods.rule('set', density=1 / 16, update_every=1, total_steps=9, distribution='uniform')
    plan = sj.compact.plan(values, layout, None, 1, jax.random.key(0), rule)
    moved, state = sj.compact.move((values, optax.adam(1e-3).init(values)), plan)
    np.testing.assert_array_equal(moved['bias'], params['bias'])
    assert (np.asarray(moved['w']) != values['w']).any() and state[0].mu['bias'].shape == (16,)
    for tree, message in (
        ({'other': jnp.zeros(16)}, 'ends with no leaf’s path'),
        ({'mu': {'w': jnp.zeros(3)}}, 'mu/w has shape (3,)'),
    ):
        with pytest.raises(ValueError) as error:
            sj.compact.move((values, tree), plan)
        assert message in str(error.value)


def test_scores_of_a_leaf_used_in_two_products_add_up():
    draw, masks = _trees(Unstructured())
    params = draw()
    values, layout = sj.compact.compress(params, masks)
    x = [jnp.asarray(np.random.default_rng(i).standard_normal((5, 32)), jnp.float32) for i in range(2)]
    dot = functools.partial(sj.kernels.sparse_dot, implementation='reference')
    loss = lambda v, p: sum(jnp.sum(jnp.sin(dot(a, v, layout['w'], probe=p))) for a in x)
    scores = jax.grad(loss, 1)(values['w'], jnp.zeros((32, 24)))
    expected = jax.grad(lambda w: sum(jnp.sum(jnp.sin(a @ w)) for a in x))(params['w'])
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
