"""Eight virtual devices against one: where arrays lie, mask updates bit for bit, training, kernels, and checkpoints on another mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparse_jax as sj
from sparse_jax import config as config_lib
from sparse_jax import sharding, train
from sparse_jax.aot import collectives
from sparse_jax.core import layers as layers_lib
from sparse_jax.kernels.cpu import operations as cpu
from sparse_jax.runtime import checkpoint
from sparse_jax.train import devices as devices_lib
from tests.kernels import kernel_cases

needs_compiler = pytest.mark.skipif(bool(cpu.unavailable()), reason='needs a C++ compiler: install g++ or clang++')


def _transformer(data=1, model=1, layout='data', **settings):
    """A config of a small one, whose every axis divides by eight."""
    config = config_lib.Config()
    config.model.name, config.model.depth, config.model.features, config.model.heads, config.model.hidden = (
        'transformer',
        2,
        64,
        8,
        96,
    )
    config.data.name, config.data.length, config.data.batch_size = 'stdlib', 16, 16
    config.sparsity.density, config.sparsity.update_every, config.sparsity.dense_gradient_window = 0.2, 10, None
    config.train.steps, config.optimizer.learning_rate = 40, 0.1
    config.mesh.data, config.mesh.model, config.mesh.layout = data, model, layout
    for name, value in settings.items():
        config_lib.override(config, name.replace('__', '.'), value)
    return config


def _experiment(config):
    return train.create(config, num_examples=160, input_shape=(16,), num_outputs=256)


def _init(experiment, devices, seed=0):
    options = {'xla_backend_optimization_level': 0}  # quick to compile
    return devices.jit(experiment.init, devices.state_shardings, compiler_options=options)(jax.random.key(seed))


def _batch(step):
    text = np.random.default_rng(step).integers(0, 256, (16, 17))
    text[:, 1:] = np.where(text[:, 1:] < 200, text[:, :-1] * 3 % 256, text[:, 1:])  # something to learn
    return {'input': text[:, :-1].astype(np.int32), 'label': text[:, 1:].astype(np.int32)}


def _masks(state):
    return {path: np.asarray(m) for path, m in layers_lib.leaf_paths(sj.get_masks(state.opt_state)) if m.ndim}


# Meshes and rules


def test_sizes_fill_the_devices_or_are_refused():
    assert dict(sharding.make_mesh(-1, 2).shape) == {'data': 4, 'model': 2}
    assert dict(sharding.make_mesh(2, -1).shape) == {'data': 2, 'model': 4}
    for sizes, message in (
        ((3, 1), 'does not fit the 8 devices'),
        ((-1, 3), 'does not fit'),
        ((-1, -1), 'one of them -1'),
        ((0, 8), 'at least 1'),
    ):
        with pytest.raises(ValueError, match=message):
            sharding.make_mesh(*sizes)


def test_weights_lie_by_the_rules_of_each_layout():
    """Axes 'data' of 2 and 'model' of 4. Expected by hand: of the Transformer's stacked kernels the last two axes are inputs and outputs."""
    params = jax.eval_shape(_experiment(_transformer()).init, jax.random.key(0)).params
    mesh = sharding.make_mesh(2, 4)
    of = lambda layout: {row.path: tuple(row.spec) for row in sharding.placements(params, mesh, layout)}
    columns, rows = 'layers/mlp/up/kernel', 'layers/mlp/down/kernel'
    assert set(of('data').values()) == {()}
    assert of('model')[columns] == (None, None, 'model') and of('model')[rows] == (None, 'model', None)
    assert of('model')['layers/attention/out/kernel'] == (None, 'model', None)
    assert of('fsdp')[columns] == (None, 'data', None) and of('fsdp')[rows] == (None, 'data', None)
    assert of('model+fsdp')[columns] == (None, 'data', 'model') and of('model+fsdp')[rows] == (None, 'model', 'data')
    assert not any(axes for path, axes in of('model+fsdp').items() if 'norm' in path)


