"""Training on the sparse kernels: the same training as with masked dense products, and choices that belong to the run."""

import functools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_jax as sj
from configs import mnist_lenet5, mnist_lenet300
from sparse_jax import config as config_lib
from sparse_jax import models, train
from sparse_jax.kernels import backend, measure
from sparse_jax.kernels.cpu import operations as cpu
from sparse_jax.models import cifar
from sparse_jax.train import devices as devices_lib
from sparse_jax.train import kernel_choice

needs_compiler = pytest.mark.skipif(bool(cpu.unavailable()), reason='needs a C++ compiler: install g++ or clang++')


def _config(**settings):
    config = mnist_lenet300.get_config('offline')
    config.train.steps, config.sparsity.update_every, config.sparsity.dense_gradient_window = 60, 20, 5
    config.checkpoint.every, config.log.every, config.train.eval_every, config.mesh.data = 38, 10, 30, 1
    for name, value in settings.items():
        section, field = name.split('__')
        setattr(getattr(config, section), field, value)
    return config


def _wide_resnet():
    config = config_lib.Config()
    config.model.name, config.model.dropout, config.data.batch_size = 'wrn_10_1', 0.0, 8
    config.sparsity.density, config.sparsity.update_every, config.train.steps = 0.2, 4, 100
    config.sparsity.dense_gradient_window, config.optimizer.learning_rate = 2, 0.01
    return config, (32, 32, 3)


def _lenet5():
    config = mnist_lenet5.get_config('offline')
    config.data.batch_size, config.sparsity.update_every, config.train.steps = 16, 4, 100
    config.sparsity.dense_gradient_window = 2
    return config, (28, 28, 1)


@needs_compiler
@pytest.mark.parametrize('make', [_lenet5, _wide_resnet])
@pytest.mark.slow
def test_kernels_train_as_masked_dense_products_do(make, monkeypatch):
    """Losses equal within rounding up to the first mask update, and the masks after it but for scores that are nearly equal."""
    monkeypatch.setitem(models._MODELS, 'wrn_10_1', (cifar.WideResNet, dict(depth=10, width=1)))
    config, shape = make()
    experiment = train.create(config, num_examples=4000, input_shape=shape, num_outputs=10)
    step = jax.jit(experiment.train_step, static_argnames='dense_gradients')
    batch = {
        'input': jax.random.normal(jax.random.key(1), (config.data.batch_size, *shape)),
        'label': jnp.arange(config.data.batch_size) % 10,
    }
    start = jax.jit(experiment.init)(jax.random.key(0))
    patterns = sj.kernels.make_patterns(sj.get_masks(start.opt_state))
    patterns = jax.tree.map(functools.partial(_by, 'cpu'), patterns, is_leaf=lambda p: isinstance(p, sj.kernels.Pattern))
    losses, ends = {}, {}
    for name, own in (('cpu', patterns), ('dense', None)):
        state, losses[name] = start, []
        for number in range(1, 5):
            dense = experiment.needs_dense_gradient(number)
            assert dense == (number > 2)
            state, metrics = step(state, batch, own, dense_gradients=dense)
            losses[name].append(float(metrics['loss']))
        ends[name] = state
    np.testing.assert_allclose(losses['cpu'], losses['dense'], rtol=2e-4)
    before = jax.tree.leaves(sj.get_masks(start.opt_state))
    moved = sum(int((x != y).sum()) for x, y in zip(jax.tree.leaves(sj.get_masks(ends['cpu'].opt_state)), before, strict=True))
    assert moved > 100
    _differ_at_near_ties_only(before, ends['cpu'], ends['dense'])
    _differ_at_near_ties_only(before, ends['dense'], ends['cpu'])


def _differ_at_near_ties_only(before, one, other):
    """A weight that only one of two updates kept or grew has a score at the other's threshold, the lowest that it kept or grew."""
    leaves = lambda state: [
        [np.abs(np.asarray(x)) for x in jax.tree.leaves(tree)]
        for tree in (sj.get_masks(state.opt_state), state.params, state.opt_state.inner_state[1][0].trace)
    ]
    lowest = lambda values: values.min(initial=np.inf)
    for old, mask, weight, momentum, mask_, weight_, momentum_ in zip(before, *leaves(one), *leaves(other), strict=True):
        if mask.ndim and (own := mask & ~mask_).any():
            old = np.asarray(old)
            kept, grown = lowest(weight_[old & mask_]), lowest(momentum_[mask_ & ~old])
            assert ((momentum[own] <= 1.02 * grown) | (old[own] & (weight[own] <= 1.02 * kept))).all()


def _by(name, pattern):
    return sj.kernels.pattern.dataclasses.replace(pattern, implementation=name)


