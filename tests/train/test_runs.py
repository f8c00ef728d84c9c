"""Whole runs: real processes, real kills, real checkpoints."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sparse_jax as sj
from configs import mnist_lenet5, mnist_lenet300
from sparse_jax import train
from sparse_jax.report import run_report
from sparse_jax.runtime import checkpoint, records
from sparse_jax.train import experiment as experiment_lib
from sparse_jax.train import metrics
from tests import launcher

ROOT = pathlib.Path(__file__).parents[2]


def _config(**settings):
    config = mnist_lenet300.get_config('offline')
    config.mesh.data = 1  # of this process's eight devices
    for name, value in settings.items():
        section, field = name.split('__')
        setattr(getattr(config, section), field, value)
    return config


def _command(folder, *flags):
    return [sys.executable, 'launch.py', '--config=configs/mnist_lenet300.py:offline', f'--workdir={folder}', *flags]


def _launch(folder, *flags):
    return subprocess.run(_command(folder, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300)


def _final_state(folder) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, read by orbax alone."""
    manager = ocp.CheckpointManager(folder / 'checkpoints')
    step = manager.latest_step()
    state = ocp.StandardCheckpointer().restore((folder / 'checkpoints' / str(step) / 'state').absolute())
    manager.close()
    flat = jax.tree_util.tree_leaves_with_path(state)
    unwrap = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return {jax.tree_util.keystr(path): np.asarray(unwrap(x)) for path, x in flat}


STEPS = (
    '--config.train.steps=1000',
    '--config.optimizer.decay_every=800',
    '--config.checkpoint.every=200',
    '--config.log.every=50',
)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'undisturbed'
    done = _launch(folder, *STEPS)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_leaves_its_files_and_prints_its_result(undisturbed):
    folder, done = undisturbed
    result = json.loads((folder / 'result.json').read_text())
    assert (
        result['nonzeros'] == 13_310 and result['density'] == 0.05 and result['parameters'] == 266_610 and result['steps'] == 1000
    )
    assert result['test_accuracy'] > 0.9 and result['seconds'] > 0 and result['steps_per_second'] > 0
    assert 'test accuracy' in done.stdout and '13,310' in done.stdout and 'step 1000/1000' in done.stderr
    assert 'sparse: fc1/kernel, fc2/kernel, fc3/kernel; 3 dense leaves: fc1/bias, fc2/bias, fc3/bias' in done.stderr
    assert (folder / 'report.png').read_bytes().startswith(b'\x89PNG') and (folder / 'run.json').exists()
    rows = metrics.read(folder)
    updates = [row for row in rows if 'flips' in row]
    assert [row['step'] for row in updates] == list(range(40, 1000, 40)), 'a mask update every epoch, but none at the last step'
    for row in updates:
        nonzeros = sum(d * n for d, n in zip(row['density'].values(), (235_200, 30_000, 1_000), strict=True))
        assert round(nonzeros) == 13_310
        assert sum(row['share'].values()) == pytest.approx(1, abs=1e-5)
        assert sum(row['pruned'].values()) == sum(row['grown'].values()) > 0
    steps = [row for row in rows if 'loss' in row]
    assert {'loss', 'accuracy', 'learning_rate', 'prune_rate', 'steps_per_second'} <= set(steps[0])
    assert steps[0]['learning_rate'] == pytest.approx(0.1) and steps[-1]['learning_rate'] == pytest.approx(0.01)
    assert steps[-1]['loss'] < steps[0]['loss']
    assert not list(folder.rglob('*tmp*')), 'half-made files'