def test_what_does_not_divide_stays_whole_and_the_row_says_so():
    params = {
        'conv': {'kernel': jax.ShapeDtypeStruct((3, 3, 6, 8), jnp.float32)},
        'norm': {'scale': jax.ShapeDtypeStruct((8,), jnp.float32)},
    }
    conv, norm = sharding.placements(params, sharding.make_mesh(4, 2), 'model+fsdp')
    assert conv.spec == P(None, None, None, 'model') and conv.note == '6 does not divide by data=4'
    assert (conv.bytes, conv.bytes_per_device) == (3 * 3 * 6 * 8 * 4, 3 * 3 * 6 * 4 * 4)
    assert norm.spec == P() and not norm.note


def test_own_rules_come_first_and_one_that_is_of_no_leaf_is_refused():
    params = {
        'fc1': {'kernel': jax.ShapeDtypeStruct((8, 8), jnp.float32)},
        'fc2': {'kernel': jax.ShapeDtypeStruct((8, 8), jnp.float32)},
    }
    mesh = sharding.make_mesh(4, 2)
    rows = sharding.placements(params, mesh, 'model', rules=sharding.parse_rules('fc1=data,none'))
    assert [row.spec for row in rows] == [P('data', None), P(None, 'model')]
    with pytest.raises(ValueError, match="'fc3' is found in no leaf.*Leaves: fc1/kernel, fc2/kernel"):
        sharding.placements(params, mesh, 'model', rules=sharding.parse_rules('fc3=data'))
    with pytest.raises(ValueError, match="mesh.layout.*'fsdb'.*fsdp"):
        sharding.placements(params, mesh, 'fsdb')
    for text, message in (
        ('fc1', 'must be pattern=axes'),
        ('fc1=rows', 'must be pattern=axes'),
        ('(=data', 'no regular expression'),
    ):
        with pytest.raises(ValueError, match=message):
            sharding.parse_rules(text)


def test_masks_momenta_and_averages_lie_where_their_weights_do():
    config = _transformer(4, 2, 'model+fsdp', optimizer__name='adamw', train__average_decay='0.9')
    experiment = _experiment(config)
    devices = devices_lib.Devices(config, experiment)
    state = _init(experiment, devices)
    weight = state.params['layers']['mlp']['up']['kernel']
    same = [x for path, x in layers_lib.leaf_paths(state) if path.endswith('layers/mlp/up/kernel') and x.ndim]
    assert len(same) >= 5, 'the weight, its mask, both moments, the average'
    assert all(x.sharding == weight.sharding for x in same) and weight.sharding.spec == P(None, 'data', 'model')
    unwrap = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    shards = [shard for x in jax.tree.leaves(state) for shard in unwrap(x).addressable_shards if shard.device == jax.devices()[0]]
    assert devices._state_bytes()[1] == pytest.approx(sum(shard.data.nbytes for shard in shards), rel=1e-3)


def test_bad_meshes_and_batches_are_told():
    for settings, message in (
        (dict(data=3), 'does not fit the 8 devices'),
        (dict(data=4, model=2, layout='modle'), "Did you mean 'model'"),
        (dict(data=8, data__batch_size='12'), 'config.data.batch_size=12 must be a multiple of mesh.data=8'),
        (dict(data=8, mesh__rules='nothing=data'), 'is found in no leaf'),
    ):
        config = _transformer(**settings)
        with pytest.raises(ValueError, match=message):
            devices_lib.Devices(config, _experiment(config))


# Mask updates

SPECS = (
    P('data', 'model'), P('model', 'data'), P(None, 'model'), P('model', None),
    P('data', None), P(None, 'data'), P(('data', 'model'), None), P(None, ('data', 'model')),
)  # fmt: skip
SHAPES = {'a': (32, 64), 'b': (64, 32), 'conv': (3, 3, 32, 32), 'stacked': (3, 32, 64)}  # no part of eight cuts a block of 4x4
LAYERS = 6


