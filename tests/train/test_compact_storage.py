"""Runs with compact storage: against dense storage, numpy and float64; resumed, moved to other storages and meshes, and refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mnist_lenet5, mnist_lenet300
from sparse_jax import compact, train
from sparse_jax import config as config_lib
from sparse_jax.export import files
from sparse_jax.kernels.cpu import operations as cpu
from sparse_jax.runtime import checkpoint
from sparse_jax.train import devices as devices_lib
from sparse_jax.train import exporting, memory_table, storage
from sparse_jax.train import optimizer as optimizer_lib
from sparse_jax.train import run as run_lib
from tests.train.test_runs import _final_state

needs_compiler = pytest.mark.skipif(bool(cpu.unavailable()), reason='needs a C++ compiler: install g++ or clang++')


def _config(base=mnist_lenet300, **settings):
    config = base.get_config('offline')
    config.mesh.data = 1  # of this process's eight devices
    config.sparsity.storage, config.sparsity.kernels, config.sparsity.update_every = 'compact', 'reference', 20
    config.train.steps, config.train.eval_every, config.checkpoint.every, config.log.every = 60, 1000, 1000, 10
    for name, value in settings.items():
        config_lib.override(config, name.replace('__', '.'), str(value))
    return config


def _losses(folder):
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [row['loss'] for row in rows if 'loss' in row]


WINDOWED = dict(
    sparsity__dense_gradient_window=7,
    train__accumulate=2,
    train__average_decay=0.9,
    optimizer__clip_norm=0.5,
    checkpoint__every=15,
    checkpoint__keep=9,
)


@pytest.mark.slow
@pytest.mark.parametrize('name', optimizer_lib.OPTIMIZERS)
def test_every_optimizer_of_the_launcher_works_element_by_element(name):
    """So that a training need not find it out when it starts."""
    config = _config(optimizer__name=name, optimizer__weight_decay=0.1, optimizer__clip_norm=1.0)
    state = jax.eval_shape(run_lib.experiment_of_shapes(config).init, jax.random.key(0))
    whole = {
        'fc1': {'kernel': jnp.ones((784, 300))},
        'fc2': {'kernel': jnp.ones((300, 100))},
        'fc3': {'kernel': jnp.ones((100, 10))},
    }
    for layer, features in (('fc1', 300), ('fc2', 100), ('fc3', 10)):
        whole[layer]['bias'] = jnp.ones(features)
    tx = optimizer_lib.create(config.optimizer, lambda step: 0.1, whole)
    assert compact.check(tx, state.params, state.opt_state.layout) is tx


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Sparse momentum with all that a step can do; a save inside the window before an update, and one after room ran out."""
    folder = tmp_path_factory.mktemp('compact') / 'run'
    return folder, train.train(_config(**WINDOWED), folder)


def test_a_run_keeps_its_budget_and_says_so(run, capsys):
    folder, result = run
    assert result['nonzeros'] == 13_310 and result['parameters'] == 266_610 and result['density'] == 0.05
    assert 'exploration_rate' not in result
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    sizes = {'fc1/kernel': 235_200, 'fc2/kernel': 30_000, 'fc3/kernel': 1_000}
    densities = [row['density'] for row in rows if 'density' in row]
    assert len(densities) == 3  # at the start and after two updates
    assert all(round(sum(row[name] * size for name, size in sizes.items())) == 13_310 for row in densities)
    assert densities[0] != densities[-1]


@pytest.mark.parametrize('step', [15, 45])
def test_a_run_goes_on_bit_for_bit_from_within_the_window_and_after_room_ran_out(step, run, tmp_path):
    folder, result = run
    copy = tmp_path / 'copy'
    shutil.copytree(folder, copy)
    for later in (copy / 'checkpoints').iterdir():
        if int(later.name) > step:
            shutil.rmtree(later)
    (copy / 'result.json').unlink()
    arrays = json.loads((copy / 'checkpoints' / str(step) / 'meta' / 'metadata').read_text())['arrays']
    has_scores = any(name.startswith('opt_state/scores/') for name in arrays)
    assert has_scores == (step == 15)  # of the steps 14 to 20
    first = 'opt_state/layout/fc2/kernel/indices'
    assert (arrays[first] == 'int32[1792]') == (step == 15)
    again = train.train(_config(**WINDOWED), copy)
    same = lambda result: {k: v for k, v in result.items() if 'second' not in k}
    assert same(again) == same(result)
    for (name, a), b in zip(_final_state(folder).items(), _final_state(copy).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@needs_compiler
def test_without_mask_updates_both_storages_train_the_same_bits(tmp_path):
    results = []
    for kind in storage.STORAGES:
        config = _config(sparsity__storage=kind, sparsity__method='static', sparsity__kernels='cpu', train__steps=40)
        train.train(config, tmp_path / kind)
        results.append((_losses(tmp_path / kind), *exporting.network(config, tmp_path / kind)[:2]))
    (losses, params, masks), (others, same, same_masks) = results
    assert losses == others
    jax.tree.map(np.testing.assert_array_equal, (params, masks), (same, same_masks))


def _create(**settings):
    config = _config(**{'data__batch_size': 20, **settings})
    return config, train.create(config, num_examples=400, input_shape=(28, 28, 1), num_outputs=10)


def _batch(step, size=20):
    random = np.random.default_rng(step)
    return {'input': random.random((size, 28, 28, 1), np.float32), 'label': random.integers(10, size=size).astype(np.int32)}


def _gradients(experiment, state, batch):
    """Of all weights, those that do not exist too."""
    whole = compact.expand(state.params, state.opt_state.layout)

    def loss(params):
        logits = experiment.apply(params, state.model_state, batch['input'], train=True)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch['label'][:, None], 1))

    return jax.tree.map(np.asarray, jax.grad(loss)(whole))


