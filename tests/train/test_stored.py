"""A workdir is enough: its run goes on, is evaluated, and is exported without its config."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sparse_jax as sj
from configs import cifar10_vgg_d, mnist_lenet300
from sparse_jax import config as config_lib
from sparse_jax import train
from sparse_jax.launch import command_line
from sparse_jax.runtime import checkpoint
from sparse_jax.train import exporting, stored
from sparse_jax.train import run as run_lib
from sparse_jax.train.evaluate import restored


def _config():
    config = mnist_lenet300.get_config('offline')
    config.mesh.data, config.data.batch_size, config.train.steps, config.sparsity.update_every = 1, 20, 8, 3
    config.sparsity.kernels, config.sparsity.dense_gradient_window = 'dense', None
    config.checkpoint.every, config.log.every = 4, 2
    return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stored') / 'run'
    train.train(_config(), folder)
    return folder


def test_the_stored_config_is_that_of_the_run(workdir, tmp_path):
    assert stored.get_config(str(workdir)) == _config()  # with those that are no part of the experiment's identity
    (tmp_path / 'config.json').write_bytes((workdir / 'config.json').read_bytes())
    older = stored.get_config(str(tmp_path))  # of a run before settings were stored
    assert config_lib.identity(older) == config_lib.identity(_config()) and older.checkpoint.every != 4
    (tmp_path / 'settings.json').write_text('{"seed": [')
    assert stored.get_config(str(tmp_path)) == older
    (tmp_path / 'settings.json').write_text('{"model.nmae": "x"}')
    with pytest.raises(ValueError, match=r'has settings of another version \(model.nmae\): give --config'):
        stored.get_config(str(tmp_path))


def test_a_command_line_takes_it_where_it_names_no_config(workdir, tmp_path):
    with_config = lambda *flags: command_line._with_stored_config(['launch.py', *flags])
    assert with_config(f'--workdir={workdir}')[1].endswith(f'sparse_jax/train/stored.py:{workdir}')
    assert len(with_config('--mode=evaluate', f'--workdir={workdir}', '--config.train.steps=9')) == 5
    for flags in (
        [f'--workdir={tmp_path}'],
        [f'--workdir={workdir}', '--config=configs/lm_tiny.py'],
        [f'--workdir={workdir}', '--mode=report'],
        [f'--workdir={workdir}', '--lower_only=cuda'],
        ['--mode=train'],
    ):
        assert with_config(*flags) == ['launch.py', *flags]


def test_an_exported_run_is_its_last_checkpoint(workdir, tmp_path, capsys):
    before = sorted(path.name for path in workdir.rglob('*'))
    for suffix in ('npz', 'safetensors'):
        train.export(_config(), workdir, tmp_path / f'network.{suffix}')
        assert f'network.{suffix} is written: step 8, ' in capsys.readouterr().out
        params, masks, info = sj.export.load(tmp_path / f'network.{suffix}')
        run = run_lib.prepare(_config(), workdir)
        saved = checkpoint.Checkpoints(workdir / 'checkpoints', read_only=True)
        state, _ = saved.restore(8, run.devices.shapes, run.experiment.layer_codes)
        saved.close()
        for tree, expected in ((params, state.params), (masks, sj.get_masks(state.opt_state))):
            jax.tree.map(np.testing.assert_array_equal, tree, jax.device_get(expected))
        assert info['step'] == 8 and info['settings'] == json.loads((workdir / 'config.json').read_text())
    assert sorted(path.name for path in workdir.rglob('*')) == before


def test_a_dense_run_is_exported_whole(tmp_path):
    config = _config()
    config.sparsity.method, config.sparsity.dense_gradient_window = 'dense', config_lib.Config().sparsity.dense_gradient_window
    config.sparsity.update_every = config_lib.Config().sparsity.update_every
    train.train(config, tmp_path / 'run')
    train.export(config, tmp_path / 'run', tmp_path / 'network.npz')
    params, masks, _ = sj.export.load(tmp_path / 'network.npz')
    assert params['fc1']['kernel'].shape == (784, 300) and all(mask.ndim == 0 for mask in jax.tree.leaves(masks))


def test_statistics_of_normalisation_stand_beside_the_weights():
    merged = exporting._merged({'norm': {'scale': 1}, 'fc': {'kernel': 2}}, {'norm': {'mean': 3, 'var': 4}})
    assert merged == {'norm': {'scale': 1, 'mean': 3, 'var': 4}, 'fc': {'kernel': 2}}
    config = cifar10_vgg_d.get_config('offline')
    shapes = jax.eval_shape(run_lib.create_experiment(config, run_lib.load_data(config)).init, jax.random.key(0))
    whole = exporting._merged(shapes.params, shapes.model_state)
    assert len(jax.tree.leaves(whole)) == len(jax.tree.leaves((shapes.params, shapes.model_state)))


@pytest.mark.parametrize(('to', 'message'), [
    ('network.pt', "--to='.*network.pt': its suffix must be .npz or .safetensors"),
    ('nowhere/network.npz', 'the folder .*nowhere does not exist'),
])  # fmt: skip
def test_what_cannot_be_exported_is_told_first(to, message, workdir, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.export(_config(), workdir, tmp_path / to)
    with pytest.raises(ValueError, match='has no checkpoint: train first'):
        train.export(_config(), tmp_path / 'empty', tmp_path / 'network.npz')
    assert not list(tmp_path.iterdir())


def test_masks_of_a_checkpoint_are_read_without_the_package(workdir):
    """orbax gives them as they are stored; sj.export.unpack_masks makes them masks."""
    step = max(int(path.name) for path in (workdir / 'checkpoints').glob('[0-9]*'))
    stored = ocp.StandardCheckpointer().restore((workdir / 'checkpoints' / str(step) / 'state').absolute())
    holds_masks = lambda part: isinstance(part, dict) and 'masks' in part
    [sparse] = filter(holds_masks, jax.tree.leaves(stored['opt_state'], is_leaf=holds_masks))
    masks = sj.export.unpack_masks(stored['params'], sparse['masks'])
    expected = sj.get_masks(restored(_config(), workdir)[2].opt_state)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (masks, jax.device_get(expected))), strict=True))
    with pytest.raises(ValueError, match=r'fc1/kernel of shape \(784, 300\) has no packed mask'):
        sj.export.unpack_masks(
            stored['params'], sparse['masks'] | {'fc1': {'bias': np.array(True), 'kernel': np.zeros((784, 37), np.uint8)}}
        )
