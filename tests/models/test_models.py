"""The networks: published sizes, and their outputs against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_jax as sj
from sparse_jax import models
from sparse_jax.kernels import measure
from sparse_jax.models import layers

TINY = dict(depth=2, features=16, heads=2)


def _create(name, **own):
    if name == 'transformer':
        return models.create(name, input_shape=(8,), num_outputs=11, **{**TINY, **own})
    return models.create(name, input_shape=(28, 28, 1) if name.startswith('lenet') else (32, 32, 3), num_outputs=10, **own)


def _size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# parameters, weights, and the published number of parameters in millions: SNIP's table 2 (arXiv:1810.02340), and for WRN-28-2
# Zagoruyko and Komodakis's table 4 (1.5). VGG-C is the original code's: its padded 1x1 kernels make the first linear layer larger than SNIP's
# by 3 x 512 x 512. For WRN-16-8 SNIP says 10.0, but keeps 548,000 at 5%, which is 5% of 11.0.
@pytest.mark.core
@pytest.mark.parametrize(
    ('name', 'weights', 'parameters', 'published'),
    [
        ('lenet300', 266_200, 266_610, None),
        ('lenet5', 430_500, 431_080, None),
        ('alexnet_s', 5_066_784, 5_077_066, 5.1),
        ('alexnet_b', 8_484_896, 8_501_322, 8.5),
        ('vgg_c', 11_307_712, 11_323_466, 10.5 + 3 * 512 * 512 / 1e6),
        ('vgg_d', 15_239_872, 15_255_626, 15.2),
        ('vgg_like', 14_977_728, 14_991_946, 14.98),
        ('wrn_28_2', 1_463_984, 1_467_610, 1.5),
        ('wrn_22_8', 17_147_312, 17_158_106, 17.2),
        ('wrn_16_8', 10_954_160, 10_961_370, 0.548 / 0.05),
        ('wrn_16_10', 17_107_632, 17_116_634, 17.1),
        ('resnet50', 23_454_912 + 2_048 * 10, 25_557_032 - 2_049 * 990, None),
    ],
)
def test_parameter_counts(name, weights, parameters, published):
    params, state = jax.eval_shape(_create(name).init, jax.random.key(0))
    assert _size(params) == parameters
    assert published is None or abs(parameters / 1e6 - published) < 0.06
    assert sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1) == weights
    assert all(isinstance(k, str) for k in params), 'plain nested dictionaries'
    x = jax.ShapeDtypeStruct((2, 28, 28, 1) if name.startswith('lenet') else (2, 32, 32, 3), jnp.float32)
    apply = lambda p, s, x, key: _create(name).apply(p, s, x, train=True, rng=key)
    logits, after = jax.eval_shape(apply, params, state, x, jax.random.key(0))
    assert logits.shape == (2, 10) and jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.core
@pytest.mark.parametrize(
    ('own', 'tokens', 'millions'),
    [
        (dict(depth=4, features=128, heads=4), 257, 0.89),
        (dict(depth=24, features=1024, heads=16, tied=False), 32_001, 369),
        (dict(depth=24, features=1792, heads=14), 32_001, 996),
    ],
)
def test_transformer_sizes(own, tokens, millions):
    model = models.create('transformer', input_shape=(64,), num_outputs=tokens, **own)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    depth, d = own['depth'], own['features']
    hidden = -(-8 * d // 3 // 64) * 64
    tables = tokens * d * (1 if own.get('tied', True) else 2)
    assert _size(params) == depth * (4 * d * d + 3 * d * hidden + 2 * d) + d + tables
    assert _size(params) / 1e6 == pytest.approx(millions, rel=0.1)
    stacked = [path for path, leaf in _paths(params) if model.stacked(path, leaf)]
    assert len(stacked) == 9 and all(dict(_paths(params))[path].shape[0] == depth for path in stacked)


def _paths(tree):
    return [('/'.join(k.key for k in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _conv(x, kernel, bias=0.0, stride=1, pad=0):
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    kh, kw = kernel.shape[:2]
    h, w = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    y = 0
    for i in range(kh):
        for j in range(kw):
            y = y + x[:, i : i + stride * h : stride, j : j + stride * w : stride][:, :h, :w] @ kernel[i, j]
    return y + bias


def _pool(x):
    h, w = x.shape[1] // 2, x.shape[2] // 2
    return x[:, : 2 * h, : 2 * w].reshape(len(x), h, 2, w, 2, -1).max(axis=(2, 4))


def _norm(x, p, eps=1e-5):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + eps) * p['scale'] + p['bias']


def _relu(y):
    return np.maximum(y, 0)


def _numpy_logits(name, p, x):
    linear = lambda y, q: y @ q['kernel'] + q.get('bias', 0)
    if name == 'lenet300':
        y = _relu(linear(x.reshape(len(x), -1), p['fc1']))
        return linear(_relu(linear(y, p['fc2'])), p['fc3'])
    if name == 'lenet5':
        y = _pool(_relu(_conv(x, **p['conv1'])))
        y = _pool(_relu(_conv(y, **p['conv2']))).reshape(len(x), -1)
        return linear(_relu(linear(y, p['fc1'])), p['fc2'])
    if name == 'alexnet_s':
        for i, pad in enumerate((2, 2, 1, 1, 1), 1):
            x = _relu(_norm(_conv(x, **p[f'conv{i}'], stride=2, pad=pad), p[f'norm{i}']))
        x = x.reshape(len(x), -1)
        for i in (1, 2):
            x = _relu(_norm(linear(x, p[f'fc{i}']), p[f'fc_norm{i}']))
        return linear(x, p['fc3'])
    if name == 'vgg_c':
        for stage, depth in enumerate((2, 2, 3, 3, 3), 1):
            for i in range(1, depth + 1):
                x = _relu(_norm(_conv(x, **p[f'conv{stage}_{i}'], pad=1), p[f'norm{stage}_{i}']))
            x = _pool(x)
        x = x.reshape(len(x), -1)
        for i in (1, 2):
            x = _norm(_relu(linear(x, p[f'fc{i}'])), p[f'fc_norm{i}'])
        return linear(x, p['out'])
    assert name == 'wrn_28_2'
    x = _conv(x, p['conv']['kernel'], pad=1)
    for stage in (1, 2, 3):
        for i in range(1, 5):
            b, stride = p[f'block{stage}_{i}'], 2 if stage > 1 and i == 1 else 1
            y = _relu(_norm(x, b['norm1']))
            residual = _conv(y, b['shortcut']['kernel'], stride=stride) if 'shortcut' in b else x
            y = _relu(_norm(_conv(y, b['conv1']['kernel'], stride=stride, pad=1), b['norm2']))
            x = residual + _conv(y, b['conv2']['kernel'], pad=1)
    return linear(_relu(_norm(x, p['norm'])).mean(axis=(1, 2)), p['fc'])


@pytest.mark.parametrize(
    'name', ['lenet300', 'lenet5', 'alexnet_s', *(pytest.param(m, marks=pytest.mark.slow) for m in ('vgg_c', 'wrn_28_2'))]
)
def test_logits_equal_numpy(name):
    """In training (batch statistics), without dropout; in float64 on numpy's side."""
    model = _create(name, **({'dropout': 0.0} if name.startswith('wrn') else {}))
    params, state = jax.jit(model.init)(jax.random.key(1))
    params = jax.tree.map(lambda p: p + 0.1 if p.ndim == 1 or name.startswith('lenet') else p, params)  # biases that are not zero
    x = np.asarray(jax.random.normal(jax.random.key(2), (8, 28, 28, 1) if name.startswith('lenet') else (8, 32, 32, 3)))
    y = _numpy_logits(name, jax.tree.map(lambda a: np.asarray(a, np.float64), params), x)
    logits, _ = jax.jit(lambda p, x: model.apply(p, state, x, train=True, rng=None))(params, x)
    np.testing.assert_allclose(logits, y, rtol=2e-3, atol=2e-3)


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.core
@pytest.mark.parametrize('own', [{}, dict(tied=False, hidden=24, remat='all'), dict(remat='products')])
def test_transformer_equals_numpy(own):
    """Head by head, position by position, layer by layer: rotary embeddings, the causal mask, SwiGLU, RMSNorm."""
    model = _create('transformer', **own)
    params, state = model.init(jax.random.key(1))
    params = jax.tree.map(lambda p: p * 5 if p.ndim > 2 else p + 0.1, params)
    tokens = np.random.default_rng(0).integers(0, 11, (3, 8))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    rms = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def turn(v, position):  # features i and i + half are a complex number
        half = len(v) // 2
        turned = (v[:half] + 1j * v[half:]) * np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
        return np.concatenate([turned.real, turned.imag])

    x = p['embed']['table'][tokens]
    for layer in range(2):
        q = jax.tree.map(lambda a, layer=layer: a[layer], p['layers'])
        y, out = rms(x, q['attention_norm']['scale']), np.zeros_like(x)
        query, key, value = (y @ q['attention'][n]['kernel'] for n in ('query', 'key', 'value'))
        for b in range(3):
            for head in (slice(0, 8), slice(8, 16)):
                keys = np.stack([turn(key[b, t, head], t) for t in range(8)])
                for t in range(8):
                    weights = _softmax(keys[: t + 1] @ turn(query[b, t, head], t) / np.sqrt(8))
                    out[b, t, head] = weights @ value[b, : t + 1, head]
        x = x + out @ q['attention']['out']['kernel']
        y = rms(x, q['mlp_norm']['scale'])
        gate = y @ q['mlp']['gate']['kernel']
        x = x + (gate / (1 + np.exp(-gate)) * (y @ q['mlp']['up']['kernel'])) @ q['mlp']['down']['kernel']
    expected = rms(x, p['norm']['scale']) @ (p['head']['kernel'] if 'head' in p else p['embed']['table'].T)
    logits, _ = jax.jit(lambda p: model.apply(p, state, tokens, train=True, rng=None))(params)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.core