@functools.cache
def _update(block, axis_type=AxisType.Auto):
    del axis_type  # a program of its own
    tx = sj.sparsify(
        optax.sgd(0.1, 0.9), density=0.25, update_every=1, total_steps=100, prune_rate=lambda t: 0.4,
        granularity='block:4x4' if block else 'unstructured', stacked=lambda path, leaf: 'stacked' in path,
    )  # fmt: skip
    return tx, jax.jit(tx.update)


@functools.cache
def _inputs(block, dtype, shapes=tuple(SHAPES.items())):
    """Parameters, state, gradients with ties, and what an update makes of them on one device."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes}
    tx, update = _update(block)
    state = jax.jit(tx.init)(params)
    grads = {name: jnp.asarray(np.round(4 * rng.normal(size=shape)) / 4, dtype) for name, shape in shapes}
    operands = grads, state, sj.apply_masks(params, sj.get_masks(state))
    return operands, _bytes(update(*operands))


def _placed(tree, mesh, spec):
    """Each leaf by a spec, or by its name's."""
    of = spec if isinstance(spec, dict) else dict.fromkeys(SHAPES, spec)
    lead = lambda path, x: P(*[None] * (x.ndim - 2), *of[path.split('/')[-1]])
    place = lambda path, x: NamedSharding(mesh, lead(path, x) if x.ndim > 1 and not path.endswith('layers') else P())
    placed = [jax.device_put(x, place(path, x)) for path, x in layers_lib.leaf_paths(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def _bytes(tree):
    unwrap = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(unwrap(x)).tobytes() for x in jax.tree.leaves(tree)]


def _check_update(operands, expected, mesh, spec, update, layers, axes):
    """The bits of one device; reductions only, in a round at most 64 bytes a layer and axis; and something moves."""
    operands = _placed(operands, mesh, spec)
    compiled = update.lower(*operands).compile()
    updates, after = compiled(*operands)
    assert _bytes((updates, after)) == expected
    masks = zip(jax.tree.leaves(after.masks), jax.tree.leaves(operands[1].masks), strict=True)
    assert sum(int((np.asarray(a) != np.asarray(b)).sum()) for a, b in masks) > 500, 'nothing moved'
    found = collectives.find(compiled.as_text())
    assert {c.kind for c in found} <= {'all-reduce'}, [c for c in found if c.kind != 'all-reduce']
    rounds = {}
    for c in found:
        if c.loop:
            rounds.setdefault(c.loop, []).append(c.bytes)
    assert rounds and max(map(sum, rounds.values())) <= 64 * layers * axes, rounds
    assert sum(c.bytes for c in found if not c.loop) <= 1024 * layers * axes, 'sums of momenta, once'
    return rounds


@pytest.mark.parametrize(
    'spec', [spec if i in (0, 2, 6) else pytest.param(spec, marks=pytest.mark.slow) for i, spec in enumerate(SPECS)], ids=str
)
def test_a_mask_update_has_the_bits_of_one_device_and_moves_few_bytes(spec):
    operands, expected = _inputs(False, 'float32')
    axes = len({axis for part in spec if part for axis in (part if isinstance(part, tuple) else (part,))})
    rounds = _check_update(operands, expected, sharding.make_mesh(4, 2), spec, _update(False)[1], LAYERS, axes)
    assert all(len(of_round) <= axes for of_round in rounds.values()), 'all layers in one reduction'


@pytest.mark.parametrize(
    ('block', 'dtype'),
    [(True, 'bfloat16'), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 'bfloat16'), (True, 'float32')))],
)
def test_leaves_of_all_layouts_in_one_update(block, dtype):
    """A matrix in each of the eight, in blocks and in bfloat16."""
    leaves = {f'matrix{i}': ((32, 64), spec) for i, spec in enumerate(SPECS)}
    operands, expected = _inputs(block, dtype, tuple((name, shape) for name, (shape, _) in leaves.items()))
    specs = {name: spec for name, (_, spec) in leaves.items()}
    _check_update(operands, expected, sharding.make_mesh(4, 2), specs, _update(block)[1], len(leaves), 2)