def _one_step(experiment, step, state, jitted):
    state = experiment.before_step(step, state)
    return jitted(state, _batch(step))[0]


def test_rigl_moves_what_numpy_moves_by_the_gradient_of_the_step():
    _, experiment = _create(sparsity__method='rigl', sparsity__update_every=3, optimizer__momentum=0, optimizer__learning_rate=0.01)
    state, step_fn = experiment.init(jax.random.key(0)), jax.jit(experiment.train_step)
    for step in range(1, 7):
        wanted = _gradients(experiment, state, _batch(step))
        state = _one_step(experiment, step, state, step_fn)
        assert (state.opt_state.scores is not None) == (step % 3 == 0)
        if step % 3:
            assert experiment.after_step(step, state) is state
            continue
        scores = jax.tree.map(lambda x: np.asarray(x, np.float32), state.opt_state.scores)
        before = jax.tree.map(
            np.asarray, (compact.expand(state.params, state.opt_state.layout), compact.masks(state.opt_state.layout))
        )
        state = experiment.after_step(step, state)
        assert state.opt_state.scores is None
        for layer in ('fc1', 'fc2', 'fc3'):
            w, mask, g = before[0][layer]['kernel'], before[1][layer]['kernel'], scores[layer]['kernel']
            np.testing.assert_allclose(g, wanted[layer]['kernel'], rtol=0.01, atol=1e-6)
            count = int(np.ceil(np.float32(experiment.prune_rate(step)) * np.float32(mask.sum())))
            order = np.argsort(np.where(mask, np.abs(w), np.inf), axis=None, kind='stable')
            kept = mask.copy()
            kept.flat[order[:count]] = False
            order = np.argsort(np.where(kept, np.inf, -np.abs(g)), axis=None, kind='stable')
            grown = kept.copy()
            grown.flat[order[:count]] = True
            np.testing.assert_array_equal(compact.masks(state.opt_state.layout)[layer]['kernel'], grown)
            after = np.asarray(compact.expand(state.params, state.opt_state.layout)[layer]['kernel'])
            np.testing.assert_array_equal(after, np.where(grown & mask, w, 0))


@pytest.mark.parametrize(
    'settings', [dict(), dict(train__accumulate=2), dict(sparsity__method='rigl', sparsity__accumulate_steps=3)]
)
def test_scores_are_sums_of_gradients_over_the_window(settings):
    decay = 1.0 if 'sparsity__method' in settings else 0.9
    _, experiment = _create(
        **dict(sparsity__update_every=5, sparsity__dense_gradient_window=3) | settings
        if decay < 1
        else settings | dict(sparsity__update_every=5)
    )
    state, step_fn, wanted = experiment.init(jax.random.key(0)), jax.jit(experiment.train_step), None
    for step in range(1, 6):
        if step >= 3:
            now = _gradients(experiment, state, _batch(step))
            wanted = now if wanted is None else jax.tree.map(lambda a, b: decay * a + b, wanted, now)
        state = _one_step(experiment, step, state, step_fn)
        assert (state.opt_state.scores is not None) == (step >= 3)
    for layer in ('fc1', 'fc2', 'fc3'):
        got, expected = np.asarray(state.opt_state.scores[layer]['kernel'], np.float32), wanted[layer]['kernel']
        np.testing.assert_allclose(got, expected, rtol=0.03, atol=0.01 * np.abs(expected).max())