@pytest.mark.slow
def test_kill_at_several_moments_changes_no_bit(undisturbed, tmp_path):
    reference, _ = undisturbed
    folder = tmp_path / 'killed'
    for target in (0, 410):  # kill -9 as soon as metrics.jsonl reaches this step; at 0 no checkpoint exists yet
        process = subprocess.Popen(_command(folder, *STEPS), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while True:
            lines = (folder / 'metrics.jsonl').read_text().split('\n') if (folder / 'metrics.jsonl').exists() else []
            if len(lines) > 1 and json.loads(lines[-2])['step'] >= target:
                break
            assert process.poll() is None and time.monotonic() < deadline, 'the process ended before it could be killed'
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (folder / 'result.json').exists()
    assert _launch(folder, *STEPS).returncode == 0
    assert json.loads((folder / 'run.json').read_text())['resumed_at'] >= 400, 'the last run must have gone on from a checkpoint'
    expected, got = _final_state(reference), _final_state(folder)
    assert expected.keys() == got.keys() and any('masks' in k for k in got) and any('trace' in k for k in got)
    for name, array in expected.items():
        assert array.tobytes() == got[name].tobytes(), f'{name} differs'
    results = [records.read(f / 'result.json') for f in (reference, folder)]
    same = [{k: v for k, v in r.items() if 'second' not in k and 'time' not in k} for r in results]
    assert same[0] == same[1]
    rows = [[row | {'steps_per_second': 0} for row in metrics.read(f)] for f in (reference, folder)]
    assert rows[0] == rows[1], 'metrics.jsonl has lost or repeated lines'


def test_the_same_command_in_a_finished_workdir_prints_the_result(undisturbed):
    folder, first = undisturbed
    before = (folder / 'result.json').stat().st_mtime_ns
    again = launcher.launch(*_command(folder, *STEPS, '--config.checkpoint.keep=5')[2:])
    assert again.returncode == 0 and again.stdout == first.stdout
    assert (folder / 'result.json').stat().st_mtime_ns == before


def test_another_experiment_in_the_workdir_is_refused_and_the_differences_listed(undisturbed):
    folder, _ = undisturbed
    done = launcher.launch(*_command(folder, *STEPS, '--config.sparsity.density=0.1', '--config.seed=3')[2:])
    assert done.returncode == 2
    assert 'holds another experiment (seed: 0 there, 3 given; sparsity.density: 0.05 there, 0.1 given)' in done.stderr
    assert len(done.stderr.strip().split('\n')) == 1


def test_evaluate_reads_the_checkpoint_and_writes_nothing(undisturbed):
    folder, _ = undisturbed
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob('*'))
    done = launcher.launch(*_command(folder, *STEPS, '--mode=evaluate')[2:])
    assert done.returncode == 0, done.stderr
    evaluated, result = json.loads(done.stdout), json.loads((folder / 'result.json').read_text())
    assert evaluated['test_accuracy'] == result['test_accuracy'] and evaluated['step'] == 1000
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob('*')) == before


