"""The LeNets: published sizes, and their outputs against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax import models
from sparse_jax.models import layers


def _create(name):
    return models.create(name, image_shape=(28, 28, 1), num_classes=10)


@pytest.mark.parametrize(('name', 'weights', 'parameters'), [('lenet300', 266_200, 266_610), ('lenet5', 430_500, 431_080)])
def test_parameter_counts(name, weights, parameters):
    params, state = jax.eval_shape(_create(name).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1) == weights
    assert state == {}
    assert all(isinstance(k, str) for k in params), 'plain nested dictionaries'


def _conv(x, kernel, bias):
    h, w = x.shape[1] - kernel.shape[0] + 1, x.shape[2] - kernel.shape[1] + 1
    patches = sum(x[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(kernel.shape[0]) for j in range(kernel.shape[1]))
    return patches + bias


def _pool(x):
    return x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).max(axis=(2, 4))


@pytest.mark.parametrize('name', ['lenet300', 'lenet5'])
def test_logits_equal_numpy(name):
    model = _create(name)
    params, state = model.init(jax.random.key(1))
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases that are not zero
    x = np.asarray(jax.random.normal(jax.random.key(2), (3, 28, 28, 1)))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    relu = lambda y: np.maximum(y, 0)
    if name == 'lenet300':
        y = relu(x.reshape(3, -1) @ p['fc1']['kernel'] + p['fc1']['bias'])
        y = relu(y @ p['fc2']['kernel'] + p['fc2']['bias']) @ p['fc3']['kernel'] + p['fc3']['bias']
    else:
        y = _pool(relu(_conv(x, **p['conv1'])))
        y = _pool(relu(_conv(y, **p['conv2']))).reshape(3, -1)
        y = relu(y @ p['fc1']['kernel'] + p['fc1']['bias']) @ p['fc2']['kernel'] + p['fc2']['bias']
    logits, _ = jax.jit(lambda p, x: model.apply(p, state, x, train=True, rng=None))(params, x)
    np.testing.assert_allclose(logits, y, rtol=2e-4, atol=2e-4)


def test_initial_values_are_uniform_in_one_over_the_root_of_fan_in():
    params, _ = _create('lenet5').init(jax.random.key(0))
    for name, fan_in in (('conv1', 25), ('conv2', 500), ('fc1', 800)):
        for leaf in params[name].values():
            assert float(abs(leaf).max()) <= fan_in**-0.5
        assert float(params[name]['kernel'].std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


def test_a_pattern_without_a_kernel_is_refused_and_none_is_dense():
    model = _create('lenet300')
    params, state = model.init(jax.random.key(0))
    x = jnp.zeros((1, 28, 28, 1))
    none = {name: {'kernel': None, 'bias': None} for name in params}
    model.apply(params, state, x, train=False, rng=None, patterns=none)
    with pytest.raises(NotImplementedError, match='patterns=None'):
        model.apply(params, state, x, train=False, rng=None, patterns={**none, 'fc2': {'kernel': object()}})


def test_max_pool_of_any_window():
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(layers.max_pool(x, (3, 2)), x.reshape(2, 2, 3, 3, 2, 3).max(axis=(2, 4)))


def test_unknown_names_and_image_sizes():
    with pytest.raises(ValueError, match="model.name='lenet30' does not exist. Did you mean 'lenet300'"):
        _create('lenet30')
    with pytest.raises(ValueError, match='multiples of 4'):
        models.create('lenet5', image_shape=(30, 30, 1), num_classes=10).init(jax.random.key(0))