def test_groups_take_turns():
    _, experiment = _create(
        sparsity__update_every=6, sparsity__dense_gradient_window=2, sparsity__groups=2, sparsity__redistribute='none'
    )
    state, step_fn, changed = experiment.init(jax.random.key(0)), jax.jit(experiment.train_step), {}
    for step in range(1, 13):
        state = _one_step(experiment, step, state, step_fn)
        if experiment.is_mask_update(step):
            before = compact.masks(state.opt_state.layout)
            state = experiment.after_step(step, state)
            moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, compact.masks(state.opt_state.layout))
            changed[step] = [layer for layer in ('fc1', 'fc2', 'fc3') if moved[layer]['kernel']]
            np.testing.assert_array_equal(
                np.asarray(state.opt_state.stats.pruned) > 0, [layer in changed[step] for layer in ('fc1', 'fc2', 'fc3')]
            )
    assert changed == {3: ['fc1', 'fc3'], 6: ['fc2'], 9: ['fc1', 'fc3'], 12: ['fc2']}
    whole, in_turn = (memory_table.parts(_create(sparsity__groups=groups)[1], groups)['scores'] for groups in (1, 2))
    assert (whole, in_turn) == (2 * 266_200, 2 * 236_200)


def test_groups_take_turns_after_a_late_start_too():
    options = dict(sparsity__update_every=8, sparsity__groups=2, sparsity__start_step=5, sparsity__dense_gradient_window=20)
    _, experiment = _create(**options)
    scored = {step: experiment.before_step(step, experiment.init(jax.random.key(0))).opt_state.scores for step in (1, 8, 9)}
    of = lambda step: sorted(layer for layer, leaf in scored[step].items() if leaf['kernel'] is not None)
    assert (of(1), of(8), of(9)) == (['fc2'], ['fc2'], ['fc1', 'fc3'])  # the first update is step 8, the second group's turn


def test_a_late_start_has_the_learning_rate_of_its_step(tmp_path):
    rates = {}
    for kind in storage.STORAGES:
        options = dict(
            sparsity__storage=kind, sparsity__method='static', train__steps=40, optimizer__momentum=0, optimizer__weight_decay=0
        )
        _, experiment = _create(**options, optimizer__schedule='cosine', train__init_from='other', train__start_step=20)
        state = experiment.init(jax.random.key(0))
        after, _ = jax.jit(experiment.train_step)(state, _batch(1))
        whole = [storage.whole(x, x.params)['fc3']['kernel'] for x in (state, after)]
        rates[kind] = np.asarray(whole[1] - whole[0])
    np.testing.assert_allclose(rates['compact'], rates['dense'], rtol=1e-4, atol=1e-7)


@needs_compiler
def test_an_ordinary_step_makes_no_array_of_a_sparse_leafs_size():
    _, experiment = _create(sparsity__kernels='cpu', sparsity__method='rigl', sparsity__update_every=3, optimizer__name='adamw')
    state, step_fn = experiment.init(jax.random.key(0)), jax.jit(experiment.train_step, donate_argnums=0)
    program = lambda step: step_fn.lower(experiment.before_step(step, state), _batch(1)).compile().as_text()
    dense = ('[784,300]', '[300,784]', '[235200]', '[1,1,784,300]', '[784,1,300]')
    assert not any(shape in program(1) for shape in dense)
    assert any(shape in program(3) for shape in dense)


@pytest.mark.parametrize('method', ['set', 'dsr'])
def test_random_growth_keeps_no_scores(method):
    _, experiment = _create(sparsity__method=method, sparsity__update_every=2)
    state, step_fn = experiment.init(jax.random.key(0)), jax.jit(experiment.train_step)
    for step in (1, 2):
        state = _one_step(experiment, step, state, step_fn)
        assert state.opt_state.scores is None
    moved = experiment.after_step(2, state)
    assert sum(storage.layer_nonzeros(moved, experiment.layers)) == 13_310
    assert int(moved.opt_state.stats.grown.sum()) > 0


def test_blocks_and_convolutions_are_counted_by_their_weights(tmp_path):
    granularity = 'block:4x4:kernel'
    config = _config(
        mnist_lenet5,
        sparsity__granularity=granularity,
        sparsity__dense='conv1/*',
        sparsity__method='rigl',
        train__steps=0,
    )
    experiment = train.create(config, num_examples=400, input_shape=(28, 28, 1), num_outputs=10)
    state = experiment.init(jax.random.key(0))
    masks = compact.masks(state.opt_state.layout)
    counts = [int(mask.sum()) for mask in jax.tree.leaves(masks) if mask.ndim]
    assert storage.layer_nonzeros(state, experiment.layers) == counts


def test_a_run_starts_from_a_network_of_the_other_storage_and_is_it(run, tmp_path):
    folder, result = run
    params, masks, _ = exporting.network(_config(**WINDOWED), folder)
    for kind in storage.STORAGES:
        config = _config(
            sparsity__storage=kind,
            train__steps=1,
            optimizer__learning_rate=1e-30,
            sparsity__method='static',
            optimizer__weight_decay=0,
        )
        config.train.init_from = str(folder)
        train.train(config, tmp_path / kind)
        again, same_masks, _ = exporting.network(config, tmp_path / kind)
        jax.tree.map(np.testing.assert_array_equal, masks, same_masks)
        jax.tree.map(np.testing.assert_allclose, params, again)
    exporting.export(_config(**WINDOWED), folder, tmp_path / 'network.npz')
    loaded, _, _ = files.load(tmp_path / 'network.npz')
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    evaluated = train.evaluate(_config(**WINDOWED), folder)
    assert evaluated['test_loss'] == result['test_loss'] and evaluated['nonzeros'] == 13_310


