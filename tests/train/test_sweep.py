"""Sweeps: grids, real processes that are killed and started again, and what is wrong told before anything is made."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.reliability import figures
from sparse_jax import config as config_lib
from sparse_jax.report.write import write_report
from sparse_jax.train import sweep
from tests import launcher

ROOT = pathlib.Path(__file__).parents[2]
# masked dense products and one kind of step: less to compile
SETTINGS = (
    *('--config.train.steps=60', '--config.checkpoint.every=20', '--config.log.every=20', '--config.data.batch_size=20'),
    *('--config.sparsity.kernels=dense', '--config.sparsity.dense_gradient_window=None'),
)
GRIDS = ('--sweep=sparsity.density=0.05,0.1;seed=0,1', '--sweep=sparsity.method=dense;seed=0')
RUNS = {f'seed={s},sparsity.density={d}' for d in ('0.05', '0.1') for s in (0, 1)} | {'seed=0,sparsity.method=dense'}


def _command(folder, *flags):
    config = '--config=configs/mnist_lenet300.py:offline'
    return [sys.executable, 'launch.py', '--mode=sweep', config, f'--workdir={folder}', *SETTINGS, *flags]


def _launch(folder, *flags):
    return subprocess.run(_command(folder, *flags), cwd=ROOT, capture_output=True, text=True, timeout=400)


def _finished(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob('*/result.json')}


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_started_again_runs_nothing_twice_and_misses_nothing(tmp_path):
    folder = tmp_path / 'sweep'
    process = subprocess.Popen(_command(folder, *GRIDS, '--jobs=2'), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(_finished(folder)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, 'the sweep ended before it could be killed'
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    left = [
        line
        for line in subprocess.run(['ps', '-eo', 'args'], capture_output=True, text=True).stdout.split('\n')
        if str(folder) in line
    ]
    assert not left, 'runs outlived their sweep'
    before = _finished(folder)
    assert 2 <= len(before) < len(RUNS)
    assert not (folder / 'report.html').exists()

    done = _launch(folder, *GRIDS, '--jobs=2')
    assert done.returncode == 0, done.stderr
    after = _finished(folder)
    assert set(after) == RUNS and all(after[name] == stamp for name, stamp in before.items())
    assert f'5 runs, {len(before)} of them done already' in done.stderr and 'run 5/5' in done.stderr and 'all done' in done.stderr
    results = {name: json.loads((folder / name / 'result.json').read_text()) for name in RUNS}
    assert results['seed=1,sparsity.density=0.1']['density'] == pytest.approx(0.1, abs=1e-5)
    assert results['seed=0,sparsity.method=dense']['method'] == 'dense'
    assert all(result['steps'] == 60 for result in results.values())
    assert '| dense | 100% |' in done.stdout and (folder / 'report.html').exists() and (folder / 'report.md').exists()

    again = _launch(folder, *GRIDS, '--sweep=sparsity.method=static;seed=0')  # larger: only the new run is made
    assert again.returncode == 0 and '6 runs, 5 of them done already' in again.stderr
    assert {name: stamp for name, stamp in _finished(folder).items() if name in RUNS} == after

    changed = _launch(folder, *GRIDS, '--config.optimizer.momentum=0.5')
    assert changed.returncode == 2 and 'holds another experiment (optimizer.momentum: 0.9 there, 0.5 given)' in changed.stderr


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures('interruptible')
def test_a_sweep_that_is_stopped_has_its_runs_save_and_goes_on(number, tmp_path):
    folder = tmp_path / 'sweep'
    flags = ('--sweep=seed=0,1,2', '--jobs=2', '--config.train.steps=1200', '--config.checkpoint.every=100000')
    process = subprocess.Popen(_command(folder, *flags), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not all(figures.last_step(folder / f'seed={seed}') >= 100 for seed in (0, 1)):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and 'Traceback' not in said, said
    assert f'stopped by {number.name}: 0 of 3 runs are done, and what was running has saved where it was' in said.splitlines()[-1]
    for seed in (0, 1):
        assert any((folder / f'seed={seed}' / 'checkpoints').glob('[0-9]*')), 'it had saved nothing before'
    assert not (folder / 'seed=2').exists() and not _finished(folder)
    if number == signal.SIGINT:
        return
    again = _launch(folder, *flags)
    assert again.returncode == 0, again.stderr
    assert all(json.loads((folder / f'seed={seed}' / 'run.json').read_text())['resumed_at'] >= 100 for seed in (0, 1))


def test_long_names_are_cut_and_told_apart():
    patterns = [f'{"layers/attention/query/kernel " * 20}{i}' for i in range(2)]
    points = [{'sparsity.dense': pattern, 'seed': '0'} for pattern in patterns]
    first, second = sweep.names(points)
    assert first != second and max(map(len, (first.encode(), second.encode()))) <= 200
    assert first.startswith('seed=0,sparsity.dense=layers_attention_query_kernel')
    assert sweep.names(points) == [first, second] and sweep.names([{'data.dir': 'a\udcff\n'}]) == ['data.dir=a__']


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    folder = tmp_path / 'sweep'
    done = _launch(folder, '--sweep=optimizer.learning_rate=1e20,0.1;seed=0')
    assert done.returncode == 78, 'a restart would fail again'
    assert (
        '1 of 2 runs failed' in done.stderr
        and 'optimizer.learning_rate=1e+20,seed=0 ended with 78: error: the loss is' in done.stderr
    )
    assert set(_finished(folder)) == {'optimizer.learning_rate=0.1,seed=0'}
    text = (folder / 'report.md').read_text()
    assert 'Not in the tables' in text and '`optimizer.learning_rate=1e+20,seed=0`: not finished' in text


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--sweep=sparsity.densty=0.1'], "setting='sparsity.densty' does not exist. Did you mean 'sparsity.density'"),
        (['--sweep=seed'], "'seed' is not of the form name=value,value"),
        (['--sweep=seed=0,,1'], 'is not of the form name=value,value'),
        (['--sweep=seed=5:5'], 'seed=5:5 must have 1 to 1000 numbers: from 5 up to, not including, 5'),
        (['--sweep=model.options={width=8,depth=2'], 'has a brace without its other'),
        (['--sweep=seed=0:99999'], 'seed=0:99999 must have 1 to 1000 numbers'),
        (['--sweep=seed=0;seed=1'], 'seed is there twice'),
        (['--sweep=seed=0,one'], "seed='one' is not a whole number"),
        (['--sweep=sparsity.density=0.1,2'], 'config.sparsity.density=2.0: must be in (0, 1]'),
        (['--sweep=sparsity.method=rigl,srt'], "Did you mean 'set'"),
        (['--sweep=;'], '--sweep is empty'),
        ([], '--sweep is missing'),
        (['--sweep=seed=0', '--jobs=0'], 'jobs'),
        (['--sweep=seed=0', '--config.log.tensorboard=maybe'], 'log.tensorboard'),
        (['--sweep=seed=0', '--runs=x'], '--runs has no meaning with --mode=sweep'),
        (['--sweep=seed=0', '--mode=train'], '--sweep has no meaning with --mode=train'),
    ],
)  # fmt: skip
def test_wrong_sweeps(flags, message, tmp_path):
    done = launcher.launch(*_command(tmp_path / 'sweep', *flags)[2:])
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().split('\n')
    assert len(lines) == 1 and lines[0].startswith('error: ') and message in lines[0], done.stderr
    assert not (tmp_path / 'sweep').exists(), 'a file was made'


def test_runs_that_cannot_begin_are_named_and_so_are_points_that_are_one(tmp_path):
    """Children that fail at once leave no workdir; the report says so and the error names them."""
    config = config_lib.Config()
    config.data.name = 'mnist_offline'
    grid = 'seed=0,00;sparsity.density=0.1,0.10'
    command = ['-c', 'import sys; sys.exit(print("boom") or 2)']
    outcome = sweep.run(config, tmp_path / 'sweep', grids=[grid], command=command)
    with pytest.raises(RuntimeError, match=r'1 of 1 runs failed.*\n.*seed=0,sparsity.density=0.1 ended with 2: boom'):
        sweep.raise_failed(outcome)
    write_report(tmp_path / 'sweep')
    assert '- `seed=0,sparsity.density=0.1`: not begun' in (tmp_path / 'sweep' / 'report.md').read_text()


def test_a_sweep_killed_before_its_first_file_can_begin(tmp_path):
    (tmp_path / '.lock').touch()
    sweep._check(tmp_path, {})


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / 'thesis.tex').write_text('')
    config = config_lib.Config()
    with pytest.raises(ValueError, match='holds something else than a sweep'):
        sweep.run(config, tmp_path, grids=['seed=0'], command=[])
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_grids_and_names():
    points = sweep.parse(['a.x=1,2;b.x=u/v', 'a.x=2;b.x=u/v', 'a.x=3;b.x=w'])
    assert points == [{'a.x': '1', 'b.x': 'u/v'}, {'a.x': '2', 'b.x': 'u/v'}, {'a.x': '3', 'b.x': 'w'}]
    assert sweep.names(points) == ['a.x=1,b.x=u_v', 'a.x=2,b.x=u_v', 'a.x=3,b.x=w']
    assert sweep.names([{'seed': '0', 'a.x': '1'}]) == sweep.names([{'a.x': '1', 'seed': '0'}]), 'in whatever order'


def test_settings_from_text():
    config = config_lib.Config()
    for name, value in {'seed': '7', 'optimizer.nesterov': 'False', 'sparsity.density': '1e-2', 'model.name': 'lenet5'}.items():
        config_lib.override(config, name, value)
    assert (config.seed, config.optimizer.nesterov, config.sparsity.density, config.model.name) == (7, False, 0.01, 'lenet5')
    for name, value, words in (
        ('seed', '1.5', 'a whole number'),
        ('optimizer.nesterov', 'maybe', 'true or false'),
        ('sparsity.density', 'x', 'a number'),
    ):
        with pytest.raises(ValueError, match=words):
            config_lib.override(config, name, value)
