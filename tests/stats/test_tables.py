"""Operations counted by hand and by XLA; the other numbers against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import sparse_jax as sj
from sparse_jax.stats.operations import MASK_UPDATE_OPERATIONS

pytestmark = pytest.mark.core


def _mask(shape, seed=0, density=0.3):
    return np.random.default_rng(seed).random(shape) < density


def _xla_flops(function, *inputs) -> float:
    cost = jax.jit(function).lower(*inputs).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)['flops']


def _by_hand(mask, image, strides, padding):
    """Multiply-adds of one image's convolution, by loops over output positions and taps."""
    height, width, *_ = mask.shape
    (top, bottom), (left, right) = padding
    total = 0
    for y in range(0, image[0] + top + bottom - height + 1, strides[0]):
        for x in range(0, image[1] + left + right - width + 1, strides[1]):
            for i in range(height):
                for j in range(width):
                    if 0 <= y + i - top < image[0] and 0 <= x + j - left < image[1]:
                        total += int(mask[i, j].sum())
    return total


@pytest.mark.parametrize(
    ('strides', 'padding'), [((1, 1), ((1, 1), (1, 1))), ((2, 2), ((0, 1), (2, 0))), ((2, 1), ((0, 0), (0, 0)))]
)
def test_a_convolution_with_stride_and_padding(strides, padding):
    mask = _mask((3, 3, 4, 6))
    conv = lambda p, x: lax.conv_general_dilated(x, p['w'], strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    params, x = {'w': jnp.ones(mask.shape)}, jnp.ones((5, 9, 8, 4))
    counted = sj.stats.operations(conv, params, {'w': jnp.asarray(mask)}, x)
    assert counted.inference == 5 * _by_hand(mask, (9, 8), strides, padding)
    assert counted.inference_dense == 5 * _by_hand(np.ones_like(mask), (9, 8), strides, padding)
    assert 2 * counted.inference_dense == _xla_flops(conv, params, x)
    assert not counted.layers['w'].input_gradient


def test_two_linear_layers_and_their_gradients():
    masks = {'a': jnp.asarray(_mask((20, 12))), 'b': jnp.asarray(_mask((12, 7), 1)), 'bias': jnp.array(True)}
    params = {'a': jnp.ones((20, 12)), 'b': jnp.ones((12, 7)), 'bias': jnp.ones(7)}
    apply = lambda p, x: jnp.tanh(x @ p['a']) @ p['b'] + p['bias']
    a, b = int(masks['a'].sum()), int(masks['b'].sum())
    counted = sj.stats.operations(apply, params, masks, jnp.ones((10, 20)), dense_gradient_window=5, update_every=20)
    assert counted.inference == 10 * (a + b) and counted.inference_dense == 10 * (240 + 84)
    products = 10 * (a + 2 * b) + 0.75 * 10 * (a + b) + 0.25 * 10 * (240 + 84)
    assert counted.training == pytest.approx(products + MASK_UPDATE_OPERATIONS * 324 / 20)
    assert counted.training_dense == 10 * (2 * 240 + 3 * 84)
    ones = jax.tree.map(jnp.ones_like, masks)
    assert sj.stats.operations(apply, params, ones, jnp.ones((10, 20))).training == counted.training_dense
    assert f'{counted.training / counted.training_dense:.2%}' in counted.table()
    assert counted.log()['operations/inference'] == counted.inference


def test_layers_stacked_for_scan_jit_checkpoint_and_transposition():
    mask = _mask((3, 8, 8))
    masks, params = {'w': jnp.asarray(mask)}, {'w': jnp.ones((3, 8, 8))}

    @jax.checkpoint
    def layer(x, w):
        return jax.jit(lambda x, w: jnp.tanh(x @ w.T.astype(jnp.bfloat16)))(x, w), None

    apply = lambda p, x: lax.scan(layer, x, p['w'])[0]
    counted = sj.stats.operations(apply, params, masks, jnp.ones((10, 8), jnp.bfloat16))
    assert counted.inference == 10 * mask.sum() and counted.inference_dense == 10 * 192
    assert counted.layers['w'].input_gradient == 10 * mask[1:].sum(), 'all layers but the first need it'
    assert counted.training_dense == 10 * 64 * (3 + 3 + 2)
    shared = sj.stats.operations(
        lambda p, x: lax.scan(lambda x, _: (x @ p['w'][0], None), x, None, length=4)[0], params, masks, jnp.ones((10, 8))
    )
    assert shared.inference == 4 * 10 * mask[0].sum()


def test_leaves_that_are_split_and_those_that_cannot_be_followed():
    mask = _mask((4, 12))
    masks, params, x = {'w': jnp.asarray(mask)}, {'w': jnp.ones((4, 12))}, jnp.ones((10, 4))
    fused = lambda p, x: [x @ part for part in jnp.split(p['w'], 3, axis=1)]
    assert sj.stats.operations(fused, params, masks, x).inference == 10 * mask.sum()
    for moved in (
        lambda p, x: x @ jnp.sort(p['w'], axis=1),
        lambda p, x: x[:, :2] @ lax.dynamic_slice(p['w'], (x[0, 0].astype(int), 0), (2, 12)),
    ):
        with pytest.raises(ValueError, match=r"w reaches a product through.*dense=\('w',\)"):
            sj.stats.operations(moved, params, masks, x)
        as_dense = sj.stats.operations(moved, params, masks, x, dense=('w',))
        assert as_dense.inference == as_dense.inference_dense >= 10 * 24
    with pytest.raises(ValueError, match=r'the mask of w has the shape \(2, 2\)'):
        sj.stats.operations(fused, params, {'w': jnp.ones((2, 2), bool)}, x)


def test_zeros_are_followed_through_concatenation_padding_and_gathers():
    """A fused projection, a padded one, and one whose rows are permuted: counted entry by entry of the matrix that is multiplied."""
    masks = {'a': _mask((4, 6), 0), 'b': _mask((4, 3), 1)}
    params = {name: jnp.ones(mask.shape) for name, mask in masks.items()} | {'dense': jnp.ones((4, 2))}
    whole = {name: jnp.asarray(mask) for name, mask in masks.items()} | {'dense': jnp.array(True)}
    x, order = jnp.ones((10, 4)), np.array([2, 0, 3, 1])
    counted = sj.stats.operations(lambda p, x: x @ jnp.concatenate([p['a'], p['dense'], p['b']], axis=1), params, whole, x)
    assert {name: layer.forward for name, layer in counted.layers.items()} == {
        name: 10 * mask.sum() for name, mask in masks.items()
    }
    assert {name: layer.forward_dense for name, layer in counted.layers.items()} == {'a': 240, 'b': 120}
    assert counted.other_forward == 80 and counted.other_backward == 80, 'the dense part, whose weights have a gradient'
    padded = sj.stats.operations(lambda p, x: x @ jnp.pad(p['a'], ((0, 0), (1, 2))), params, whole, x)
    assert padded.layers['a'].forward == 10 * masks['a'].sum() and padded.layers['a'].forward_dense == 10 * 4 * 9
    for gathered in (lambda p, x: x @ p['a'][order], lambda p, x: x @ jnp.take(p['a'], jnp.asarray(order), axis=0)):
        assert sj.stats.operations(gathered, params, whole, x).layers['a'].forward == 10 * masks['a'].sum()
    some = sj.stats.operations(lambda p, x: x[:, :2] @ p['a'][jnp.array([3, 3])], params, whole, x)
    assert some.layers['a'].forward == 10 * 2 * masks['a'][3].sum()
    chained = sj.stats.operations(lambda p, x: x @ jnp.concatenate([p['a'], p['b']], 1)[:, 3:8].T.T, params, whole, x)
    assert chained.inference == 10 * np.concatenate([masks['a'], masks['b']], 1)[:, 3:8].sum()
    with pytest.raises(ValueError, match=r"a reaches a product through 'gather'"):
        sj.stats.operations(lambda p, x: x @ p['a'][x[0].astype(int)], params, whole, x)


def test_leaves_that_partition_hides_and_those_of_nnx_are_counted_alike():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    tx = sj.sparsify(optax.sgd(0.1), density=0.25, update_every=2, total_steps=10)
    state, x = tx.init(params), jnp.ones((10, 8))
    counted = sj.stats.operations(lambda p, x: nnx.merge(graph, p)(x), params, state, x)
    assert counted.inference == 10 * 8 and list(counted.layers) == ['kernel']
    assert sj.stats.memory(params, state) == sj.stats.memory(nnx.as_pure(params), nnx.as_pure(state))

    params = {'w': jnp.ones((8, 4)), 'head': {'w': jnp.ones((4, 4))}}
    tx = optax.partition({'sparse': tx, 'dense': optax.adam(0.1)}, {'w': 'sparse', 'head': 'dense'})
    state = tx.init(params)
    counted = sj.stats.operations(lambda p, x: x @ p['w'] @ p['head']['w'], params, state, x)
    assert counted.inference == 10 * 8 + 10 * 16 and counted.inference_dense == 10 * 32 + 10 * 16
    assert sj.stats.memory(params, state)['dense'] == 4 * 48


def test_every_function_takes_params_first_and_then_masks_or_a_state():
    params, masks = {'w': jnp.ones((4, 4))}, {'w': jnp.eye(4, dtype=bool)}
    for call in (
        lambda: sj.apply_masks(masks, params),
        lambda: sj.stats.memory(masks, params),
        lambda: sj.stats.operations(lambda p: p['w'] @ p['w'], masks, params),
        lambda: sj.stats.density(params),
        lambda: sj.stats.density(optax.adam(0.1).init(params)),
    ):
        with pytest.raises(ValueError, match='masks'):
            call()
    with pytest.raises(ValueError, match=r'masks are another tree: no mask for b; no params for c'):
        sj.apply_masks({'a': params['w'], 'b': params['w']}, {'a': masks['w'], 'c': masks['w']})


def test_products_without_a_masked_leaf_are_counted_apart():
    params = {'w': jnp.ones((8, 8)), 'embed': jnp.ones((8, 8))}
    masks = {'w': jnp.eye(8, dtype=bool), 'embed': jnp.array(True)}

    def attention(p, x):
        x = x @ p['embed']
        y = x @ p['w']
        return jax.nn.softmax(y @ y.T)

    counted = sj.stats.operations(attention, params, masks, jnp.ones((10, 8)))
    assert counted.other_forward == 10 * 64 + 10 * 10 * 8
    assert counted.other_backward == 10 * 64 + 2 * 10 * 10 * 8
    assert counted.inference == 10 * 8 + counted.other_forward


def test_a_condition_counts_its_dearest_branch_and_a_while_loop_is_refused():
    masks, params = {'w': jnp.eye(4, dtype=bool)}, {'w': jnp.ones((4, 4))}
    branches = lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p['w'] @ p['w'], lambda: x @ p['w'])
    assert sj.stats.operations(branches, params, masks, jnp.ones((2, 4))).inference == 16
    loop = lambda p, x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ p['w'], x)
    with pytest.raises(ValueError, match='products stand in a while_loop'):
        sj.stats.operations(loop, params, masks, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match='dense_gradient_window=1 needs update_every'):
        sj.stats.operations(branches, params, masks, jnp.ones((2, 4)), dense_gradient_window=1)
    with pytest.raises(ValueError, match='expected the state of an optimizer with sparsify.*, or its masks, but w is float32'):
        sj.stats.operations(branches, masks, params, jnp.ones((2, 4)))


