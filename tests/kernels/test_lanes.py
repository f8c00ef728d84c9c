"""Images by lanes: fused convolutions and pooling against float64 and plain jax, and the networks that use them against those by channels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_jax as sj
from sparse_jax import config as config_lib
from sparse_jax import kernels, models
from sparse_jax import train as train_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.kernels import measure
from sparse_jax.kernels.cpu import operations as cpu
from sparse_jax.models import by_lanes, layers
from sparse_jax.train import kernel_choice
from tests.kernels import kernel_cases

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(bool(cpu.unavailable()), reason='needs a C++ compiler: install g++ or clang++'),
]


@settings(max_examples=24)
@given(st.sampled_from(kernel_cases.BY_LANES), st.sampled_from(['sparse', 'dense', 'dense gradient']), st.integers(0, 2**31 - 1))
def test_normalised_convolutions_with_residual_and_moments_equal_float64(case, mode, seed):
    _, wrong = kernel_cases.by_lanes_errors(case, mode, seed)
    assert max(wrong) < 1e-5, dict(zip(('y', 'moments', 'dx', 'd_activation', 'dw', 'd_residual'), wrong, strict=True))


@settings(max_examples=10)
@given(st.sampled_from(kernel_cases.BY_LANES), st.sampled_from([(2, 2), (1, 3), (2, 1)]), st.integers(0, 2**31 - 1))
def test_pooling_after_normalisation_equals_maxima(case, window, seed):
    got, expected = kernel_cases.pooled(case, window, seed)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_moments_are_exact_where_the_mean_is_large():
    """E[y^2] - E[y]^2 would lose all digits here."""
    x = 1000 + jax.random.normal(jax.random.key(0), (64, 8, 8, 4))
    y, moments = kernels.convolve_by_lanes(kernels.to_lanes(x), None, jnp.eye(4)[None, None], None, None, statistics=True)
    np.testing.assert_array_equal(kernels.from_lanes(y), x)
    np.testing.assert_allclose(moments[1], np.asarray(x, np.float64).var((0, 1, 2)), rtol=1e-4)


def test_values_that_are_not_finite_stay_where_they_belong():
    x = jnp.zeros((16, 4, 4, 2)).at[3, 1, 1, 0].set(jnp.nan).at[5, 2, 2, 1].set(jnp.inf)
    activation = jnp.array([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    w = jnp.ones((1, 1, 2, 3))
    y, _ = kernels.convolve_by_lanes(kernels.to_lanes(x), activation, w, None, None)
    y = np.asarray(kernels.from_lanes(y))
    assert np.isnan(y[3, 1, 1]).all() and np.isposinf(y[5, 2, 2]).all()
    assert np.isfinite(np.delete(y, (3, 5), axis=0)).all()


def _losses(name: str, layout: str, density: float, steps: int, batch: int = 16, **own):
    model = models.create(name, input_shape=(32, 32, 3), num_outputs=10, layout=layout, **own)
    params, state = jax.jit(model.init)(jax.random.key(0))
    random = np.random.default_rng(0)
    x, y = jnp.asarray(random.standard_normal((batch, 32, 32, 3)), jnp.float32), jnp.arange(batch) % 10
    masks = jax.tree.map(lambda w: random.random(w.shape) < density if w.ndim > 1 else np.array(True), params)
    params = sj.apply_masks(params, masks)
    patterns = kernels.make_patterns(masks) if density < 1 else None

    def loss_fn(params, state, key):
        logits, state = model.apply(params, state, x, train=True, rng=key, patterns=patterns)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1).mean(), state

    @jax.jit
    def step(params, state, key):
        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, key)
        return jax.tree.map(lambda p, g: p - 0.002 * g, params, sj.apply_masks(grads, masks)), state, loss

    losses = []
    for i in range(steps):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(float(loss))
    logits, _ = jax.jit(functools.partial(model.apply, train=False, rng=None))(params, state, x[: batch - 3], patterns=patterns)
    return losses, params, state, logits


@pytest.mark.parametrize('name, density', [('wrn_28_2', 0.2), ('alexnet_s', 1.0), ('vgg_like', 0.1)])
@pytest.mark.slow
def test_networks_by_lanes_train_as_those_by_channels(name, density):
    """Twenty losses, running statistics, parameters and evaluation (of a batch that is no multiple of 16)."""
    steps = 20 if name == 'wrn_28_2' else 5
    lanes, channels = (_losses(name, layout, density, steps) for layout in ('lanes', 'channels'))
    # VGG ends in images of 1x1 pixels, normalised over 16 examples: there rounding grows
    np.testing.assert_allclose(lanes[0], channels[0], rtol=2e-3 if name == 'wrn_28_2' else 0.05)
    assert lanes[0][-1] < lanes[0][0]
    for a, b in zip(lanes[1:3], channels[1:3], strict=True):
        assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)  # the layout does not leak
    relative = lambda a, b: float(jnp.abs(a - b).max() / (jnp.abs(b).max() + 1e-3))
    assert max(jax.tree.leaves(jax.tree.map(relative, lanes[2], channels[2]))) < (0.02 if name == 'wrn_28_2' else 0.3)
    assert relative(lanes[3], channels[3]) < (0.05 if name == 'wrn_28_2' else 0.5)


@pytest.mark.slow
def test_layers_that_note_down_give_the_same_values_as_layers_that_compute():
    """Orders that no network here has: a ReLU without a norm, two norms, a bias without a norm, a pool of what is not rectified."""
    from flax import nnx

    rngs = nnx.Rngs(0)
    conv, norm, other = layers.Conv(4, 8, (3, 3), rngs=rngs), layers.BatchNorm(8), layers.BatchNorm(8)
    last = layers.Conv(8, 5, (3, 3), strides=(2, 2), rngs=rngs)
    x = jax.random.normal(jax.random.key(0), (32, 8, 8, 4))
    key = jax.random.key(1)
    chains = {
        'bias and ReLU': lambda x, train: layers.relu(conv(x)),
        'two norms': lambda x, train: layers.relu(other(norm(conv(x), train=train), train=train)),
        'norm after ReLU': lambda x, train: norm(layers.relu(conv(x)), train=train),
        'norm, then convolution': lambda x, train: last(norm(conv(x), train=train)),
        'pool of a norm': lambda x, train: layers.max_pool(norm(conv(x), train=train), (2, 2)),
        'pool of an odd window': lambda x, train: layers.max_pool(layers.relu(norm(conv(x), train=train)), (5, 4)),
        'residual': lambda x, train: last(layers.relu(norm(conv(x), train=train)), residual=last(conv(x))),
        'dropout': lambda x, train: layers.dropout(layers.relu(norm(conv(x), train=train)), 0.3, key, train=train),
    }
    for name, chain in chains.items():
        for train in (True, False):
            expected = chain(x, train)
            got = chain(by_lanes.begin(x, train=train), train)
            np.testing.assert_allclose(kernels.from_lanes(got.array()), expected, atol=2e-5, err_msg=f'{name}, train={train}')


def test_running_statistics_by_lanes_are_those_by_channels():
    from flax import nnx

    x = 3 + 2 * jax.random.normal(jax.random.key(0), (32, 8, 8, 4))
    found = []
    for start in (lambda x: x, functools.partial(by_lanes.begin, train=True)):
        conv, norm = layers.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)), layers.BatchNorm(6)
        norm(conv(start(x)), train=True)
        found.append((norm.mean[...], norm.var[...]))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_where_lanes_cannot_be_they_are_refused_or_left():
    own = dict(input_shape=(32, 32, 3), num_outputs=10)
    with pytest.raises(ValueError, match="model.layout='lane' does not exist. Did you mean 'lanes'"):
        models.create('vgg_d', layout='lane', **own)
    model = models.create('wrn_28_2', layout='lanes', **own)
    params, state = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match="layout='lanes' does not run here: the batch of 10 is no multiple of 16"):
        model.apply(params, state, jnp.zeros((10, 32, 32, 3)), train=True, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="lenet5 takes 'auto' or 'channels'"):
        models.create('lenet5', input_shape=(28, 28, 1), num_outputs=10, layout='lanes')
    config = config_lib.Config()  # told before any file is made
    config.model.name, config.model.layout, config.data.batch_size = 'wrn_28_2', 'lanes', 50
    with pytest.raises(ValueError, match="config.model.layout='lanes' does not run here: the batch of 50"):
        train_lib.create(config, num_examples=100, **own)
    auto = models.create('wrn_28_2', **own)
    text = jax.jit(functools.partial(auto.apply, train=True, rng=jax.random.key(0))).lower(
        params, state, jnp.zeros((10, 32, 32, 3))
    )
    assert 'sparse_jax_forward' not in text.as_text()


def test_a_layer_by_lanes_is_measured_as_it_lies():
    model = models.create('wrn_28_2', input_shape=(32, 32, 3), num_outputs=10, layout='lanes')
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    masks = jax.tree.map(
        lambda leaf: np.arange(leaf.size).reshape(leaf.shape) % 9 == 0 if leaf.ndim > 1 else np.array(True), params
    )
    patterns = kernels.make_patterns(masks, implementations={})
    x = jax.ShapeDtypeStruct((32, 32, 32, 3), jnp.float32)
    apply = lambda p, s, x, patterns: model.apply(p, s, x, train=False, rng=None, patterns=patterns)
    calls = measure.products_of(apply, params, state, x, patterns)
    by_name = {call.name: call for call in calls}
    call = by_name['block2_1/conv1/kernel']
    assert call.x == (2, 32, 32, 32, 16) and call.w == (3, 3, 32, 64)
    assert by_name['fc/kernel'].x == (32, 1, 1, 128)  # a matrix product has no lanes
    assert set(measure.measure(call, 0.1, rounds=1)) == {'dense', 'cpu'}


def test_shapes_that_do_not_fit_are_refused_before_the_kernel_reads_them():
    x, w = jnp.zeros((1, 4, 4, 3, 16)), jnp.zeros((3, 3, 3, 5))
    wrong = {
        'x must be': dict(x=x[..., :8]),
        'w must be float32': dict(w=jnp.zeros((3, 3, 4, 5))),
        'activation must be': dict(activation=jnp.zeros((3, 4))),
        'residual must be': dict(residual=jnp.zeros((1, 4, 4, 3, 16))),
    }
    for message, changed in wrong.items():
        given = dict(x=x, activation=None, w=w, residual=None, pattern=None) | changed
        with pytest.raises(ValueError, match=f'convolve_by_lanes: {message}'):
            kernels.convolve_by_lanes(**given)
    with pytest.raises(ValueError, match='of at most 16 pixels'):
        kernels.max_pool_by_lanes(x, None, (5, 5))


def test_a_batch_that_cannot_lie_by_lanes_in_training_is_measured_by_channels(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, 'device_count', lambda: 1)  # as on a machine with one; no computation is made here
    for batch, axes in ((50, 4), (48, 5)):
        config = config_lib.Config()
        config.model.name, config.data.batch_size = 'wrn_28_2', batch
        experiment = train_lib.create(config, num_examples=batch, input_shape=(32, 32, 3), num_outputs=10)
        state = jax.eval_shape(experiment.init, jax.random.key(0))
        masks = jax.tree.map(lambda p: np.ones(p.shape, bool) if p.ndim > 1 else np.array(True), state.params)
        sparse = masks_lib.find_state(state.opt_state)._replace(masks=masks, layers=experiment.layer_codes)
        calls = kernel_choice.LayerKernels(config, experiment, tmp_path, 0)._traced(state, sparse)
        assert len(calls['block1_1/conv1/kernel'].x) == axes


def test_kernels_by_lanes_have_first_derivatives_only():
    x, w = jnp.ones((1, 4, 4, 2, 16)), jnp.ones((3, 3, 2, 2))
    loss = lambda w: jnp.sum(kernels.convolve_by_lanes(x, None, w, None, None)[0] ** 2)
    jax.grad(loss)(w)
    with pytest.raises(NotImplementedError, match='the C\\+\\+ kernel .* has no derivative of its own'):
        jax.grad(lambda w: jax.grad(loss)(w).sum())(w)
