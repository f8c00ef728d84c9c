"""Runs that are given more steps, and runs that start from another's network."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from configs import mnist_lenet300
from sparse_jax import train
from sparse_jax.core import masks as masks_lib
from sparse_jax.export import files
from sparse_jax.runtime import checkpoint, records
from sparse_jax.train import exporting, metrics
from sparse_jax.train.evaluate import restored


def _config(**settings):
    config = mnist_lenet300.get_config('offline')
    config.mesh.data, config.data.batch_size, config.data.eval_batch_size = 1, 20, 500
    config.train.steps, config.sparsity.update_every, config.checkpoint.every, config.log.every = 12, 3, 6, 2
    config.train.eval_every = 100
    config.optimizer.schedule, config.sparsity.kernels, config.sparsity.dense_gradient_window = 'cosine', 'dense', None
    config.optimizer.final_factor = 0.1
    for name, value in settings.items():
        section, field = name.split('__')
        setattr(getattr(config, section), field, value)
    return config


def _rates(folder):
    return {row['step']: row['learning_rate'] for row in metrics.read(folder) if 'learning_rate' in row}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('longer') / 'run'
    train.train(_config(), folder)
    return folder


@pytest.fixture(scope='module')
def extended(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('longer') / 'extended'
    shutil.copytree(run, folder)
    return folder, train.train(_config(train__steps=20), folder)


def test_more_steps_keep_schedules_and_masks(run, extended, tmp_path):
    folder, result = extended
    assert result['steps'] == 20 and (folder / 'result_12.json').read_bytes() == (run / 'result.json').read_bytes()
    assert records.read(folder / 'config.json')['train.schedule_steps'] == 12
    before, after = _rates(run), _rates(folder)
    assert all(after[step] == before[step] for step in before)
    assert all(after[step] == before[12] for step in (14, 16, 18, 20)) and before[12] < before[2]
    first, last = (
        masks_lib.get_masks(restored(*pair)[2].opt_state) for pair in ((_config(), run), (_config(train__steps=20), folder))
    )
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, last)), strict=True))
    whole = _config(train__steps=20, train__schedule_steps=12)  # at once, what the other has done in two parts
    train.train(whole, tmp_path / 'whole')
    states = restored(whole, tmp_path / 'whole')[2], restored(_config(train__steps=20), folder)[2]
    for a, b in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):  # other programs, which round otherwise
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    masks = [jax.tree.leaves(masks_lib.get_masks(state.opt_state)) for state in states]
    assert all(np.array_equal(a, b) for a, b in zip(*masks, strict=True))


def test_an_extended_run_is_that_run(extended, tmp_path):
    folder, result = extended
    for config in (_config(train__steps=20), _config(train__steps=20, train__schedule_steps=12)):
        assert train.train(config, folder) == result
    with pytest.raises(
        ValueError, match='train.steps: 20 there, 12 given, of which a run that exists can be given more, not fewer'
    ):
        train.train(_config(), folder)
    with pytest.raises(ValueError, match='train.schedule_steps: 12 there, 15 given'):
        train.train(_config(train__steps=20, train__schedule_steps=15), folder)
    shutil.copytree(folder, tmp_path / 'further')
    assert train.train(_config(train__steps=22), tmp_path / 'further')['steps'] == 22
    assert records.read(tmp_path / 'further' / 'config.json')['train.schedule_steps'] == 12


def test_the_default_config_is_extended(tmp_path):
    """mnist_lenet300 counts in epochs: of the 4,500 training digits each is 45 steps."""
    config = mnist_lenet300.get_config('offline')
    config.mesh.data, config.train.epochs, config.sparsity.kernels, config.train.steps = 1, 1, 'dense', 0
    result = train.train(config, tmp_path / 'run')
    steps = result['steps']
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps - 1))
    with pytest.raises(ValueError, match=f'holds a run of {steps} steps, which can be given more, not fewer'):
        train.train(longer, tmp_path / 'run')
    longer.train.steps = steps + 5
    assert train.train(longer, tmp_path / 'run')['steps'] == steps + 5
    assert records.read(tmp_path / 'run' / 'config.json')['train.schedule_steps'] == steps
    assert train.train(longer, tmp_path / 'run')['nonzeros'] == 13_310


def test_a_run_starts_from_another_runs_network(run, tmp_path):
    file = tmp_path / 'network.npz'
    exporting.export(_config(), run, file)
    _, before, state = restored(_config(), run)
    assert before == 12
    prints = []
    for source in (run, file):
        config = _config(train__init_from=str(source), train__steps=2, optimizer__learning_rate=1e-30, optimizer__weight_decay=0.0)
        folder = tmp_path / f'from_{source.name}'
        train.train(config, folder)
        started = restored(config, folder)[2]
        for a, b in zip(jax.tree.leaves(started.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-20)
        masks = [jax.tree.leaves(masks_lib.get_masks(s.opt_state)) for s in (started, state)]
        assert all(np.array_equal(a, b) for a, b in zip(*masks, strict=True))
        prints.append(checkpoint.fingerprint(started))
    assert prints[0] == prints[1]
    file.unlink()  # a run that exists does not need it
    assert train.train(config, folder)['steps'] == 2


def test_a_network_that_does_not_fit_is_refused_before_a_file_is_made(run, tmp_path):
    file = tmp_path / 'network.npz'
    exporting.export(_config(), run, file)
    params, masks, _ = files.load(file)
    dense = tmp_path / 'dense.npz'
    files.save(dense, params, jax.tree.map(lambda _: np.array(True), masks))
    (tmp_path / 'empty').mkdir()
    for source, settings, message in (
        (file, dict(sparsity__density=0.1), r'has 13,310 weights in its sparse layers.*give config\.sparsity\.density=0\.05'),
        (file, dict(model__name='lenet5'), 'is of another network: conv1/bias is missing'),
        (file, dict(sparsity__dense='fc3/*', sparsity__density=0.05), 'fc3/kernel is sparse there and dense here'),
        (file, dict(sparsity__granularity='block:4x2'), 'has units that exist in part'),
        (dense, {}, 'fc1/kernel is dense there and sparse here'),
        (tmp_path / 'nothing.npz', {}, r'nothing\.npz.* is not there'),
        (tmp_path / 'empty', {}, 'is a folder without a checkpoint'),
    ):
        with pytest.raises(ValueError, match=message):
            train.train(_config(train__init_from=str(source), **settings), tmp_path / 'run')
        assert not (tmp_path / 'run').exists()
    trained = train.train(_config(train__init_from=str(dense), sparsity__method='dense', train__steps=2), tmp_path / 'dense_run')
    assert trained['density'] == 1.0