@pytest.mark.parametrize('spec', [SPECS[0], SPECS[5]], ids=str)
def test_a_mask_update_under_explicit_axes(spec):
    mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(AxisType.Explicit,) * 2)
    operands, expected = _inputs(False, 'float32')
    with jax.set_mesh(mesh):
        _check_update(operands, expected, mesh, spec, _update(False, AxisType.Explicit)[1], LAYERS, 2)


# Training


@functools.cache
def _alone():
    """Losses and masks of 20 steps on one device."""
    return _trained(_transformer())


def _trained(config, steps=20):
    experiment = _experiment(config)
    devices = devices_lib.Devices(config, experiment)
    state = _init(experiment, devices)
    placed = devices.replicated if devices.mesh is None else (devices.state_shardings, devices.replicated)
    quick = {'xla_backend_optimization_level': 0}  # to compile
    step = devices.jit(experiment.train_step, placed, static_argnames='dense_gradients', compiler_options=quick)
    losses, masks = [], [_masks(state)]
    for number in range(1, steps + 1):
        state, metrics = step(state, devices.batch(_batch(number), 16), None, dense_gradients=True)
        losses.append(float(metrics['loss']))
        if number % 10 == 0:
            masks.append(_masks(state))
    return losses, masks


@pytest.mark.parametrize(
    ('mesh', 'layout'), [((8, 1), 'data'), ((1, 8), 'model'), ((2, 4), 'fsdp'), ((2, 4), 'model+fsdp'), ((4, 2), 'model+fsdp')]
)
@pytest.mark.slow
def test_steps_on_every_mesh_and_layout_are_those_of_one_device(mesh, layout):
    losses, masks = _trained(_transformer(*mesh, layout))
    expected_losses, expected_masks = _alone()
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    assert losses[-1] < 0.99 * losses[0]
    for path in expected_masks[0]:
        np.testing.assert_array_equal(masks[0][path], expected_masks[0][path])
        np.testing.assert_array_equal(masks[1][path], expected_masks[1][path])
    moved = sum((masks[0][path] != masks[1][path]).sum() for path in masks[0])
    assert moved > 1000


# Kernels


@needs_compiler
@pytest.mark.parametrize('implementation', ['cpu', 'reference'])
@pytest.mark.parametrize('spec', [P(), P(None, 'model'), P('model', None), P('data', 'model')], ids=str)
def test_kernels_on_a_mesh_equal_float64(spec, implementation):
    """A convolution of 16 to 24 channels over 2 x 4 devices, its weight whole, by outputs, by inputs, and divided over 'data' too."""
    mesh = sharding.make_mesh(2, 4)
    case = (8, 6, 6, 16, 24, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 0.2, None)
    x, mask, w, dy = kernel_cases.make(case)
    place = NamedSharding(mesh, P(None, None, *(spec or (None, None))))
    pattern = sj.kernels.make_patterns({'w': mask}, shardings={'w': place})['w']
    put = lambda a, s: jax.device_put(a, NamedSharding(mesh, s))
    operands = put(x, P('data')), jax.device_put(w, place), put(dy, P('data'))
    product = lambda x, w, pattern: sj.kernels.sparse_conv(x, w, pattern, padding=((1, 1), (1, 1)), implementation=implementation)

    @jax.jit
    def all_three(x, w, dy, pattern):
        y, pull = jax.vjp(lambda x, w: product(x, w, pattern), x, w)
        return y, *pull(dy)

    got = all_three(*operands, pattern)
    expected = list(kernel_cases.convolution(x, w, dy, (1, 1), ((1, 1), (1, 1)), (1, 1)))
    dense = jax.jit(lambda x, w, dy, p: jax.vjp(lambda w: product(x, w, p), w)[1](dy)[0])(
        *operands, sj.kernels.with_dense_gradients(pattern)
    )
    np.testing.assert_allclose(dense, expected[2], atol=2e-5 * np.abs(expected[2]).max())
    expected[2] = np.where(mask, expected[2], 0)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    assert pattern.split.axis == (None if not spec or 'model' not in spec else [*spec].index('model') - 2)