@pytest.mark.parametrize('kernels', ['dense', pytest.param('cpu', marks=needs_compiler)])
@pytest.mark.slow
def test_active_gradients_are_equal_in_both_kinds_of_steps(kernels):
    config = _config()
    experiment = train.create(config, num_examples=4000, input_shape=(28, 28, 1), num_outputs=10)
    state = experiment.init(jax.random.key(0))
    patterns = None
    if kernels == 'cpu':
        implementations = dict.fromkeys(['fc1/kernel', 'fc2/kernel', 'fc3/kernel'], 'cpu')
        patterns = sj.kernels.make_patterns(sj.get_masks(state.opt_state), implementations=implementations)
    batch = {'input': jax.random.normal(jax.random.key(1), (100, 28, 28, 1)), 'label': jnp.arange(100) % 10}
    trace = {}
    for dense in (True, False):
        after, _ = jax.jit(experiment.train_step, static_argnames='dense_gradients')(state, batch, patterns, dense_gradients=dense)
        trace[dense] = after.opt_state.inner_state[1][0].trace['fc1']['kernel']
    mask = np.asarray(sj.get_masks(state.opt_state)['fc1']['kernel'])
    assert not trace[False][~mask].any() and (trace[True][~mask] != 0).mean() > 0.5
    np.testing.assert_allclose(trace[False][mask], trace[True][mask], rtol=1e-4, atol=1e-6)


def _first_layer_wins(call, density, *, dense_share):
    """The kernel for fc1, on any machine: some restored choice must be another than dense."""
    assert dense_share == 0.25
    return {'dense': 1.0, 'cpu': 0.5 if call.name == 'fc1/kernel' else 2.0}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'undisturbed'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, 'measured', _first_layer_wins)
        return folder, train.train(_config(), folder)


@needs_compiler
@pytest.mark.slow
def test_a_run_resumed_within_a_window_keeps_its_bits_without_measuring_again(finished, tmp_path, monkeypatch):
    """The checkpoint of step 38 lies in the window of the update of step 40. No time may be measured anew: another would change bits."""
    reference, result = finished
    folder = tmp_path / 'resumed'
    shutil.copytree(reference, folder, ignore=shutil.ignore_patterns('60', 'result.json', 'run.json', 'report.png', '.lock'))

    def measured(*_, **__):
        raise AssertionError('a resumed run measured again')

    monkeypatch.setattr(measure, 'measured', measured)
    again = train.train(_config(), folder)
    same = lambda r: {k: v for k, v in r.items() if 'second' not in k}
    assert json.loads((folder / 'run.json').read_text())['resumed_at'] == 38
    assert same(again) == same(result)
    assert (folder / 'kernels.json').read_text() == (reference / 'kernels.json').read_text()


@needs_compiler
@pytest.mark.slow
def test_choices_are_written_and_shown(finished, capsys):
    history = json.loads((finished[0] / 'kernels.json').read_text())
    assert set(history['0']) == {'fc1/kernel', 'fc2/kernel', 'fc3/kernel'}
    for rows in history.values():
        for row in rows.values():
            if row['seconds']:
                assert row['implementation'] == backend.fastest(row['seconds']).implementation
    assert history['0']['fc1/kernel']['density'] == pytest.approx(0.05, abs=1e-3)
    kernel_choice.print_table(finished[0])
    table = capsys.readouterr().out
    assert 'fc1/kernel' in table and 'ms' in table and 'takes' in table