def test_no_token_sees_a_later_one():
    model = _create('transformer')
    params, state = model.init(jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, 11, (1, 8))
    run = jax.jit(lambda t: model.apply(params, state, t, train=False, rng=None)[0][0])
    before = run(tokens)
    for position in range(8):
        changed = tokens.copy()
        changed[0, position] = (changed[0, position] + 1) % 11
        after = run(changed)
        np.testing.assert_array_equal(before[:position], after[:position])
        assert (before[position:] != after[position:]).any()


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    for name in ('wrn_28_2', 'transformer'):
        model, wide = _create(name, dtype='bfloat16'), _create(name)
        params, state = jax.jit(model.init)(jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves((params, state))} == {jnp.dtype('float32')}
        x = jnp.ones((2, 8), int) if name == 'transformer' else jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
        run = lambda m, s=state, x=x: jax.jit(lambda p: m.apply(p, s, x, train=False, rng=None)[0])
        assert 'bf16' in run(model).lower(params).as_text() and 'bf16' not in run(wide).lower(params).as_text()
        low, high = run(model)(params), run(wide)(params)
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, high, atol=0.1 * float(jnp.abs(high).max()) + 0.02)


def test_dropout_needs_a_key_differs_by_it_and_is_off_in_evaluation():
    model = _create('transformer', dropout=0.5)
    params, state = model.init(jax.random.key(0))
    tokens = jnp.arange(8)[None]
    run = lambda train, key: model.apply(params, state, tokens, train=train, rng=key)[0]
    with pytest.raises(ValueError, match='rng=key'):
        run(True, None)
    np.testing.assert_array_equal(run(True, jax.random.key(1)), run(True, jax.random.key(1)))
    assert (run(True, jax.random.key(1)) != run(True, jax.random.key(2))).any()
    plain = _create('transformer').apply(params, state, tokens, train=False, rng=None)[0]
    np.testing.assert_array_equal(run(False, None), plain)


