"""The project's networks on compact values: the outputs, gradients and scores of the dense storage."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj
from sparse_jax import kernels, models
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.granularity import Block, Unstructured
from sparse_jax.kernels import layout as layout_lib
from tests.compact.test_lists import layout_of, random_mask
from tests.kernels.test_compiler import needs_compiler

NETWORKS = {
    'lenet5': dict(input_shape=(28, 28, 1), num_outputs=10),
    'transformer': dict(input_shape=(16,), num_outputs=32, depth=2, features=32, heads=2),
}


def _sums(x):
    return Block(8, 8).collapse(x, 0, jax.lax.add)


@pytest.mark.parametrize('granularity', ('unstructured', 'block:8x8'))
@pytest.mark.parametrize('name', NETWORKS)
def test_networks_take_values_and_layouts(name, granularity):
    model = models.create(name, **NETWORKS[name])
    params, state = model.init(jax.random.key(0))
    dense = ('conv1/*',) if name == 'lenet5' else ()  # smaller than a block
    rule = sj.methods.rule(
        'set', density=0.2, update_every=1, total_steps=9, granularity=granularity, stacked=model.stacked, dense=dense
    )
    masks = sj.get_masks(jax.jit(sj.sparsify(optax.sgd(0.1), rule=rule).init)(params))
    params = sj.apply_masks(params, masks)
    values, layout = sj.compact.compress(params, masks, granularity=granularity, stacked=model.stacked)
    probes = sj.compact.probes(layout, dtype=jnp.float32)
    shape = NETWORKS[name]['input_shape']
    x = (
        jax.random.randint(jax.random.key(1), (4, *shape), 0, 32)
        if len(shape) == 1
        else jax.random.normal(jax.random.key(1), (4, *shape))
    )

    def loss(params, patterns):
        y, _ = model.apply(params, state, x, train=True, rng=jax.random.key(2), patterns=patterns)
        return jnp.mean(jax.nn.logsumexp(y, -1) ** 2)

    expected, dense_grads = jax.jit(jax.value_and_grad(lambda p: loss(p, None)))(params)
    compact = lambda v, p: loss(v, sj.compact.with_probes(layout, p))
    value, (grads, scores) = jax.jit(jax.value_and_grad(compact, (0, 1)))(values, probes)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    close(value, expected)
    jax.tree.map(close, sj.compact.expand(grads, layout), sj.apply_masks(dense_grads, masks))
    for path, score in layers_lib.leaf_paths(scores):
        dense = dict(layers_lib.leaf_paths(dense_grads))[path]
        if granularity == 'unstructured':
            close(score, dense)
        else:
            each = jax.vmap(_sums) if path.startswith('layers') else _sums
            close(score, each(jnp.abs(dense)) / each(jnp.ones(dense.shape)))


@needs_compiler
@pytest.mark.parametrize('granularity', (Unstructured(), Block(4, 4)), ids=str)
def test_convolutions_by_lanes(granularity):
    shape, random = (3, 3, 8, 12), np.random.default_rng(0)
    mask = random_mask(shape, granularity, 0.3, 0)
    weight = jnp.asarray(np.where(mask, random.standard_normal(shape), 0), jnp.float32)
    layout = layout_of(mask, granularity, room=5)
    values, pattern = layout_lib.gather(weight, layout), kernels.make_pattern(mask, granularity=granularity)
    x = kernels.to_lanes(jnp.asarray(random.standard_normal((16, 6, 6, 8)), jnp.float32))
    activation = jnp.asarray(random.standard_normal((3, 8)), jnp.float32)
    convolve = lambda x, a, w, p: kernels.convolve_by_lanes(x, a, w, None, p, strides=(2, 2), statistics=True)
    results, vjp = jax.vjp(lambda x, a, w: convolve(x, a, w, kernels.with_dense_gradients(pattern)), x, activation, weight)
    probe = sj.compact.probes({'w': layout}, dtype=jnp.float32)
    scored = lambda x, a, v, p: convolve(x, a, v, sj.compact.with_probes({'w': layout}, {'w': p})['w'])
    compact_results, compact_vjp = jax.vjp(scored, x, activation, values, probe['w'])
    jax.tree.map(np.testing.assert_array_equal, compact_results, results)
    cotangents = jax.tree.map(lambda y: jnp.asarray(random.standard_normal(y.shape), jnp.float32), results)
    (dx, da, dw), (dx_compact, da_compact, d_values, scores) = vjp(cotangents), compact_vjp(cotangents)
    np.testing.assert_array_equal(dx_compact, dx)
    np.testing.assert_array_equal(da_compact, da)
    np.testing.assert_allclose(d_values, layout_lib.gather(dw, layout), rtol=1e-5, atol=1e-4)
    expected = dw if isinstance(granularity, Unstructured) else granularity.collapse(jnp.abs(dw), 0, jax.lax.add) / 16
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
