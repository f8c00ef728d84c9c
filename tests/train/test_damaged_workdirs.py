"""A run in a workdir whose files were lost, cut or overwritten: its result depends on checkpoints alone."""

import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import mnist_lenet300
from sparse_jax import config as config_lib
from sparse_jax import train
from sparse_jax.report import run_report
from sparse_jax.report.write import write_report
from sparse_jax.runtime import records, workdir
from sparse_jax.train import metrics

ROOT = pathlib.Path(__file__).parents[2]


def _config(**settings):
    config = mnist_lenet300.get_config('offline')
    config.mesh.data, config.data.batch_size = 1, 20
    config.train.steps, config.sparsity.update_every, config.log.every = 8, 3, 2
    config.checkpoint.every, config.checkpoint.keep = 4, 2
    config.sparsity.kernels = 'auto'
    for name, value in settings.items():
        section, field = name.split('__')
        setattr(getattr(config, section), field, value)
    return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'finished'
    return folder, train.train(_config(), folder)


def _without_times(result):
    return {name: value for name, value in result.items() if 'second' not in name}


def _cut_off(folder):
    """As if the run had been killed after step 4."""
    shutil.rmtree(folder / 'checkpoints' / '8')
    (folder / 'result.json').unlink()


@pytest.mark.parametrize('lost', ['metrics and kernels', 'result', 'a digit of the result'])
def test_the_result_is_that_of_the_undisturbed_run(lost, finished, tmp_path, caplog):
    folder = tmp_path / 'run'
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns('.lock'))
    if 'result' in lost:
        whole = (folder / 'result.json').read_text()
        changed = whole.replace('"nonzeros": 1', '"nonzeros": 2')
        assert changed != whole
        (folder / 'result.json').write_text('{"model": "len' if lost == 'result' else changed)
        told = ['result.json cannot be read: it was put aside as result.json.corrupt, and is made anew']
    else:
        _cut_off(folder)
        (folder / 'metrics.jsonl').unlink()
        (folder / 'kernels.json').write_text('{"0": []}')
        told = [
            'its lines of the steps from 1 to 4 are lost',
            'it was put aside as kernels.json.corrupt; the kernels are chosen anew',
        ]
    with caplog.at_level(logging.WARNING, 'sparse_jax'):
        result = train.train(_config(), folder)
    assert all(text in caplog.text for text in told), caplog.text
    assert _without_times(result) == _without_times(finished[1])
    assert _without_times(records.read(folder / 'result.json')) == _without_times(finished[1])
    assert metrics.read(folder)[-1]['step'] == 8
    run_report.show(folder)


@pytest.mark.parametrize(('content', 'told', 'steps'), [
    (None, 'its lines of the steps from 1 to 4 are lost', []),
    (b'', 'its lines of the steps from 1 to 4 are lost', []),
    (b'{"step": 2, "loss": 1.0}\n{"st', 'its lines of the steps from 3 to 4 are lost', [2]),
    (b'{"step": 4, "loss": 1.0}\n{"step": 6, "loss": 1.0}\n{"st', '', [4]),
    (b'\xff\xfe\n{"step": 4, "loss": 1.0}\n', 'line 1 holds no metrics of a step. It was put aside as metrics.jsonl.corrupt;', [4]),
    (b'{"step": 2}\nnull\n[]\n{"step": "4"}\n', 'line 2 holds no metrics of a step. It was put aside as', [2]),
    ('folder', 'metrics.jsonl: it is a folder. It was put aside as metrics.jsonl.corrupt', []),
])  # fmt: skip
def test_a_damaged_log_is_told_and_kept_aside(content, told, steps, tmp_path, caplog):
    path = tmp_path / 'metrics.jsonl'
    if content == 'folder':
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    writer = metrics.Writer(tmp_path, config_lib.Log(), step=4, logged=4)
    writer.write(6, {'loss': 2.0})
    writer.close()
    assert [row['step'] for row in metrics.read(tmp_path)] == [*steps, 6]
    assert told in caplog.text and bool(told) == bool(caplog.text)
    if 'put aside' in told:
        aside = tmp_path / 'metrics.jsonl.corrupt'
        assert aside.is_dir() if content == 'folder' else aside.read_bytes() == content


