"""Drop-in layers against flax's own, and whole modules made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparse_jax as sj


def _mask(shape, density=0.3, seed=0):
    return np.random.default_rng(seed).random(shape) < density


def _pair(made, flax_made, *args, **kwargs):
    """A sparse layer with its pattern and flax's, both with the same masked kernel."""
    sparse, dense = made(*args, **kwargs, rngs=nnx.Rngs(0)), flax_made(*args, **kwargs, rngs=nnx.Rngs(0))
    mask = _mask(dense.kernel[...].shape)
    for layer in (sparse, dense):
        layer.kernel[...] = jnp.where(mask, layer.kernel[...], 0)
        if layer.bias is not None:
            layer.bias[...] = jnp.arange(layer.bias[...].size, dtype=layer.bias[...].dtype)
    return sparse, dense, mask


def _close(sparse, dense, mask, x, tolerance=1e-5):
    """Values, and gradients where the mask is."""

    def loss(layer, x):
        y = layer(x)
        return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    wrt = nnx.DiffState(0, nnx.Param)
    (_, y), (grads, dx) = nnx.value_and_grad(loss, argnums=(wrt, 1), has_aux=True)(sparse, x)
    (_, expected), (wanted, expected_dx) = nnx.value_and_grad(loss, argnums=(wrt, 1), has_aux=True)(dense, x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    scale = lambda a: tolerance * max(1.0, float(np.abs(np.asarray(a, np.float32)).max(initial=0)))
    np.testing.assert_allclose(np.float32(y), np.float32(expected), atol=scale(expected), rtol=tolerance)
    np.testing.assert_allclose(np.float32(dx), np.float32(expected_dx), atol=scale(expected_dx), rtol=tolerance)
    kernel = np.float32(wanted['kernel'][...]) * mask
    np.testing.assert_allclose(np.float32(grads['kernel'][...]), kernel, atol=scale(kernel), rtol=tolerance)


@pytest.mark.parametrize(
    ('options', 'shape'),
    [
        ({}, (4, 12)),
        ({'use_bias': False}, (2, 3, 12)),
        ({'dtype': jnp.bfloat16}, (4, 12)),
        ({'preferred_element_type': jnp.float32, 'dtype': jnp.bfloat16}, (4, 12)),
        ({}, (12,)),
    ],
    ids=str,
)
def test_linear_is_flaxs(options, shape):
    sparse, dense, mask = _pair(sj.nnx.SparseLinear, nnx.Linear, 12, 7, **options)
    x = jax.random.normal(jax.random.key(1), shape)
    np.testing.assert_array_equal(sparse(x), dense(x))  # no pattern yet
    sparse.pattern.set_value(sj.kernels.make_pattern(mask))
    _close(sparse, dense, mask, x, 5e-2 if 'dtype' in options else 1e-5)


@pytest.mark.parametrize(
    ('options', 'shape'),
    [
        ({}, (2, 8, 9, 5)),
        ({'strides': (2, 2)}, (2, 8, 9, 5)),
        ({'strides': 2, 'padding': 'VALID', 'use_bias': False}, (2, 8, 9, 5)),
        ({'padding': 'CIRCULAR'}, (2, 8, 9, 5)),
        ({'padding': 2, 'kernel_dilation': 2}, (2, 8, 9, 5)),
        ({'padding': ((0, 2), (1, 1))}, (2, 8, 9, 5)),
        ({}, (8, 9, 5)),
        ({}, (2, 3, 8, 9, 5)),
        ({'dtype': jnp.bfloat16}, (2, 8, 9, 5)),
        ({'feature_group_count': 5}, (2, 8, 9, 5)),
        ({'input_dilation': 2, 'padding': 1}, (2, 8, 9, 5)),
    ],
    ids=str,
)
def test_conv_is_flaxs(options, shape):
    sparse, dense, mask = _pair(sj.nnx.SparseConv, nnx.Conv, 5, 10, (3, 3), **options)
    x = jax.random.normal(jax.random.key(1), shape)
    np.testing.assert_array_equal(sparse(x), dense(x))
    sparse.pattern.set_value(sj.kernels.make_pattern(mask))
    if options.keys() & {'feature_group_count', 'input_dilation'}:  # by XLA, whose gradient is dense
        np.testing.assert_allclose(sparse(x), dense(x), rtol=1e-5, atol=1e-5)
    else:
        _close(sparse, dense, mask, x, 5e-2 if 'dtype' in options else 1e-5)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(3, 16, (3, 3), rngs=rngs), nnx.Conv(16, 16, (3, 3), strides=2, rngs=rngs)])
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.out(self.norm(x).mean((1, 2)))


class Special(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs, out_sharding)


def test_sparsify_exchanges_layers_and_nothing_else():
    net = Net(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(net))
    sparse = sj.nnx.sparsify(net)
    assert type(net.out) is nnx.Linear and type(sparse.out) is sj.nnx.SparseLinear and type(sparse.convs[1]) is sj.nnx.SparseConv
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    np.testing.assert_array_equal(sparse(x), net(x))
    names = lambda module: [path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]
    assert names(sparse) == names(net)
    sparse.out.kernel[...] = jnp.zeros((16, 10))
    after = nnx.state(net, nnx.Param)['out']['kernel'][...]
    np.testing.assert_array_equal(after, before['out']['kernel'][...])
    assert type(sj.nnx.sparsify(nnx.Sequential(Special(2, 2, rngs=nnx.Rngs(0)))).layers[0]) is Special