@pytest.mark.parametrize('damage', ['truncate', pytest.param('flip a bit', marks=pytest.mark.slow), 'delete', 'another format'])
def test_a_damaged_checkpoint_is_told(damage, undisturbed, tmp_path):
    """By --mode=evaluate, which changes nothing; training puts it aside and goes on from the one before."""
    folder = tmp_path / 'run'
    shutil.copytree(undisturbed[0], folder)
    state = folder / 'checkpoints' / '1000' / 'state'
    victim = max((p for p in state.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == 'truncate':
        victim.write_bytes(content[: len(content) // 2])
    elif damage == 'flip a bit':
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    elif damage == 'delete':
        victim.unlink()
    else:
        meta = state.parent / 'meta' / 'metadata'
        meta.write_text(re.sub(r'"format": ?3', '"format": 99', meta.read_text()))
    match = 'has format 99, this version reads 1 and 2 and 3' if damage == 'another format' else 'checkpoints/1000 is damaged'
    done = launcher.launch(*_command(folder, *STEPS, '--mode=evaluate')[2:])
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.split('\n') if line.startswith('error: ')]  # orbax's threads may add theirs
    assert len(lines) == 1, done.stderr
    assert match in lines[0]
    assert 'delete its folder' in lines[0]
    if damage == 'flip a bit':
        (folder / 'result.json').unlink()
        done = _launch(folder, *STEPS)
        assert done.returncode == 0 and 'It was put aside as 1000.corrupt' in done.stderr, done.stderr
        assert json.loads((folder / 'run.json').read_text())['resumed_at'] == 800
        expected, got = _final_state(undisturbed[0]), _final_state(folder)
        assert all(expected[name].tobytes() == got[name].tobytes() for name in expected)


@pytest.mark.slow
def test_two_processes_cannot_share_a_workdir(tmp_path):
    from sparse_jax.runtime import workdir

    with (
        workdir.locked(tmp_path / 'run'),
        pytest.raises(ValueError, match='in use by another process'),
        workdir.locked(tmp_path / 'run'),
    ):
        pass
    with workdir.locked(tmp_path / 'run'):
        pass


@pytest.mark.slow
def test_the_same_seed_twice_gives_the_same_bits(tmp_path):
    states = []
    for name in ('a', 'b'):
        train.train(_config(train__steps=90, sparsity__dense_gradient_window=None), tmp_path / name)
        states.append(_final_state(tmp_path / name))
    assert all(states[0][k].tobytes() == states[1][k].tobytes() for k in states[0])


@pytest.mark.slow
def test_the_dense_twin_shares_everything_but_the_masks(tmp_path):
    config = _config(train__steps=50, sparsity__method='dense')
    result = train.train(config, tmp_path / 'dense')
    assert result['density'] == 1.0 and result['nonzeros'] == 266_200 and result['parameters'] == 266_610
    run_report.show(tmp_path / 'dense')
    assert (tmp_path / 'dense' / 'report.png').exists()


@pytest.mark.parametrize('method', sj.methods.NAMES)
def test_every_method_is_made_from_a_config(method):
    experiment = train.create(_config(sparsity__method=method), num_examples=4000, input_shape=(28, 28, 1), num_outputs=10)
    stop, every = {'rigl': 3000, 'srigl': 3000, 'static': 0}.get(method, 4000), 1 if method == 'truncation' else 40
    assert [t for t in range(1, 4001) if experiment.is_mask_update(t)] == list(range(every, stop, every))
    steps = dict.fromkeys(('set', 'dsr', 'static', 'gmp', 'mest', 'ac_dc'), 0) | dict.fromkeys(('rigl', 'granet', 'srigl'), 1)
    assert experiment.dense_gradient_steps == (steps | dict.fromkeys(('top_kast', 'truncation'))).get(method, 22)


@pytest.mark.parametrize(
    ('method', 'nonzeros', 'updates', 'settings'),
    [
        ('srigl', 13_280, [4, 8], {'sparsity__ablation': 0.1, 'sparsity__distribution': 'uniform'}),
        ('top_kast', 13_310, [4, 8], {'sparsity__backward_density': 0.2}),
        ('truncation', 13_310, list(range(1, 12)), {'sparsity__update_every': 0}),
        ('sparse_momentum', 133_100, [4, 8], {'sparsity__granularity': 'n_of_m:2:4', 'sparsity__density': 0.5, 'data__batch_size': 10}),
        ('snip', 13_220, [], {'sparsity__granularity': 'fan_in'}),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_structures_and_their_methods_train_from_the_launcher(method, nonzeros, updates, settings, tmp_path):
    config = _config(train__steps=12, sparsity__method=method, **{'sparsity__update_every': 4, 'data__batch_size': 20} | settings)
    result = train.train(config, tmp_path / 'run')
    # SRigL's outputs that stay share the others' weights, in whole numbers
    assert result['nonzeros'] == nonzeros if method != 'srigl' else 0 <= nonzeros - result['nonzeros'] < 400
    assert [row['step'] for row in metrics.read(tmp_path / 'run') if 'flips' in row] == updates
    assert train.train(config, tmp_path / 'run') == result, 'a finished run prints its result'


@pytest.mark.parametrize('method', ['rigl', 'granet', 'static'])
@pytest.mark.slow
def test_methods_train_from_the_launcher(method, tmp_path):
    own = {'rigl': {'sparsity__accumulate_steps': 3}, 'granet': {'sparsity__initial_density': 0.3}}.get(method, {})
    config = _config(train__steps=12, sparsity__update_every=4, sparsity__method=method, data__batch_size=20, **own)
    result = train.train(config, tmp_path / 'run')
    assert result['method'] == method and result['nonzeros'] == 13_310
    assert result['operations_inference_against_dense'] == pytest.approx(0.05)
    assert (result['exploration_rate'] == 0.05) == (method == 'static')
    updates = [row['step'] for row in metrics.read(tmp_path / 'run') if 'flips' in row]
    assert updates == ([] if method == 'static' else [4, 8])


@pytest.mark.slow
def test_operations_of_a_run_are_counted_over_its_steps(tmp_path):
    """GMP by hand: dense for 4 steps, the schedule's density for 4, 5% for the last 4; the first layer needs no input gradient."""
    config = _config(train__steps=12, sparsity__update_every=4, sparsity__method='gmp', data__batch_size=20)
    result = train.train(config, tmp_path / 'run')
    densities = [row['density'] for row in metrics.read(tmp_path / 'run') if 'density' in row]
    mean = {name: np.mean([d[name] for d in densities]) for name in densities[0]}
    size = {'fc1/kernel': 235_200, 'fc2/kernel': 30_000, 'fc3/kernel': 1_000}
    products = sum(mean[name] * size[name] * (2 if name == 'fc1/kernel' else 3) for name in size)
    dense = sum(size[name] * (2 if name == 'fc1/kernel' else 3) for name in size)
    assert result['operations_training_against_dense'] == pytest.approx(products / dense, rel=1e-4)


@pytest.mark.slow
def test_blocks_and_a_dense_layer_from_the_launcher(tmp_path):
    config = _config(train__steps=6, sparsity__update_every=2, sparsity__granularity='block:16x16', sparsity__dense='fc3/*')
    result = train.train(config, tmp_path / 'run')
    assert set(result['layers']) == {'fc1/kernel', 'fc2/kernel'}
    assert result['density'] == pytest.approx(0.05, rel=0.2), 'exact in units; edge blocks are smaller'


@pytest.mark.slow
def test_lenet5_trains_a_few_steps(tmp_path):
    config = mnist_lenet5.get_config('offline')
    config.train.steps, config.sparsity.update_every, config.data.batch_size, config.mesh.data = 4, 2, 20, 1
    result = train.train(config, tmp_path / 'run')
    assert result['nonzeros'] == 21_525 and result['density'] == 0.05


def test_a_step_without_a_mask_update_leaves_its_program_out_and_is_the_same_step():
    experiment = train.create(_config(), num_examples=4000, input_shape=(28, 28, 1), num_outputs=10)
    state = jax.jit(experiment.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {'input': rng.normal(size=(100, 28, 28, 1)).astype(np.float32), 'label': rng.integers(0, 10, 100).astype(np.int32)}
    step = jax.jit(experiment.train_step, static_argnames=('dense_gradients', 'mask_update'))
    size = {moves: len(step.lower(state, batch, mask_update=moves).as_text()) for moves in (False, True)}
    assert size[False] < size[True] / 2
    (plain, metrics), (general, expected) = (step(state, batch, mask_update=moves) for moves in (False, True))
    assert float(metrics['loss']) == pytest.approx(float(expected['loss']), rel=1e-6)
    for a, b in zip(jax.tree.leaves(plain._replace(rng_key=0)), jax.tree.leaves(general._replace(rng_key=0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    late = lambda x: x._replace(count=jnp.int32(39)) if isinstance(x, sj.SparsifyState) else x
    at_update = state._replace(opt_state=jax.tree.map(late, state.opt_state, is_leaf=lambda x: isinstance(x, sj.SparsifyState)))
    for moves in (False, True):
        masks = [sj.get_masks(s.opt_state) for s in (at_update, step(at_update, batch, mask_update=moves)[0])]
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *masks)) == (not moves)


@pytest.mark.slow
def test_gradients_off_the_masks_are_zeros_without_dense_gradients():
    config = _config()
    experiment = train.create(config, num_examples=4000, input_shape=(28, 28, 1), num_outputs=10)
    state = experiment.init(jax.random.key(0))
    batch = {'input': jax.random.normal(jax.random.key(1), (10, 28, 28, 1)), 'label': jnp.arange(10)}
    trace = {}
    for dense in (True, False):
        after, _ = jax.jit(experiment.train_step, static_argnames='dense_gradients')(state, batch, dense_gradients=dense)
        trace[dense] = after.opt_state.inner_state[1][0].trace['fc1']['kernel']
    mask = sj.get_masks(state.opt_state)['fc1']['kernel']
    assert not trace[False][~mask].any() and (trace[True][~mask] != 0).any()
    np.testing.assert_array_equal(trace[False][mask], trace[True][mask])


def test_evaluation_counts_every_example_once():
    config = _config()
    experiment = train.create(config, num_examples=4000, input_shape=(28, 28, 1), num_outputs=10)
    state = experiment.init(jax.random.key(0))
    batch = {'input': np.random.default_rng(0).normal(size=(7, 28, 28, 1)).astype(np.float32), 'label': np.arange(7)}
    sums = experiment.evaluate(state, batch)
    x = batch['input'].reshape(7, -1)
    p = jax.tree.map(np.asarray, state.params)
    for name in ('fc1', 'fc2'):
        x = np.maximum(x @ p[name]['kernel'] + p[name]['bias'], 0)
    logits = (x @ p['fc3']['kernel'] + p['fc3']['bias']).astype(np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(7), np.arange(7)]
    assert float(sums['loss']) == pytest.approx(losses.sum(), rel=1e-4)
    assert int(sums['correct']) == (logits.argmax(axis=1) == np.arange(7)).sum()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    done = _launch(tmp_path / 'run', '--config.optimizer.learning_rate=1e20', '--config.train.steps=200')
    assert done.returncode == 78, 'a restart would give the same'
    (line,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert (
        line.startswith('error: the loss is')
        and 'lower optimizer.learning_rate. Nothing had been saved. The same command would' in line
    )
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'run' / 'result.json').exists()


@pytest.mark.slow
def test_tensorboard_files(tmp_path):
    config = _config(train__steps=5, log__tensorboard=True, log__every=1)
    train.train(config, tmp_path / 'run')
    assert list((tmp_path / 'run' / 'tensorboard').glob('events*'))


def test_fingerprint_sees_any_bit_and_any_swap():
    tree = {
        'w': jnp.arange(12.0).reshape(3, 4),
        'm': jnp.array([True, False]),
        'k': jax.random.key(0),
        'b': jnp.ones(3, jnp.bfloat16),
    }
    base = checkpoint.fingerprint(tree)
    assert base == checkpoint.fingerprint(jax.tree.map(lambda x: x, tree))
    changes = {
        'w': [tree['w'].at[2, 3].set(np.nextafter(np.float32(11), np.float32(12))), tree['w'].T.reshape(3, 4)],
        'm': [jnp.array([False, True])],
        'k': [jax.random.key(1)],
        'b': [tree['b'].at[0].set(-1)],
    }
    for name, values in changes.items():
        for value in values:
            assert checkpoint.fingerprint({**tree, name: value}) != base


def test_sizes_and_update_steps():
    config = _config(sparsity__start_step=40, sparsity__stop_step=200)
    experiment = train.create(config, num_examples=4000, input_shape=(28, 28, 1), num_outputs=10)
    assert experiment.total_steps == 4000 and experiment.update_every == 40
    assert [t for t in range(1, 4001) if experiment.is_mask_update(t)] == [80, 120, 160]


@pytest.mark.parametrize(
    ('settings', 'told'),
    [
        ({'sparsity__matrix_axes': 'torch'}, 'is for models of your own'),
        ({'sparsity__method': 'top_kast', 'sparsity__dense_gradient_window': 5}, 'dense gradients in all steps'),
        ({'sparsity__method': 'top_kast', 'train__init_from': 'runs/x'}, 'takes the largest of weights that it stores'),
        ({'sparsity__method': 'gmp', 'sparsity__granularity': 'fan_in'}, 'not with a schedule'),
        ({'sparsity__method': 'rigl', 'sparsity__storage': 'compact', 'sparsity__grow': 'magnitude'}, 'values of missing weights'),
        ({'sparsity__storage': 'compact', 'sparsity__prune': 'magnitude_and_gradient'}, 'one kind of score'),
        ({'sparsity__storage': 'compact', 'sparsity__granularity': 'fan_in'}, 'single weights or blocks'),
    ],
)
def test_settings_that_do_not_go_together_are_told_before_a_file_is_made(settings, told, tmp_path):
    with pytest.raises(ValueError, match=told) as error:
        train.train(_config(**settings), tmp_path / 'run')
    assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_settings_of_methods_reach_the_rule():
    rule = lambda **settings: experiment_lib.rule_of(_config(**settings), None, 40, 4000)
    assert rule(sparsity__method='srigl', sparsity__ablation=0.0).ablation == 0
    assert rule(sparsity__method='srigl').ablation == 0.3
    assert rule(sparsity__method='top_kast', sparsity__backward_density=0.3).backward_density == 0.3
    assert rule(sparsity__method='top_kast').backward_density == pytest.approx(0.1)
    experiment_lib.check_names(
        _config(sparsity__method='ac_dc', train__steps=4000, sparsity__update_every=0)
    )  # an epoch's length is not known yet