@needs_compiler
def test_a_layer_is_measured_again_only_when_its_density_changed_much(tmp_path, monkeypatch):
    config = _config()
    experiment = train.create(config, num_examples=4000, input_shape=(28, 28, 1), num_outputs=10)
    state = experiment.init(jax.random.key(0))
    asked = []

    def measured(call, density, *, dense_share):
        asked.append((call.name, round(density, 3), dense_share, call.input_gradient, call.x))
        return {'dense': 2.0, 'cpu': 1.0}

    monkeypatch.setattr(measure, 'measured', measured)
    kernels = kernel_choice.LayerKernels(config, experiment, tmp_path, 0)
    patterns = kernels.patterns(0, state)
    assert asked[0] == ('fc1/kernel', 0.05, 0.25, False, (100, 1, 1, 784)) and len(asked) == 3
    assert asked[1][3]  # the second layer's input has a gradient
    assert patterns['fc1']['kernel'].implementation == 'cpu' and patterns['fc1']['bias'] is None
    for part, again in ((0.8, 0), (0.5, 1)):  # of fc1's weights that stay
        masks = sj.get_masks(state.opt_state)
        masks['fc1']['kernel'] &= jax.random.bernoulli(jax.random.key(2), part, (784, 300))
        asked.clear()
        patterns = kernels.patterns(20, state._replace(opt_state=sj.set_masks(state.opt_state, masks)))
        assert len(asked) == again
        assert patterns['fc1']['kernel'].pointers[-1] == masks['fc1']['kernel'].sum()


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(sparsity__kernels='gpuu'), "sparsity.kernels='gpuu' does not exist"),
    (dict(sparsity__kernels='cpu', model__dtype='bfloat16'), "config.sparsity.kernels='cpu' does not run here: it computes in float32"),
    (dict(sparsity__method='rigl'), 'dense_gradient_window=5 has no effect with sparsity.method=.rigl.'),
    (dict(sparsity__dense_gradient_window=-1), 'config.sparsity.dense_gradient_window=-1: must be at least 0, or None'),
])  # fmt: skip
def test_wrong_settings_make_no_file(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train.train(_config(**settings), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('kernels', ['reference', pytest.param('cpu', marks=needs_compiler)])
@pytest.mark.slow
def test_every_kind_of_kernels_trains(tmp_path, kernels, finished):
    result = train.train(_config(sparsity__kernels=kernels), tmp_path / 'run')
    assert result['nonzeros'] == 13_310 and abs(result['test_accuracy'] - finished[1]['test_accuracy']) < 0.05
    assert not (tmp_path / 'run' / 'kernels.json').exists()


@pytest.mark.slow
def test_kernels_may_change_on_resume_and_the_window_may_not(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / 'run', ignore=shutil.ignore_patterns('60', 'result.json', 'run.json', '.lock'))
    assert train.train(_config(sparsity__kernels='dense'), tmp_path / 'run')['test_loss'] == pytest.approx(
        finished[1]['test_loss'], rel=0.1
    )
    with pytest.raises(ValueError, match='sparsity.dense_gradient_window: 5 there, 6 given'):
        train.train(_config(sparsity__dense_gradient_window=6), tmp_path / 'run')


def test_a_setting_that_may_be_none():
    config = config_lib.Config()
    config_lib.override(config, 'sparsity.dense_gradient_window', 'None')
    assert config.sparsity.dense_gradient_window is None
    config_lib.override(config, 'sparsity.dense_gradient_window', '7')
    assert config.sparsity.dense_gradient_window == 7
    with pytest.raises(ValueError, match='is not a whole number'):
        config_lib.override(config, 'sparsity.dense_gradient_window', 'all')
    config.train.steps = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match='config.train.steps=None: must be a whole number'):
        config_lib.validate(config)


def test_layers_whose_blocks_a_mesh_cuts_are_told_or_refused_where_kernels_are_named(tmp_path, caplog):
    config = config_lib.Config()
    config.model.name, config.model.features, config.model.heads, config.model.depth = 'transformer', 32, 2, 2
    config.sparsity.granularity, config.sparsity.density, config.train.steps = 'block:8x8', 0.5, 100
    config.mesh.data, config.mesh.model, config.mesh.layout, config.data.batch_size = 1, 8, 'model', 64
    experiment = train.create(config, num_examples=100, input_shape=(16,), num_outputs=20)
    devices = devices_lib.Devices(config, experiment)
    with caplog.at_level(logging.INFO, 'sparse_jax'):
        kernel_choice.LayerKernels(config, experiment, tmp_path, 0, devices)
    assert 'the mesh cuts blocks of' in caplog.text and 'layers/attention/query/kernel' in caplog.text
    assert 'layers/mlp/up/kernel' not in caplog.text, '128 over 8 are two blocks of 8'
    config.sparsity.kernels = 'cpu'
    with pytest.raises(ValueError, match=r"kernels='cpu': over config.mesh.model=8 .*attention.* no whole blocks of 8x8"):
        kernel_choice.cut_by_mesh(config, experiment, devices)
    config.mesh.data, config.mesh.model = 4, 2
    assert kernel_choice.cut_by_mesh(config, experiment, devices_lib.Devices(config, experiment)) == []
    config.mesh.data, config.mesh.model, config.model.hidden = (
        8,
        1,
        68,
    )  # blocks that end early are not cut where nothing is divided
    experiment = train.create(config, num_examples=100, input_shape=(16,), num_outputs=20)
    assert kernel_choice.cut_by_mesh(config, experiment, devices_lib.Devices(config, experiment)) == []
    config.mesh.rules = 'mlp/up/kernel=model,none,none'
    config.mesh.data, config.mesh.model = 4, 2
    with pytest.raises(ValueError, match='or divide other axes than inputs and outputs'):
        kernel_choice.cut_by_mesh(config, experiment, devices_lib.Devices(config, experiment))