def _train(model, optimizer, steps, runner=None):
    @nnx.jit
    def step(model, optimizer, x, y):
        loss = lambda model: optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = []
    for i in range(steps):
        x = jax.random.normal(jax.random.key(i), (8, 8, 8, 3))
        if runner is not None:
            sj.nnx.set_patterns(model, runner.patterns_at(i))
        losses.append(float(step(model, optimizer, x, jnp.argmax(x.mean((1, 2)), -1))))
        if runner is not None:
            runner.update(i + 1, optimizer.opt_state)
    return losses


def test_a_trained_network_is_that_of_flaxs_layers():
    """With dense gradients at all steps the kernels change rounding only: the same masks, through two updates."""
    timing = sj.Timing(update_every=5, total_steps=30)
    runs = []
    for sparse in (False, True):
        model = Net(nnx.Rngs(0))
        model = sj.nnx.sparsify(model) if sparse else model
        optimizer = nnx.Optimizer(model, sj.sparsify(optax.sgd(0.1, momentum=0.9), density=0.2, timing=timing), wrt=nnx.Param)
        sj.nnx.apply_masks(model, optimizer.opt_state)
        x = jnp.ones((8, 8, 8, 3))
        runner = sj.nnx.runner(model, optimizer.opt_state, timing, x, window=None, implementations='cpu') if sparse else None
        runs.append((_train(model, optimizer, 12, runner), model, optimizer))
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=1e-4)
    masks = [jax.tree.leaves(sj.get_masks(run[2].opt_state)) for run in runs]
    assert all(np.array_equal(a, b) for a, b in zip(*masks, strict=True))
    model, optimizer = runs[1][1:]
    sj.check_sparse(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert {row['layer'] for row in runner.table()} == {'convs/0/kernel', 'convs/1/kernel', 'out/kernel'}

    model.eval()
    frozen = sj.nnx.freeze(model, optimizer.opt_state)
    x = jax.random.normal(jax.random.key(99), (1, 8, 8, 3))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(frozen, x), runs[1][1](x), rtol=1e-4, atol=1e-5)
    assert isinstance(frozen.out.kernel.get_value(), sj.kernels.CompactWeight)
    assert not isinstance(model.out.kernel.get_value(), sj.kernels.CompactWeight)


def test_patterns_of_another_module_are_refused():
    model = sj.nnx.sparsify(Net(nnx.Rngs(0)))
    with pytest.raises(ValueError, match='other/kernel is no kernel of a SparseLinear or SparseConv in this module'):
        sj.nnx.set_patterns(model, {'other': {'kernel': sj.kernels.make_pattern(_mask((4, 4)))}})
    sj.nnx.set_patterns(model, {'out': {'kernel': sj.kernels.make_pattern(_mask((16, 10)))}})
    assert model.out.pattern.get_value() is not None
    sj.nnx.set_patterns(model, None)
    assert model.out.pattern.get_value() is None


def test_a_file_goes_back_into_a_module(tmp_path):
    """Weights and running statistics, by their paths; masks of the file freeze the module."""
    model = sj.nnx.sparsify(Net(nnx.Rngs(0)))
    tx = sj.sparsify(optax.sgd(0.1), density=0.3, timing=sj.Timing(update_every=5, total_steps=30))
    state = tx.init(nnx.state(model, nnx.Param))
    sj.nnx.apply_masks(model, state)
    model.norm.mean[...] = jnp.arange(16.0)
    pure = lambda tree: nnx.to_pure_dict(tree)
    variables = pure(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    masks = pure(sj.get_masks(state))
    masks['norm'] |= {'mean': np.array(True), 'var': np.array(True)}
    sj.export.save(tmp_path / 'net.npz', variables, masks)
    params, its_masks, _ = sj.export.load(tmp_path / 'net.npz')
    other = sj.nnx.sparsify(Net(nnx.Rngs(1)))
    sj.nnx.load(other, params)
    for module in (model, other):
        module.eval()
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    np.testing.assert_array_equal(other(x), model(x))
    np.testing.assert_allclose(sj.nnx.freeze(other, its_masks)(x), model(x), rtol=1e-4, atol=1e-5)
    del params['out']['bias']
    params['convs']['0']['kernel'] = np.zeros((3, 3, 3, 5), np.float32)
    with pytest.raises(
        ValueError, match=r'out/bias is missing; convs/0/kernel has shape \(3, 3, 3, 5\) instead of \(3, 3, 3, 16\)'
    ):
        sj.nnx.load(other, params)
    with pytest.raises(ValueError, match='masks: norm/bias is missing'):
        del its_masks['norm']['bias']
        sj.nnx.freeze(other, its_masks)


def test_a_runner_leaves_attention_alone_whose_axes_are_told():
    """Its kernels have patterns of matrices, with which no layer of the module multiplies."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
            self.fc = nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, x):
            return self.fc(self.attention(x))

    module = sj.nnx.sparsify(Net(nnx.Rngs(0)))
    timing = sj.Timing(update_every=4, total_steps=12)
    optimizer = nnx.Optimizer(module, sj.sparsify(optax.adam(1e-3), density=0.2, timing=timing, matrix_axes='flax'), wrt=nnx.Param)
    sj.nnx.apply_masks(module, optimizer.opt_state)
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    expected = module(x)
    kernels = sj.nnx.runner(module, optimizer.opt_state, timing, x, implementations='reference')
    sj.nnx.set_patterns(module, kernels.patterns_at(0))
    assert module.fc.pattern.get_value() is not None
    np.testing.assert_allclose(module(x), expected, rtol=1e-5, atol=1e-5)