def test_the_mean_density_is_summed_over_the_steps_and_saved(finished, tmp_path):
    """Against the densities in the undisturbed log, by hand; a budget that moves between layers makes them unequal."""
    rows = [row for row in metrics.read(finished[0]) if 'density' in row]
    assert [row['step'] for row in rows] == [0, 3, 6]
    weights = {'fc1/kernel': 784 * 300, 'fc2/kernel': 300 * 100, 'fc3/kernel': 100 * 10}
    mean = {name: sum(row['density'][name] * steps for row, steps in zip(rows, (3, 3, 2), strict=True)) / 8 for name in weights}
    assert len({round(row['density']['fc3/kernel'], 6) for row in rows}) > 1
    dense = sum(weights.values())
    forward = sum(round(size * mean[name]) for name, size in weights.items())
    inputs = sum(round(size * mean[name]) for name, size in weights.items() if name != 'fc1/kernel')
    training_dense = 3 * dense - weights['fc1/kernel']
    of_weights = dense * 3 / 3  # a window as long as the interval: dense gradients in every step
    assert finished[1]['operations_training_against_dense'] == pytest.approx((forward + inputs + of_weights) / training_dense)


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line_and_the_last_checkpoint_goes_on(tmp_path):
    """A limit on the size of files is as a full disk to whoever writes: what the system says is told, and nothing after it."""
    command = [sys.executable, 'launch.py', '--config=configs/mnist_lenet300.py:offline', f'--workdir={tmp_path / "run"}']
    command += ['--config.train.steps=4', '--config.checkpoint.every=2', '--config.sparsity.kernels=dense']
    environment = os.environ | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}  # which would complain too
    limited = ['bash', '-c', 'ulimit -f 64; exec "$@"', 'bash', *command]
    done = subprocess.run(limited, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.strip().split('\n') if not re.match(r'\d\d:\d\d:\d\d ', line)]
    assert done.returncode == 70 and len(lines) == 1, done.stderr
    assert re.match(
        r'error: the checkpoint of step 2 could not be saved in .*checkpoints \(File too large\)\. Nothing had been saved\.',
        lines[0],
    )
    shown = subprocess.run([*limited, '--debug'], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 70 and 'Traceback' in shown.stderr


@pytest.mark.slow
@pytest.mark.parametrize('what', ['removed', 'renamed'])
def test_a_workdir_that_goes_away_is_told_when_it_does(what, tmp_path):
    folder = tmp_path / 'run'
    command = [sys.executable, 'launch.py', '--config=configs/mnist_lenet300.py:offline', f'--workdir={folder}']
    command += ['--config.sparsity.kernels=dense', '--config.log.every=1', '--config.checkpoint.every=50']
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (folder / 'checkpoints' / '50' / 'commit_success.txt').exists():
        assert process.poll() is None
        time.sleep(0.002)
    folder.rename(tmp_path / 'elsewhere')
    if what == 'removed':
        shutil.rmtree(tmp_path / 'elsewhere', ignore_errors=True)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 70 and 'Traceback' not in said, said
    assert re.search(
        r'error: .*(was removed, renamed or replaced while the run was going|could not be saved)', said.strip().splitlines()[-1]
    ), said
    if what == 'renamed':
        shutil.rmtree(folder, ignore_errors=True)
        (tmp_path / 'elsewhere').rename(folder)
        done = subprocess.run([*command, '--mode=evaluate'], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_lock_knows_whether_its_folder_is_still_there(tmp_path):
    folder = tmp_path / 'run'
    with workdir.locked(folder) as is_held:
        assert is_held()
        folder.rename(tmp_path / 'elsewhere')
        assert not is_held()
        shutil.copytree(tmp_path / 'elsewhere', folder)
        assert not is_held(), 'a copy is another folder'
        shutil.rmtree(folder)
        (tmp_path / 'elsewhere').rename(folder)
        assert is_held()


@pytest.mark.parametrize(('name', 'message'), [
    ('x' * 300, r"'.*x' cannot be used \(File name too long\)"),
    ('\udcff', r"'.*\\udcff' is not UTF-8"),
    ('a\0b', r"'.*a\\x00b' cannot be used \(embedded null byte\)"),
])  # fmt: skip
def test_names_that_no_workdir_can_have(name, message, tmp_path):
    for check in (lambda folder: train.train(_config(), folder), lambda folder: train.evaluate(_config(), folder), write_report):
        with pytest.raises(ValueError, match=f'--workdir={message}'):
            check(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['config.json', 'data.json'])
@pytest.mark.parametrize('content', ['null', '[]', '', '\x00', '"text"', '{"seed": {}, "fingerprint": 3}', 'folder'])
def test_what_says_whose_workdir_it_is_cannot_be_made_anew(name, content, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(config_lib.identity(_config())))
    (tmp_path / name).unlink(missing_ok=True)
    if content == 'folder':
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(
        ValueError, match=rf'{name} (cannot be read \(|is broken, or made by another version: ).*put back what it was'
    ):
        workdir.check(_config(), tmp_path)
        workdir.check_data(tmp_path, 'abc')
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_result_that_cannot_be_read_and_no_checkpoint_is_one_error(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config_lib.identity(_config())))
    (folder / 'result.json').write_text('[]')
    with pytest.raises(ValueError, match=r'result.json cannot be read \(it is not a JSON object\)'):
        train.train(_config(), folder)


@pytest.mark.parametrize('kind', ['folder', 'broken link', 'nothing', 'file'])
@pytest.mark.parametrize('name', ['counts.npy', 'counts.tmp.npy'])
def test_a_file_takes_the_place_of_whatever_has_its_name(kind, name, tmp_path):
    path = tmp_path / name
    if kind == 'folder':
        path.mkdir()
        (path / 'mine').write_text('kept')
    elif kind == 'broken link':
        path.symlink_to(tmp_path / 'nowhere')
    elif kind == 'file':
        path.write_text('old')
    with records.replacing(tmp_path / 'counts.npy', '.tmp.npy') as partial:
        np.save(partial, np.arange(3))
    np.testing.assert_array_equal(np.load(tmp_path / 'counts.npy'), [0, 1, 2])
    aside = sorted(path.name for path in tmp_path.iterdir() if path.name != 'counts.npy')
    assert aside == ([f'{name}.corrupt'] if kind in ('folder', 'broken link') else [])
    if kind == 'folder':
        assert (tmp_path / f'{name}.corrupt' / 'mine').read_text() == 'kept'


def test_a_picture_whose_name_a_folder_has_is_drawn(tmp_path):
    (tmp_path / 'report.png').mkdir()
    rows = [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}]
    run_report.draw(tmp_path / 'report.png', rows, title='a run', input_counts=None)
    assert (tmp_path / 'report.png').stat().st_size > 5000