def test_initial_values_are_uniform_in_one_over_the_root_of_fan_in():
    params, _ = _create('lenet5').init(jax.random.key(0))
    for name, fan_in in (('conv1', 25), ('conv2', 500), ('fc1', 800)):
        for leaf in params[name].values():
            assert float(abs(leaf).max()) <= fan_in**-0.5
        assert float(params[name]['kernel'].std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


def test_initial_values_of_the_others():
    wide, _ = jax.jit(_create('wrn_28_2').init)(jax.random.key(0))
    assert float(wide['block2_2']['conv1']['kernel'].std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    params, _ = _create('transformer', features=64, depth=8).init(jax.random.key(0))
    assert float(params['layers']['mlp']['up']['kernel'].std()) == pytest.approx(0.02, rel=0.05)
    assert float(params['layers']['mlp']['down']['kernel'].std()) == pytest.approx(0.02 / 4, rel=0.05)
    rows = params['layers']['mlp']['up']['kernel']
    assert (rows[0] != rows[1]).any(), 'each layer has its own start'


@pytest.mark.parametrize(('name', 'path'), [('lenet300', ('fc2',)), ('vgg_d', ('conv5_3',)), ('alexnet_s', ('fc3',)),
                                            ('wrn_16_8', ('block2_1', 'shortcut')), ('transformer', ('layers', 'mlp', 'up'))])  # fmt: skip
def test_each_layer_takes_its_pattern_and_none_is_dense(name, path):
    """With all patterns but one None, one product is sparse, and the logits are those of the masked weights."""
    model = _create(name)
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, 8), jnp.int32) if name == 'transformer' else jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    if name[:2] != 'le' and name != 'transformer':
        x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    leaf = params
    for part in path:
        leaf = leaf[part]
    pattern = sj.kernels.make_patterns({'w': np.ones(leaf['kernel'].shape, bool)}, stacked=lambda *_: 'layers' in path)['w']
    patterns = {'kernel': pattern}
    for part in reversed(path):
        patterns = {part: patterns}
    apply = lambda p, s, x, patterns: model.apply(p, s, x, train=False, rng=None, patterns=patterns)[0]
    run = lambda patterns: jax.eval_shape(apply, params, state, x, patterns)
    assert run(None).shape == run(patterns).shape
    assert measure.products_of(apply, params, state, x, None) == []
    assert [call.name for call in measure.products_of(apply, params, state, x, patterns)] == ['w']