@needs_compiler
def test_stacked_kernels_on_a_mesh_in_a_scan():
    mesh = sharding.make_mesh(2, 4)
    rng = np.random.default_rng(0)
    masks = rng.random((3, 16, 16)) < 0.3
    masks[1] = False
    place = NamedSharding(mesh, P(None, None, 'model'))
    patterns = sj.kernels.make_patterns({'w': masks}, stacked=lambda path, leaf: True, shardings={'w': place})['w']
    w, x = np.where(masks, rng.normal(size=masks.shape), 0).astype(np.float32), rng.normal(size=(8, 5, 16)).astype(np.float32)

    @jax.jit
    def loss_and_gradient(w, x, patterns):
        def loss(w):
            layer = lambda x, own: (x + sj.kernels.sparse_dot(x, *own, implementation='cpu'), None)
            return (jax.lax.scan(layer, x, (w, patterns))[0] ** 2).sum()

        return jax.value_and_grad(loss)(w)

    got, gradient = loss_and_gradient(jax.device_put(w, place), jax.device_put(x, NamedSharding(mesh, P('data'))), patterns)
    plain = lambda w: (functools.reduce(lambda x, w: x + x @ w, list(w), jnp.asarray(x)) ** 2).sum()
    expected, expected_gradient = jax.value_and_grad(plain)(jnp.asarray(w))
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    expected_gradient = np.where(masks, expected_gradient, 0)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-4 * np.abs(expected_gradient).max())


def test_parts_that_would_cut_blocks_stay_dense():
    mesh = sharding.make_mesh(2, 4)
    place = NamedSharding(mesh, P(None, 'model'))
    masks = {'w': np.ones((16, 24), bool)}
    assert sj.kernels.make_patterns(masks, block=(4, 4), shardings={'w': place})['w'] is None, '24 outputs in 4 parts: 6 each'
    assert sj.kernels.make_patterns(masks, block=(4, 2), shardings={'w': place})['w'] is not None


# Checkpoints


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_any_mesh(tmp_path):
    """Saved on 4 x 2, read on others, saved on one of them, and read again on the first: always the same state; and training goes on."""
    made = {}
    for data, model in ((4, 2), (2, 4), (8, 1), (1, 8), (1, 1)):
        config = _transformer(data, model, 'model+fsdp')
        experiment = _experiment(config)
        made[data, model] = experiment, devices_lib.Devices(config, experiment)
    state = _init(*made[4, 2], seed=3)
    whole = _bytes(state)
    folder = _saved(tmp_path / 'first', state)
    for mesh in ((8, 1), (1, 8), (1, 1), (2, 4)):
        experiment, devices = made[mesh]
        state = _restored(folder, devices)  # which compares fingerprints
        assert _bytes(state) == whole
        if devices.mesh is not None:
            assert state.params['layers']['mlp']['up']['kernel'].sharding.mesh.shape == devices.mesh.shape
    assert _bytes(_restored(_saved(tmp_path / 'second', state), made[4, 2][1])) == whole
    options = dict(static_argnames='dense_gradients', compiler_options={'xla_backend_optimization_level': 0})
    step = devices.jit(experiment.train_step, (devices.state_shardings, devices.replicated), **options)
    _, metrics = step(state, devices.batch(_batch(1), 16), None, dense_gradients=True)
    assert np.isfinite(float(metrics['loss']))


def _saved(folder, state):
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(1, state, 0.0)
    checkpoints.close()
    return folder


def _restored(folder, devices):
    checkpoints = checkpoint.Checkpoints(folder)
    _, state, _ = checkpoints.restore_newest(devices.shapes)
    checkpoints.close()
    return state
