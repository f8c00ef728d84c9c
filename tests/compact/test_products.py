"""Products with compact values: against float64, finite differences, and what they must refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sparse_jax as sj
from sparse_jax import kernels
from sparse_jax.core.granularity import Block, Unstructured
from sparse_jax.kernels import layout as layout_lib
from tests.compact.test_lists import layout_of, random_mask
from tests.kernels.test_compiler import needs_compiler

pytestmark = pytest.mark.core

IMPLEMENTATIONS = ('reference', pytest.param('cpu', marks=needs_compiler))
# shape of the weight, of x, granularity, geometry
CASES = [
    ((40, 33), (5, 40), Unstructured(), {}),
    ((40, 33), (300, 40), Unstructured(), {}),
    ((40, 33), (2, 3, 40), Block(4, 8), {}),
    ((3, 3, 16, 24), (4, 9, 9, 16), Unstructured(), dict(strides=(2, 1))),
    ((3, 3, 16, 24), (4, 9, 9, 16), Block(4, 16), dict(dilation=(1, 2), padding='VALID')),
    ((1, 1, 16, 24), (4, 9, 9, 16), Block(8, 8), dict(strides=(2, 2))),
    ((3, 3, 8, 8), (2, 5, 5, 8), Block(4, 4, whole_kernel=True), {}),
]


def _product(shape, implementation, geometry):
    function = kernels.sparse_dot if len(shape) == 2 else functools.partial(kernels.sparse_conv, **geometry)
    return functools.partial(function, implementation=implementation)


def _dense(shape, geometry):
    return jnp.matmul if len(shape) == 2 else functools.partial(kernels.convolve, **geometry)


def _operands(shape, x_shape, granularity, dtype=jnp.float32, room=7):
    random = np.random.default_rng(0)
    mask = random_mask(shape, granularity, 0.3, 3)
    weight = jnp.asarray(np.where(mask, random.standard_normal(shape), 0), dtype)
    layout = layout_of(mask, granularity, room)
    return jnp.asarray(random.standard_normal(x_shape), dtype), weight, layout


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize(('shape', 'x_shape', 'granularity', 'geometry'), CASES)
def test_products_gradients_and_scores(shape, x_shape, granularity, geometry, implementation):
    x, weight, layout = _operands(shape, x_shape, granularity)
    values = layout_lib.gather(weight, layout)
    probe = sj.compact.probes({'w': layout}, dtype=jnp.float32)['w']
    y, vjp = jax.vjp(lambda x, v, p: _product(shape, implementation, geometry)(x, v, layout, probe=p), x, values, probe)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, weight)]
        expected, dense_vjp = jax.vjp(_dense(shape, geometry), *wide)
        cotangent = np.random.default_rng(1).standard_normal(y.shape)
        dx_expected, dw_expected = map(np.asarray, dense_vjp(jnp.asarray(cotangent)))
    dx, d_values, scores = vjp(jnp.asarray(cotangent, jnp.float32))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-3)
    close(y, expected)
    close(dx, dx_expected)
    close(d_values, layout_lib.gather(jnp.asarray(dw_expected, jnp.float32), layout))
    assert not np.asarray(d_values)[int(layout.pointers[-1]) :].any(), 'no gradient in the padding'
    if isinstance(granularity, Unstructured):
        close(scores, dw_expected)
    else:
        rows, columns = granularity.sides
        pad = [(0, 0)] * (len(shape) - 2) + [(0, -shape[-2] % rows), (0, -shape[-1] % columns)]
        lead = shape[:-2]
        blocks = lambda a: np.pad(a, pad).reshape(*lead, -(-shape[-2] // rows), rows, -(-shape[-1] // columns), columns)
        sums, area = (blocks(a).sum((-3, -1)) for a in (np.abs(dw_expected), np.ones(shape)))
        close(scores, sums / area)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_gradients_by_finite_differences(implementation):
    x, weight, layout = _operands((12, 10), (20, 12), Unstructured())
    values = layout_lib.gather(weight, layout)
    loss = lambda v: jnp.sum(jnp.sin(_product((12, 10), implementation, {})(x, v, layout)))
    gradient, step = jax.grad(loss)(values), 1e-2
    for i in range(0, int(layout.pointers[-1]), 5):
        change = jnp.zeros_like(values).at[i].set(step)
        slope = (float(loss(values + change)) - float(loss(values - change))) / (2 * step)
        assert abs(slope - float(gradient[i])) < 2e-2, i


@needs_compiler
@pytest.mark.parametrize('rows', (3, 16, 40, 257))
def test_the_kernels_give_the_bits_of_the_dense_storage(rows):
    x, weight, layout = _operands((70, 50), (rows, 70), Unstructured())
    pattern = kernels.make_pattern(np.asarray(weight) != 0, implementation='cpu')
    y, vjp = jax.vjp(lambda x, w: kernels.sparse_dot(x, w, pattern), x, weight)
    z, compact_vjp = jax.vjp(
        lambda x, v: kernels.sparse_dot(x, v, layout, implementation='cpu'), x, layout_lib.gather(weight, layout)
    )
    cotangent = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    (dx, dw), (dx_compact, d_values) = vjp(cotangent), compact_vjp(cotangent)
    np.testing.assert_array_equal(y, z)
    np.testing.assert_array_equal(dx, dx_compact)
    np.testing.assert_array_equal(layout_lib.gather(dw, layout), d_values)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_under_scan_checkpoint_vmap_and_accumulation(implementation):
    masks = np.stack([random_mask((16, 16), Unstructured(), 0.4, seed) for seed in range(3)])
    weights = jnp.asarray(np.where(masks, np.random.default_rng(0).standard_normal(masks.shape), 0), jnp.float32)
    values, layout = sj.compact.compress({'w': weights}, {'w': jnp.asarray(masks)}, stacked=lambda path, leaf: True)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((10, 16)), jnp.float32)
    probes = sj.compact.probes(layout, dtype=jnp.float32)

    def network(values, probes, x):
        @jax.checkpoint
        def layer(h, row):
            v, lists, probe = row
            return jnp.tanh(kernels.sparse_dot(h, v, lists, probe=probe, implementation=implementation)), None

        return jnp.sum(jax.lax.scan(layer, x, (values['w'], layout['w'], probes['w']))[0] ** 2)

    dense = lambda w, x: jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0] ** 2)
    expected = jax.grad(dense)(weights, x)
    grads, scores = jax.jit(jax.grad(network, (0, 1)))(values, probes, x)
    np.testing.assert_allclose(scores['w'], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sj.compact.expand(grads, layout)['w'], np.where(masks, expected, 0), rtol=1e-4, atol=1e-4)
    halves = [jax.grad(network, (0, 1))(values, probes, part) for part in jnp.split(x, 2)]
    total = jax.tree.map(jnp.add, *halves)
    np.testing.assert_allclose(total[1]['w'], expected, rtol=1e-4, atol=1e-4)
    each = jax.vmap(lambda row: jax.grad(network)(values, probes, row[None]))(x)
    np.testing.assert_allclose(each['w'].sum(0), grads['w'], rtol=1e-3, atol=1e-4)


@needs_compiler
def test_an_ordinary_step_holds_nothing_of_a_leafs_dense_size():
    shape = (96, 80)
    x, weight, layout = _operands(shape, (32, 96), Unstructured())
    values = layout_lib.gather(weight, layout)
    loss = lambda v, probe: jnp.sum(kernels.sparse_dot(x, v, layout, probe=probe, implementation='cpu') ** 2)
    compiled = lambda f, *args: jax.jit(f).lower(*args).compile().as_text()
    text = compiled(jax.grad(lambda v: loss(v, None)), values)
    assert '96,80]' not in text and '7680]' not in text
    assert '96,80]' in compiled(jax.grad(loss, (0, 1)), values, jnp.zeros(shape, jnp.bfloat16)), 'with scores it does'


@needs_compiler
def test_scores_by_block_never_make_the_whole_gradient():
    layout = layout_of(random_mask((8192, 1024), Block(64, 64), 0.1, 0), Block(64, 64))
    values, probe = jnp.zeros(layout.values_shape), jnp.zeros((128, 16))
    loss = lambda v, p, x: jnp.sum(kernels.sparse_dot(x, v, layout, probe=p, implementation='cpu'))
    text = jax.jit(jax.grad(loss, (0, 1))).lower(values, probe, jnp.ones((32, 8192))).compile().as_text()
    assert '8192,1024]' not in text and '4096,1024]' in text


WRONG = [
    (dict(probe=jnp.zeros((3, 3))), 'the probe is float32[3, 3], it must be floating point of shape (40, 33)'),
    (dict(dense_gradient=True), 'pass probe= to get the scores of missing units'),
    (dict(values=jnp.zeros(3)), 'both must come from the same compress, plan or reserve'),
    (dict(x=jnp.ones((2, 39))), 'has 39 features, w of shape (40, 33) takes 40'),
    (dict(x=jnp.ones((2, 40), jnp.bfloat16)), 'x and w must be of one floating-point type'),
]


@pytest.mark.parametrize(('given', 'message'), WRONG)
def test_what_does_not_fit_is_told(given, message):
    x, weight, layout = _operands((40, 33), (2, 40), Unstructured())
    arguments = dict(x=x, values=layout_lib.gather(weight, layout)) | {k: v for k, v in given.items() if k in ('x', 'values')}
    options = {k: v for k, v in given.items() if k not in arguments}
    with pytest.raises(ValueError) as error:
        kernels.sparse_dot(arguments['x'], arguments['values'], layout, **options)
    assert message in str(error.value)


def test_a_probe_needs_compact_values_and_frozen_layouts_do_not_train():
    x, weight, layout = _operands((40, 33), (2, 40), Unstructured())
    pattern = kernels.make_pattern(np.asarray(weight) != 0)
    with pytest.raises(ValueError, match='probe= goes with compact values'):
        kernels.sparse_dot(x, weight, pattern, probe=jnp.zeros((40, 33)))
    frozen = kernels.freeze({'w': weight}, {'w': weight != 0})['w']
    with pytest.raises(ValueError, match='that of a frozen weight'):
        kernels.sparse_dot(x, frozen.values, frozen.layout)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), layout)
    with pytest.raises(ValueError, match='several layers'):
        kernels.sparse_dot(x, jnp.zeros(stacked.values_shape), stacked)


def test_a_probe_of_blocks_serves_one_product():
    x, weight, layout = _operands((40, 33), (2, 40), Block(4, 8))
    values, probe = layout_lib.gather(weight, layout), sj.compact.probes({'w': layout})['w']
    twice = lambda v, p: sum(jnp.sum(kernels.sparse_dot(scale * x, v, layout, probe=p)) for scale in (1.0, 2.0))
    with pytest.raises(ValueError, match='used for a second product'):
        jax.grad(twice, (0, 1))(values, probe)
    once = lambda v, p: jnp.sum(kernels.sparse_dot(x, v, layout, probe=p))
    for _ in range(2):  # another trace is another matter
        jax.jit(jax.grad(once, (0, 1)))(values, probe)
    jax.grad(lambda v, p: jax.lax.cond(v.sum() > 0, once, lambda v, p: 2 * once(v, p), v, p), (0, 1))(values, probe)
    examples = lambda v, p: jnp.sum(jax.vmap(lambda row: jnp.sum(kernels.sparse_dot(row[None], v, layout, probe=p)))(x))
    with pytest.raises(NotImplementedError, match='scores by block under vmap would be sums'):
        jax.grad(examples, 1)(values, probe)
    jax.grad(lambda v: examples(v, None))(values)
    each = jax.vmap(jax.grad(once, 1), (None, 0))(values, jnp.stack([probe, probe]))
    np.testing.assert_array_equal(each[0], jax.grad(once, 1)(values, probe))
    mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))
    with pytest.raises(NotImplementedError, match='part of the batch inside of shard_map'):
        jax.shard_map(
            lambda x, v, p: jnp.sum(kernels.sparse_dot(x, v, layout, probe=p), keepdims=True),
            mesh=mesh,
            in_specs=(P('data'), P(), P()),
            out_specs=P('data'),
        )(x, values, probe)


def test_a_platform_without_kernels_for_compact_values_says_so_and_takes_the_reference():
    w = jnp.eye(128)
    values, layout = sj.compact.compress({'w': w}, {'w': jnp.ones((128, 128), bool)}, granularity='block:128x128')
    x = jnp.ones((8, 128))
    with sj.kernels.lowering_for('tpu'), pytest.raises(NotImplementedError, match='it has no kernel for compact weights'):
        sj.kernels.sparse_dot(x, values['w'], layout['w'], implementation='tpu')
    with sj.kernels.lowering_for('tpu'):
        np.testing.assert_array_equal(sj.kernels.sparse_dot(x, values['w'], layout['w']), x)