@needs_compiler
def test_a_mesh_divides_the_batch_and_takes_over_a_run(run, tmp_path):
    options = dict(sparsity__kernels='cpu', sparsity__update_every=2, sparsity__dense_gradient_window=2, data__batch_size=16)
    states = {}
    for count in (1, 8):
        config, experiment = _create(**options, mesh__data=count)
        devices = devices_lib.Devices(config, experiment)
        state = devices.first(experiment.init, jax.random.key(0))
        step_fn = devices.jit(experiment.train_step, (devices.step_shardings, devices.replicated) if count > 1 else 'replicated')
        for step in (1, 2):
            state = experiment.before_step(step, state)
            state, metrics = step_fn(state, devices.batch(_batch(step, 16), 16))
        states[count] = experiment.after_step(2, state), metrics
    (one, values), (eight, same) = states[1], states[8]
    np.testing.assert_allclose(float(values['loss']), float(same['loss']), rtol=1e-5)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(eight))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        if a.shape == b.shape:  # room depends on which weights went where, which a last bit may decide
            assert np.mean(~np.isclose(a, b, rtol=1e-3, atol=1e-5)) < 0.02
    copy = tmp_path / 'copy'
    shutil.copytree(run[0], copy)
    for later in (copy / 'checkpoints').iterdir():
        if int(later.name) > 45:
            shutil.rmtree(later)
    (copy / 'result.json').unlink()
    config = _config(**WINDOWED)
    config.mesh.data = 2
    wider = devices_lib.Devices(
        config, train.create(config, num_examples=4000, input_shape=(28, 28, 1), num_outputs=10), jax.devices()[:2]
    )
    checkpoints = checkpoint.Checkpoints(copy / 'checkpoints', read_only=True)
    state, _ = checkpoints.restore(45, wider.shapes_after)
    checkpoints.close()
    assert all(len(x.sharding.device_set) == 2 for x in jax.tree.leaves(state))


BAD = [
    (dict(sparsity__storage='sparse'), "sparsity.storage='sparse'"),
    (dict(sparsity__method='dense'), "sparsity.method='dense' has no sparse layers"),
    (dict(sparsity__method='snfs'), "sparsity.method='snfs' keeps an average of all weights"),
    (dict(sparsity__method='gmp'), 'density follows a schedule'),
    (dict(sparsity__method='granet'), 'density follows a schedule'),
    (dict(sparsity__kernels='dense'), "sparsity.kernels='dense' has no products with compact storage"),
    (dict(sparsity__kernels='tpu'), "sparsity.kernels='tpu' has no products with compact storage"),
    (dict(mesh__layout='fsdp'), "mesh.layout='data'"),
    (dict(mesh__rules='fc1/kernel=none,model'), 'no mesh.rules'),
    (dict(sparsity__groups=4), 'sparsity.groups=4 is more than the 3 sparse layers'),
    (dict(model__name='tests.own_parts:Net'), 'multiplies with whole weights'),
    (dict(sparsity__groups=3), 'sparsity.groups=3 must divide the 20 steps'),
    (dict(sparsity__groups=2, sparsity__method='set'), 'sparsity.groups=2 has no effect: set scores no weights'),
    (dict(sparsity__groups=2, sparsity__storage='dense'), 'sparsity.groups=2 has no effect with sparsity.storage'),
    (dict(sparsity__method='rigl', sparsity__redistribute='mean_momentum'), 'a gradient and a momentum'),
    (dict(sparsity__method='set', sparsity__redistribute='mean_momentum'), 'which are none here'),
    (dict(sparsity__dense_gradient_window=0), 'which are none here'),
    (dict(sparsity__grow='random_never_active'), 'ever been active'),
]


@pytest.mark.parametrize(('settings', 'told'), BAD, ids=lambda x: ','.join(map(str, x.values())) if isinstance(x, dict) else '')
def test_what_compact_storage_cannot_take_is_told_before_a_file_is_made(settings, told, tmp_path):
    with pytest.raises(ValueError) as error:
        train.train(_config(**settings), tmp_path / 'run')
    assert told in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_the_two_storages_are_different_runs(run, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(run[0], copy)
    with pytest.raises(ValueError, match='sparsity.storage'):
        train.train(_config(**WINDOWED | dict(sparsity__storage='dense')), copy)