def test_grouped_and_dilated_convolutions_agree_with_xla():
    params, x = {'w': jnp.ones((3, 3, 2, 8))}, jnp.ones((2, 7, 7, 4))
    masks = {'w': jnp.ones((3, 3, 2, 8), bool)}
    grouped = lambda p, x: lax.conv_general_dilated(
        x, p['w'], (1, 1), 'SAME', rhs_dilation=(2, 2), feature_group_count=2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    assert 2 * sj.stats.operations(grouped, params, masks, x).inference == _xla_flops(grouped, params, x)


def test_summary_and_table_of_a_run():
    stacked = lambda path, leaf: path == 'blocks'
    tx = sj.methods.rigl(optax.sgd(0.1), 0.2, 2, 41, stacked=stacked, track_exploration=True)
    params = {'blocks': jax.random.normal(jax.random.key(0), (2, 10, 6)), 'head': jax.random.normal(jax.random.key(1), (6, 4))}
    state = tx.init(params)
    first = state.masks
    step = jax.jit(tx.update)
    for t in range(2):
        _, state = step(jax.tree.map(lambda p, t=t: jnp.roll(p, t + 1), params), state, sj.apply_masks(params, state.masks))
    numbers = sj.stats.summary(state)
    masks = {name: np.asarray(mask) for name, mask in state.masks.items()}
    assert numbers['nonzeros'] == masks['blocks'].sum() + masks['head'].sum() == round(0.2 * 144)
    assert numbers['density/blocks[1]'] == masks['blocks'][1].mean()
    assert numbers['dead_outputs/head'] == (~masks['head'].any(0)).sum()
    assert numbers['dead_inputs/blocks[0]'] == (~masks['blocks'][0].any(1)).sum()
    flipped = sum((masks[name] != np.asarray(first[name])).sum() for name in masks)
    assert numbers['flip_rate'] == flipped / 144 > 0
    ever = sum((masks[name] | np.asarray(first[name])).sum() for name in masks)
    assert numbers['exploration_rate'] == pytest.approx(ever / 144)
    table = sj.stats.table(state)
    assert (
        len(table.splitlines()) == 6 and 'blocks[1]' in table and 'exploration rate' in table and table.endswith('no dense leaves')
    )
    assert sj.layer_names(state) == ['blocks[0]', 'blocks[1]', 'head']
    assert sj.stats.density(state) == sj.stats.density(state.masks) == 29 / 144
    assert sj.stats.dead_neurons(state) == sj.stats.dead_neurons(state.masks, stacked)
    with pytest.raises(ValueError, match='the state knows which leaves are stacked'):
        sj.stats.dead_neurons(state, stacked)
    with pytest.raises(ValueError, match='expected the state of an optimizer .* but blocks is float32'):
        sj.stats.density(params)
    with pytest.raises(ValueError, match='traced, or has shapes only'):
        sj.layer_names(jax.eval_shape(tx.init, params))
    again = sj.set_masks(state, jax.tree.map(jnp.ones_like, state.masks))
    assert sj.stats.exploration_rate(again) == 1.0
    with pytest.raises(ValueError, match='track_exploration=True'):
        sj.stats.exploration_rate(sj.sparse_momentum(0.1, 0.5, 1, 9).init(params))