@pytest.mark.core
@pytest.mark.parametrize('train', [True, False])
def test_batch_norm_equals_numpy(train):
    from flax import nnx

    rng = np.random.default_rng(0)
    x = (rng.normal(size=(5, 3, 2, 4)) * [1, 2, 3, 0.01] + [0, 5, -3, 100]).astype(np.float32)
    norm = layers.BatchNorm(4)
    norm.scale[...], norm.bias[...] = jnp.array([1.0, 2, 3, 4]), jnp.array([0.0, 1, 2, 3])
    norm.mean[...], norm.var[...] = jnp.array([1.0, 0, 0, 99]), jnp.array([2.0, 1, 1, 3])
    y = norm(jnp.asarray(x), train=train)
    wide = x.astype(np.float64)
    mean, var = (wide.mean((0, 1, 2)), wide.var((0, 1, 2))) if train else (np.array([1.0, 0, 0, 99]), np.array([2.0, 1, 1, 3]))
    expected = (wide - mean) / np.sqrt(var + 1e-5) * [1, 2, 3, 4] + [0, 1, 2, 3]
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=2e-3)
    after = nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))
    if train:  # PyTorch's rule: a tenth, and the unbiased variance
        np.testing.assert_allclose(after['mean'], 0.9 * np.array([1, 0, 0, 99]) + 0.1 * wide.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
        unbiased = wide.var((0, 1, 2), ddof=1)
        np.testing.assert_allclose(after['var'], 0.9 * np.array([2, 1, 1, 3]) + 0.1 * unbiased, rtol=1e-4)
    else:
        np.testing.assert_array_equal(after['mean'], [1, 0, 0, 99])


def test_dropout_keeps_the_mean():
    x = jnp.ones((100, 100))
    y = layers.dropout(x, 0.3, jax.random.key(0), train=True)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / np.float32(0.7))}
    assert float(y.mean()) == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(layers.dropout(x, 0.3, None, train=False), x)


@pytest.mark.parametrize('side', [1, 2, 3])
@pytest.mark.parametrize(('taps', 'strides', 'padding'), [
    ((3, 3), (1, 1), 'SAME'), ((3, 3), (2, 2), ((1, 1), (1, 1))), ((1, 1), (1, 1), ((1, 1), (1, 1))), ((2, 1), (1, 2), ((1, 0), (0, 2))),
])  # fmt: skip
def test_convolution_of_few_pixels_is_the_convolution(side, taps, strides, padding):
    """Images of up to four pixels go by matrix products on CPU."""
    x = jax.random.normal(jax.random.key(0), (3, side, side, 4))
    kernel = jax.random.normal(jax.random.key(1), (*taps, 4, 5))
    plain = lambda x, k: jax.lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    ours = lambda x, k: sj.kernels.convolve(x, k, strides=strides, padding=padding)
    assert ('conv_general_dilated' in str(jax.make_jaxpr(ours)(x, kernel))) == (side == 3)
    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), atol=1e-5)
    for got, expected in zip(
        *(jax.grad(lambda x, k, f=f: (f(x, k) ** 2).sum(), (0, 1))(x, kernel) for f in (ours, plain)), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_max_pool_of_any_window():
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(layers.max_pool(x, (3, 2)), x.reshape(2, 2, 3, 3, 2, 3).max(axis=(2, 4)))
    np.testing.assert_array_equal(layers.max_pool(x[:, :5, :5], (2, 2)), x[:, :4, :4].reshape(2, 2, 2, 2, 2, 3).max(axis=(2, 4)))


def test_unknown_names_options_and_examples():
    with pytest.raises(ValueError, match="model.name='lenet30' does not exist. Did you mean 'lenet300'"):
        _create('lenet30')
    with pytest.raises(ValueError, match='multiples of 4'):
        models.create('lenet5', input_shape=(30, 30, 1), num_outputs=10).init(jax.random.key(0))
    with pytest.raises(ValueError, match='takes images of 32x32 pixels, got'):
        models.create('vgg_d', input_shape=(28, 28, 1), num_outputs=10)
    with pytest.raises(ValueError, match="'vgg_d' takes images, got examples of shape"):
        models.create('vgg_d', input_shape=(128,), num_outputs=10)
    with pytest.raises(ValueError, match='takes sequences of tokens, got'):
        models.create('transformer', input_shape=(32, 32, 3), num_outputs=10, **TINY)
    with pytest.raises(ValueError, match="the option of wrn_16_8='droput' does not exist. Did you mean 'dropout'"):
        _create('wrn_16_8', droput=0.1)
    with pytest.raises(ValueError, match='model.heads=5 must divide model.features=16'):
        _create('transformer', heads=5)
    with pytest.raises(ValueError, match="model.dtype='bfloat' does not exist"):
        _create('transformer', dtype='bfloat')
