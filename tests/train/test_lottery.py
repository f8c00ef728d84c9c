"""Lottery tickets: what each round starts with, killed and gone on with, and what is refused."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import mnist_lenet300
from sparse_jax import config as config_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.export import files
from sparse_jax.report import lottery as report
from sparse_jax.train import exporting, lottery
from tests.train.test_runs import _final_state

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = {
    'train.steps': 30,
    'checkpoint.every': 10,
    'train.eval_every': 30,
    'log.every': 10,
    'sparsity.density': 0.04,
    'sparsity.kernels': 'dense',
}


def _config(**settings):
    config = mnist_lenet300.get_config('offline')
    config.mesh.data = 1
    for name, value in (FLAGS | {name.replace('__', '.'): value for name, value in settings.items()}).items():
        config_lib.override(config, name, str(value))
    return config


@pytest.fixture(scope='module')
def tickets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lottery') / 'run'
    return folder, lottery.run(_config(), folder, rounds=2, rewind_step=4)


def test_each_round_keeps_the_same_part_of_the_largest_weights_and_rewinds_them(tickets):
    folder, rows = tickets
    assert [row.nonzeros for row in rows] == [266_200, 53_240, 10_648]
    assert [round(row.density, 6) for row in rows] == [1, 0.2, 0.04]
    early, _, _ = files.load(folder / 'start.npz')
    of_run = exporting.network(lottery._dense(_config(train__steps=4, train__schedule_steps=30)), folder / 'start')[0]
    jax.tree.map(np.testing.assert_array_equal, early, of_run)
    trained, _, _ = exporting.network(lottery._dense(_config(), 30), folder / 'round_0')
    for number, count in ((1, 53_240), (2, 10_648)):
        values, masks, _ = files.load(folder / f'round_{number}.npz')
        flat = lambda tree: np.concatenate(
            [np.abs(leaf).ravel() for path, leaf in layers_lib.leaf_paths(tree) if path.endswith('kernel')]
        )
        order = np.argsort(-flat(trained), kind='stable')
        np.testing.assert_array_equal(flat(masks), np.isin(np.arange(266_200), order[:count]))
        for value, mask, start in zip(*map(jax.tree.leaves, (values, masks, early)), strict=True):
            np.testing.assert_array_equal(value, np.where(mask, start, 0))
        settings = json.loads((folder / f'round_{number}' / 'settings.json').read_text())
        assert settings['train.start_step'] == 4 and settings['sparsity.method'] == 'static'
        config = _config()
        for name, value in settings.items():
            config_lib.override(config, name, str(value))
        trained, final, _ = exporting.network(config, folder / f'round_{number}')
        jax.tree.map(np.testing.assert_array_equal, final, masks)


def test_the_dense_run_is_an_undisturbed_one_and_costs_add_up(tickets, tmp_path):
    from sparse_jax import train

    folder, rows = tickets
    result = train.train(lottery._dense(_config(), 30), tmp_path / 'dense')
    for (name, a), b in zip(_final_state(tmp_path / 'dense').items(), _final_state(folder / 'round_0').values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert rows[0].score == result['test_accuracy']
    dense = 2 * 266_200 + 266_200 - 235_200  # forward, both gradients but the first layer's of its input, by the multiply-add
    assert rows[0].operations == dense * 100 * 30
    assert rows[1].operations == pytest.approx(rows[0].operations + 100 * 26 * _sparse(folder, 1))
    assert [row.seconds for row in rows] == sorted(row.seconds for row in rows)


def _sparse(folder, number):
    layers = json.loads((folder / f'round_{number}' / 'result.json').read_text())['layers']
    return sum(3 * count for count, _ in layers.values()) - layers['fc1/kernel'][0]


def test_the_same_command_makes_nothing_anew_and_a_lost_round_comes_back_bit_for_bit(tickets, tmp_path):
    folder, rows = tickets
    copy = tmp_path / 'copy'
    shutil.copytree(folder, copy)
    for name in ('round_2', 'lottery.json'):
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    (copy / 'round_2.npz').unlink()
    written = (copy / 'round_1' / 'result.json').stat().st_mtime_ns
    shutil.move(folder, tmp_path / 'aside')  # tickets are named by their path, which is part of a round's settings
    shutil.move(copy, folder)
    try:
        again = lottery.run(_config(), folder, rounds=2, rewind_step=4)
        assert (folder / 'round_1' / 'result.json').stat().st_mtime_ns == written
        assert [(row.nonzeros, row.score) for row in again] == [(row.nonzeros, row.score) for row in rows]
        for (name, a), b in zip(
            _final_state(folder / 'round_2').items(), _final_state(tmp_path / 'aside' / 'round_2').values(), strict=True
        ):
            np.testing.assert_array_equal(a, b, err_msg=name)
        assert report.draw(folder).stat().st_size > 10_000
    finally:
        shutil.rmtree(folder)
        shutil.move(tmp_path / 'aside', folder)


@pytest.mark.parametrize(('settings', 'rounds', 'rewind_step'), [({}, 3, 4), ({}, 2, 5), ({'sparsity__density': 0.05}, 2, 4)])
def test_other_tickets_are_not_taken_for_these(settings, rounds, rewind_step, tickets):
    with pytest.raises(ValueError, match='holds other lottery tickets'):
        lottery.run(_config(**settings), tickets[0], rounds=rounds, rewind_step=rewind_step)


@pytest.mark.slow
def test_killed_within_and_between_rounds_it_ends_with_the_same_bits(tmp_path):
    flags = [f'--config.{name}={value}' for name, value in (FLAGS | {'train.steps': 600, 'checkpoint.every': 100}).items()]
    flags = ['--mode=lottery', '--config=configs/mnist_lenet300.py:offline', '--rounds=2', '--rewind_step=50', *flags]
    command = lambda folder: [sys.executable, 'launch.py', f'--workdir={folder}', *flags]
    # one workdir, one after the other, as a ticket's path is part of its round
    folder = tmp_path / 'run'
    assert subprocess.run(command(folder), cwd=ROOT, capture_output=True, timeout=600, check=False).returncode == 0
    folder.rename(tmp_path / 'whole')
    kills = 0
    for awaited in ('round_0/checkpoints/300/commit_success.txt', 'round_1.npz', 'round_2/checkpoints/200/commit_success.txt'):
        process = subprocess.Popen(command(folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (folder / awaited).exists() and process.poll() is None:
            time.sleep(0.01)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 2
    assert subprocess.run(command(folder), cwd=ROOT, capture_output=True, timeout=600, check=False).returncode == 0
    for number in range(3):
        for (name, a), b in zip(
            _final_state(folder / f'round_{number}').items(),
            _final_state(tmp_path / 'whole' / f'round_{number}').values(),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b, err_msg=f'round {number}: {name}')


@pytest.mark.parametrize(
    ('settings', 'rounds', 'rewind_step', 'told'),
    [
        ({}, 0, 0, '--rounds=0'),
        ({}, [0.5, 0.6, 0.1], 0, 'densities must fall'),
        ({}, [0.5, 0.2], 0, 'ends at another density'),
        ({}, 2, 30, '--rewind_step=30: must be from 0 to 29'),
        ({'sparsity__density': 5e-6}, 2, 0, 'density'),
        ({'sparsity__density': 1.5}, 2, 0, 'sparsity.density=1.5'),
        ({'sparsity__granularity': 'block:999x999'}, 2, 0, 'larger than a leaf'),
        ({'sparsity__granularity': 'blok:4x4'}, 2, 0, 'granularity'),
        ({'sparsity__grow': 'gradient'}, 2, 0, 'sparsity.grow'),
        ({'train__schedule_steps': 40}, 2, 0, 'train.schedule_steps'),
        ({'optimizer__learning_rate': -1.0}, 2, 0, 'optimizer.learning_rate'),
        ({'train__average_decay': 0.9}, 2, 0, 'train.average_decay'),
        ({'sparsity__storage': 'compact'}, 2, 0, "sparsity.storage='dense'"),
        ({'sparsity__method': 'rigl'}, 2, 0, 'moves no masks'),
        ({'optimizer__name': 'adam'}, 2, 0, 'optimizer.name'),
    ],
)
def test_what_cannot_be_is_told_before_a_file_is_made(settings, rounds, rewind_step, told, tmp_path):
    with pytest.raises(ValueError) as error:
        lottery.run(_config(**settings), tmp_path / 'run', rounds=rounds, rewind_step=rewind_step)
    assert told in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_a_late_start_is_for_a_network_under_a_fixed_mask(tmp_path):
    from sparse_jax import train

    for settings in (
        {'train__start_step': 5},
        {'train__start_step': 5, 'train__init_from': str(tmp_path), 'sparsity__method': 'rigl'},
    ):
        with pytest.raises(ValueError, match='train.start_step=5 is for a network of --init_from under a fixed mask'):
            train.train(_config(**settings), tmp_path / 'run')


def test_rounds_keep_the_units_and_the_axes():
    config = _config(sparsity__granularity='block:4x2', sparsity__matrix_axes='torch', sparsity__dense='fc3/*')
    kept = lottery._round(config, 30, pathlib.Path('ticket.npz'), 0.1, 0).sparsity
    assert (kept.granularity, kept.matrix_axes, kept.dense) == ('block:4x2', 'torch', 'fc3/*')
    dense = lottery._dense(config).sparsity
    assert (dense.method, dense.matrix_axes, dense.dense) == ('dense', 'torch', 'fc3/*')


def test_densities_of_rounds(tickets, tmp_path):
    """A chain by its densities is the one by its number of rounds, where these are the same."""
    rows = lottery.run(_config(), tmp_path / 'run', rounds=[0.2, 0.04], rewind_step=4)
    without_time = lambda row: {name: value for name, value in row._asdict().items() if name != 'seconds'}
    assert [without_time(row) for row in rows] == [without_time(row) for row in tickets[1]]
    assert lottery.run(_config(), tmp_path / 'run', rounds=[0.2, 0.04], rewind_step=4) == rows
    with pytest.raises(ValueError, match='holds other lottery tickets'):
        lottery.run(_config(), tmp_path / 'run', rounds=[0.3, 0.04], rewind_step=4)
