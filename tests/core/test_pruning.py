"""One-shot pruning against numpy, and scores at the start against formulas and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj

pytestmark = pytest.mark.core

SHAPES = {'a': {'kernel': (12, 10), 'bias': (10,)}, 'b': (8, 6), 'stack': (2, 8, 8)}
IS_STACKED = lambda path, leaf: path == 'stack'


def _params(seed=0, shapes=SHAPES):
    random = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def _largest(scores, count):
    """A mask of the largest scores; of equal ones those of the lowest index."""
    flat = np.asarray(scores, np.float64).reshape(-1)
    order = np.lexsort((np.arange(flat.size), -flat))
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(np.shape(scores))


@pytest.mark.parametrize('density', (0.05, 0.3, 1.0))
def test_the_largest_weights_of_each_layer_stay(density):
    params = _params()
    pruned, masks = sj.prune(params, density, stacked=IS_STACKED)
    size = 120 + 48 + 128
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim) == round(density * size)
    np.testing.assert_array_equal(masks['b'], _largest(np.abs(params['b']), int(masks['b'].sum())))
    for i in range(2):
        np.testing.assert_array_equal(masks['stack'][i], _largest(np.abs(params['stack'][i]), int(masks['stack'][i].sum())))
    jax.tree.map(lambda p, w, m: np.testing.assert_array_equal(p, np.where(m, w, 0)), pruned, params, masks)


def test_one_threshold_over_all_layers():
    params = _params()
    params['b'] = params['b'] * 1e-3
    _, masks = sj.prune(params, 0.25, prune_scope='global', stacked=IS_STACKED)
    everything = np.concatenate([np.abs(np.asarray(params['a']['kernel'])).ravel(), np.abs(np.asarray(params['stack'])).ravel()])
    threshold = np.sort(everything)[-(round(0.25 * 296) - 1)]  # one stays in b, whatever its weights
    np.testing.assert_array_equal(masks['a']['kernel'], np.abs(params['a']['kernel']) >= threshold)
    assert int(masks['b'].sum()) == 1 and np.abs(params['b'])[masks['b']] == np.abs(params['b']).max()


def test_each_layer_its_own_density():
    _, masks = sj.prune(_params(), {'a/*': 0.1, '*': 0.5}, stacked=IS_STACKED)
    assert [int(masks['a']['kernel'].sum()), int(masks['b'].sum()), *masks['stack'].sum((1, 2)).tolist()] == [12, 24, 32, 32]


def test_signed_scores_and_ties():
    params = _params()
    scores = jax.tree.map(jnp.zeros_like, params) | {'b': jnp.asarray(np.linspace(-3, 1, 48).reshape(8, 6), jnp.float32)}
    _, masks = sj.prune(params, 0.25, scores=scores, stacked=IS_STACKED)
    np.testing.assert_array_equal(masks['b'], _largest(scores['b'], 12))
    np.testing.assert_array_equal(masks['a']['kernel'], _largest(scores['a']['kernel'], 30)), 'ties by the lowest index'


def test_blocks_go_by_the_mean_of_their_scores():
    params = _params()
    scores = _params(1)
    _, masks = sj.prune(params, 0.25, scores=scores, granularity='block:4x2', stacked=IS_STACKED)
    means = np.asarray(scores['b'], np.float64).reshape(2, 4, 3, 2).mean((1, 3))
    kept = int(masks['b'].sum()) // 8
    np.testing.assert_array_equal(masks['b'], np.kron(_largest(means, kept), np.ones((4, 2), bool)))


def test_rounds_score_what_is_left():
    seen = []

    def scores(params):
        seen.append(int(jnp.sum(params['w'] != 0)))
        return jax.tree.map(jnp.abs, params)

    params = {'w': _params()['b']}
    _, masks = sj.prune(params, 1 / 16, scores=scores, rounds=4)
    assert seen == [48, 24, 12, 6] and int(masks['w'].sum()) == 3
    np.testing.assert_array_equal(masks['w'], _largest(np.abs(params['w']), 3))


def test_a_pruned_network_trains_on_under_its_masks():
    params, masks = sj.prune(_params(), 0.2, stacked=IS_STACKED)
    for tx in (
        sj.methods.static(optax.sgd(0.1), density=0.2, update_every=2, total_steps=10, stacked=IS_STACKED),
        sj.methods.rigl(optax.adam(0.1), density=0.2, update_every=2, total_steps=10, stacked=IS_STACKED),
    ):
        weights, state = params, sj.set_masks(tx.init(params), masks)
        for t in range(4):
            updates, state = tx.update(_params(t + 1), state, weights)
            weights = optax.apply_updates(weights, updates)
        sj.check_sparse(weights, state, density=0.2)


X = jnp.asarray(np.random.default_rng(5).standard_normal((16, 6)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(6).integers(0, 3, 16))


def _apply(params, x):
    return jnp.tanh(x @ params['first']) @ params['second']


def _loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(_apply(params, x), y).mean()


def _network():
    return _params(3, {'first': (6, 5), 'second': (5, 3)})


def test_snip_is_the_change_of_the_loss_to_first_order():
    params = _network()
    scores = sj.saliency.snip(_loss, params, X, Y)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
        x = jnp.asarray(np.asarray(X, np.float64))
        for i, j in ((0, 0), (3, 2), (5, 4)):
            scaled = lambda c, i=i, j=j: float(_loss(wide | {'first': wide['first'].at[i, j].multiply(c)}, x, Y))
            slope = (scaled(1 + 1e-5) - scaled(1 - 1e-5)) / 2e-5  # by the factor c of w: w times the gradient
            assert abs(abs(slope) - float(scores['first'][i, j])) < 1e-6


def test_grasp_is_the_fall_of_the_squared_gradient_to_first_order():
    params, temperature = _network(), 5.0
    scores = sj.saliency.grasp(_apply, params, X, Y, temperature=temperature)
    assert min(float(s.min()) for s in scores.values()) < 0
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
        x = jnp.asarray(np.asarray(X, np.float64))
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(_apply(p, x) / temperature, Y).mean()
        squared = lambda p: sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(jax.grad(loss)(p)))
        for i, j in ((0, 1), (2, 2), (4, 0)):
            scaled = lambda c, i=i, j=j: squared(wide | {'second': wide['second'].at[i, j].multiply(c)})
            slope = (scaled(1 + 1e-5) - scaled(1 - 1e-5)) / 2e-5
            assert abs(slope / 2 - float(scores['second'][i, j])) < 1e-7
    _, masks = sj.prune(params, 0.5, scores=scores, prune_scope='global')
    everything = np.concatenate([np.asarray(scores[k]).ravel() for k in ('first', 'second')])
    np.testing.assert_array_equal(
        np.concatenate([np.asarray(masks[k]).ravel() for k in ('first', 'second')]), _largest(everything, round(0.5 * 45))
    )


def test_synflow_conserves_its_flow_in_each_layer():
    params = _network()
    linear = lambda p, x: x @ p['first'] @ p['second']
    scores = sj.saliency.synflow(linear, params, jax.ShapeDtypeStruct((1, 6), jnp.float32))
    first, second = (np.abs(np.asarray(params[k], np.float64)) for k in ('first', 'second'))
    np.testing.assert_allclose(scores['first'], first * second.sum(1)[None], rtol=1e-5)
    np.testing.assert_allclose(scores['second'], second * first.sum(0)[:, None], rtol=1e-5)
    assert abs(float(scores['first'].sum()) - float(scores['second'].sum())) < 1e-3, 'the same flow through each layer'
    _, masks = sj.prune(params, 0.2, scores=lambda p: sj.saliency.synflow(linear, p, X[:1]), rounds=20, prune_scope='global')
    connected = np.asarray(masks['first']).any(0) & np.asarray(masks['second']).any(1)
    assert connected.any() and sum(int(m.sum()) for m in masks.values()) == 9


WRONG = [
    (dict(density=0.0), 'density=0.0: must be a number in (0, 1]'),
    (dict(density=lambda step: 0.5), 'as weights are pruned now'),
    (dict(density={'a/*': 0.1}), "density says nothing of b, stack: give a last pattern '*'"),
    (dict(density={'a/*': 0.1, '*': 2}), 'density=2: must be a number in (0, 1]'),
    (dict(density={'*': 0.1}, prune_scope='global'), 'goes with neither distribution= nor prune_scope='),
    (dict(density=0.001), 'fewer than the 3 sparse layers'),
    (dict(density=0.5, rounds=0), 'rounds=0: must be an integer, at least 1'),
    (dict(density=0.5, criterion='magnitud'), "Did you mean 'magnitude'"),
    (dict(density=0.5, scores={'a': jnp.ones(3)}), 'scores has the tree'),
    (dict(density=0.5, scores=_params() | {'b': jnp.ones((6, 8))}), 'the scores of b have shape (6, 8), the weight (8, 6)'),
    (dict(density=0.5, scores=_params(), criterion='random'), 'scores= stands in place of criterion='),
    (dict(density=0.5, granularity='block:16x16'), 'is larger than a leaf'),
]


@pytest.mark.parametrize('number', range(len(WRONG)))
def test_bad_input_is_told_in_one_line(number):
    given, message = WRONG[number]
    with pytest.raises(ValueError) as error:
        sj.prune(_params(), **given)
    assert message in str(error.value) and '\n' not in str(error.value)
