"""What a network computes, moves and keeps: against sums by hand, XLA's own, and the arrays of a real state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sparse_jax as sj
from configs import mnist_lenet300
from sparse_jax import models
from sparse_jax.aot import collectives as compiled_collectives
from sparse_jax.plan import collectives, counts, hardware, memory, step_time
from sparse_jax.plan.collectives import Mesh as PlannedMesh
from sparse_jax.plan.step_time import Choice
from sparse_jax.train import run
from tests.plan.networks import planned


def _shape(*sides, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sides, dtype)


def test_lenet_300_100_by_hand():
    counted = planned('lenet300').counts
    products = [784 * 300, 300 * 100, 100 * 10]
    assert [p.operations for p in counted.products] == products and counted.forward == sum(products)
    assert counted.backward == 2 * sum(products) - products[0], 'nothing needs the gradient of an image'
    assert counted.parameters == 266_610 and counted.logits == 10
    assert [(p.read, p.written) for p in counted.products] == [(784, 300), (300, 100), (100, 10)]


@settings(deadline=None, max_examples=12)
@given(
    side=st.integers(3, 9),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 5),
    taps=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
)
def test_convolutions_equal_a_count_of_all_taps_inside_the_image(side, inputs, outputs, taps, stride):
    half = taps // 2
    apply = lambda p, x: jax.lax.conv_general_dilated(
        x, p['kernel'], (stride, stride), [(half, half)] * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    [product] = counts.count(apply, {'kernel': _shape(taps, taps, inputs, outputs)}, _shape(1, side, side, inputs)).products
    positions = range(0, side, stride)
    inside = sum(0 <= p + t - half < side for p in positions for t in range(taps))
    assert product.operations == inside**2 * inputs * outputs
    assert product.geometry == (side, side, inputs, taps, taps, outputs, stride, len(positions), len(positions))


@pytest.mark.parametrize('name', ['lenet5', 'vgg_d', 'wrn_16_8'])
def test_products_are_within_one_percent_of_xlas_own_count(name):
    shape = (28, 28, 1) if name == 'lenet5' else (32, 32, 3)
    model = models.create(name, input_shape=shape, num_outputs=10, layout='channels')
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), state)
    apply = lambda p, x: model.apply(p, zeros, x, train=False, rng=None)[0]
    example = _shape(1, *shape)
    counted = counts.count(apply, params, example)
    cost = jax.jit(apply).lower(params, example).cost_analysis()
    elementwise = 5 * counted.moved  # what XLA counts between products: a few operations for each number that is read or written
    assert 2 * counted.forward <= cost['flops'] * 1.001
    assert cost['flops'] <= 2 * counted.forward * 1.01 + elementwise


def test_scans_and_attention_are_counted_for_every_layer_and_head():
    config = planned('lm').config
    depth, d, heads, length = config.model.depth, config.model.features, config.model.heads, config.data.length
    hidden = -(-8 * d // 3 // 64) * 64
    counted = planned('lm').counts
    per_token = depth * (4 * d * d + 3 * d * hidden) + 257 * d
    attention = 2 * depth * heads * length**2 * (d // heads)
    assert counted.forward == length * per_token + attention
    assert counted.backward == 2 * counted.forward and counted.parameters == 1_820_544
    assert sum(p.operations for p in counted.products if not p.name) == attention


@pytest.mark.parametrize('name', ['lenet300', 'lm'])
def test_the_states_bytes_are_those_of_its_arrays(name):
    network = planned(name)
    experiment = run.create_experiment(network.config, run.load_data(network.config)) if name == 'lenet300' else None
    predicted = memory.memory(network, hardware.devices()['H100'], Choice(PlannedMesh(1, 1)))
    if experiment is None:
        weights = 4 * network.counts.parameters
        assert predicted.weights == weights and predicted.optimizer == pytest.approx(2 * weights, rel=1e-3)
        return
    state = experiment.init(jax.random.key(0))
    arrays = [
        x
        for x in jax.tree.leaves((state.params, state.opt_state))
        if hasattr(x, 'dtype') and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    assert predicted.state == pytest.approx(sum(x.nbytes for x in arrays), rel=0.02)


def test_densities_are_those_that_the_masks_have():
    network = planned('lenet300')
    config = mnist_lenet300.get_config('offline')
    experiment = run.experiment_of_shapes(config)
    state = jax.jit(experiment.init)(jax.random.key(0))
    masks = sj.get_masks(state.opt_state)
    for name, density in network.densities().items():
        mask = np.asarray(masks[name.split('/')[0]]['kernel'])
        assert mask.mean() == pytest.approx(density, abs=1e-9)


def test_gradients_sent_are_those_of_the_compiled_program():
    """Four devices, each with a part of the batch: the program sums gradients, and nothing else of their size."""
    network = planned('lenet300')
    model = models.create('lenet300', input_shape=(28, 28, 1), num_outputs=10)
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    mesh = Mesh(np.array(jax.devices()[:4]), ('data',))
    loss = lambda p, x: jnp.mean(model.apply(p, state, x, train=False)[0] ** 2)
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
    step = jax.jit(jax.grad(loss), in_shardings=(replicated, split), out_shardings=replicated)
    found = compiled_collectives.find(step.lower(params, _shape(16, 28, 28, 1)).compile().as_text())
    summed = sum(c.bytes for c in found if c.kind == 'all-reduce')
    sent = step_time.step(network, hardware.devices()['A100'], Choice(PlannedMesh(4, 1))).sent
    assert 4 * network.counts.parameters <= summed <= 1.01 * 4 * network.counts.parameters
    assert sent.reduce_gradients == pytest.approx(2 * 3 / 4 * summed, rel=0.01) and sent.bytes == sent.reduce_gradients


def test_what_model_parallelism_and_full_sharding_send_by_hand():
    """Two sums of the features a layer forward and five backward; weights gathered twice, gradients reduced once, in float32."""
    network = planned('lm')
    config, weights = network.config, 4 * network.counts.parameters
    features = 4 * config.data.batch_size * config.data.length * config.model.features * config.model.depth  # bytes, all layers
    at = lambda *mesh: step_time.step(network, hardware.devices()['A100'], Choice(PlannedMesh(*mesh))).sent
    assert at(1, 2).activations == pytest.approx((2 + 5) * collectives.ring(features, 2))
    assert at(2, 2).activations == pytest.approx((2 + 5) * collectives.ring(features / 2, 2))
    assert at(4, 1, True).gather_weights == pytest.approx(2 * 3 / 4 * weights)
    assert at(4, 1, True).reduce_gradients == pytest.approx(3 / 4 * weights)
    assert at(4, 1).reduce_gradients == pytest.approx(2 * 3 / 4 * weights)


def test_results_of_a_split_weight_as_in_the_guide():
    """A weight of 1000x1000 over four devices, 128 examples: outputs that were split are stacked, partial sums added."""
    results = 4 * 128 * 1000
    assert collectives.gather(results, 4) == 384_000  # each device sends its 128x250 to three others, in a ring
    assert collectives.ring(results, 4) == 768_000
