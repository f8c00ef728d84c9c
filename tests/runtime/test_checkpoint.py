"""Checkpoints: damaged ones are never restored, those of older formats are, and a write that fails is told."""

import json
import pathlib
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj
from sparse_jax.runtime import checkpoint

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'checkpoints'


def _tree(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        'w': jax.random.normal(keys[0], (40, 30)), 'mask': jax.random.bernoulli(keys[1], 0.3, (40, 30)),
        'key': keys[2], 'count': jnp.int32(seed), 'half': jax.random.normal(keys[1], (7,), jnp.bfloat16),
    }  # fmt: skip


def _bits(tree):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
        for x in jax.tree.leaves(tree)
    ]


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoints') / 'two'
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(step, _tree(step), 1.5)
    checkpoints.close()
    return folder


# Reads of a damaged checkpoint that orbax abandons are told as coroutines that nobody awaited.
abandons_reads = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@abandons_reads
def test_a_flipped_bit_in_any_file_is_never_restored(two_steps, tmp_path):
    files = sorted(p.relative_to(two_steps) for p in (two_steps / '2').rglob('*') if p.is_file() and p.stat().st_size)
    back, refused, expected = 0, [], {step: _bits(_tree(step)) for step in (1, 2)}
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        content = bytearray((folder / name).read_bytes())
        content[len(content) * 2 // 3] ^= 1 << number % 8
        (folder / name).write_bytes(content)
        checkpoints = checkpoint.Checkpoints(folder)
        try:
            step, state, seconds = checkpoints.restore_newest(jax.eval_shape(lambda: _tree(1)))
        except ValueError as error:
            refused.append(str(error))
        else:
            assert _bits(state) == expected[step] and seconds == 1.5, f'{name}: a changed bit was restored'
            assert (step == 1) == (folder / '2.corrupt').exists() == (not (folder / '2').exists())
            back += step == 1
        finally:
            checkpoints.close()
    assert all('other arrays' in reason or 'has format' in reason for reason in refused)
    assert len(files) > 5 and back >= 3, (len(files), back)


def test_a_renamed_step_is_not_believed(two_steps, tmp_path):
    folder = tmp_path / 'renamed'
    shutil.copytree(two_steps, folder)
    (folder / '2').rename(folder / '1000')
    checkpoints = checkpoint.Checkpoints(folder)
    step, state, _ = checkpoints.restore_newest(jax.eval_shape(lambda: _tree(1)))
    checkpoints.close()
    assert step == 1 and _bits(state) == _bits(_tree(1)) and (folder / '1000.corrupt').exists()
    checkpoints = checkpoint.Checkpoints(two_steps, read_only=True)
    assert checkpoints.restore(2, jax.eval_shape(lambda: _tree(1)))[1] == 1.5
    checkpoints.close()


@pytest.mark.parametrize(
    'text', ['[]', '{"metrics": 1}', '{"commit_timestamp_nsecs": "x"}', '{"commit_timestamp_nsecs": 1' + 400 * '0' + '}']
)
def test_a_checkpoint_is_read_whatever_orbax_says_of_it(two_steps, tmp_path, text):
    folder = tmp_path / 'checkpoints'
    shutil.copytree(two_steps, folder)
    (folder / '1' / '_CHECKPOINT_METADATA').write_text(text)
    with pytest.raises(ValueError, match=r'1/_CHECKPOINT_METADATA cannot be read \(.*\): delete it'):
        checkpoint.Checkpoints(folder, read_only=True)
    shutil.rmtree(folder / '2')  # before it is opened: orbax asks later for the steps that it has seen
    checkpoints = checkpoint.Checkpoints(folder, keep=5)
    step, state, _ = checkpoints.restore_newest(jax.eval_shape(lambda: _tree(1)))
    assert step == 1 and _bits(state) == _bits(_tree(1))
    assert (folder / '1' / '_CHECKPOINT_METADATA.corrupt').read_text() == text
    checkpoints.save(3, _tree(3), 1.0)
    checkpoints.close()


@abandons_reads
def test_never_a_silent_fresh_start(two_steps, tmp_path):
    folder = tmp_path / 'both'
    shutil.copytree(two_steps, folder)
    for step in (1, 2):
        (folder / str(step) / 'meta' / 'metadata').write_text('{')
    for _ in range(2):  # the first time they are put aside; the second time there is nothing else
        checkpoints = checkpoint.Checkpoints(folder)
        with pytest.raises(ValueError, match=r'no whole checkpoint, only damaged ones \(1.corrupt, 2.corrupt\)'):
            checkpoints.restore_newest(jax.eval_shape(lambda: _tree(1)))
        checkpoints.close()


@pytest.mark.parametrize(('change', 'message'), [
    (lambda t: {**t, 'w': t['w'].astype(jnp.bfloat16)}, r'w: float32\[40, 30\] there, bfloat16\[40, 30\] wanted'),
    (lambda t: {k: v for k, v in t.items() if k != 'half'}, r'half: bfloat16\[7\] there, nothing wanted'),
    (lambda t: {**t, 'mask': t['mask'][:, :24]}, r'mask: bool\[40, 30\] there, bool\[40, 24\] wanted'),
])  # fmt: skip
def test_another_dtype_or_experiment_is_refused_and_stays(change, message, two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / 'run')
    checkpoints = checkpoint.Checkpoints(tmp_path / 'run')
    with pytest.raises(ValueError, match=message):
        checkpoints.restore_newest(jax.eval_shape(lambda: change(_tree(1))))
    checkpoints.close()
    assert (tmp_path / 'run' / '2').exists()


def test_masks_take_a_bit_a_weight_and_the_first_format_is_read(two_steps, tmp_path, monkeypatch):
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (512, 1024))
    sizes = {}
    for version in (1, 3):
        folder = tmp_path / str(version)
        checkpoints = checkpoint.Checkpoints(folder)
        if version == 1:  # as it was written
            meta = {'format': 1, 'batches': 1, 'seconds': 0.5, 'fingerprint': checkpoint.fingerprint({'mask': mask})}
            monkeypatch.setattr(checkpoint, '_packed', lambda tree: tree)
            monkeypatch.setattr(checkpoint, '_meta', lambda *_, meta=meta: meta)
        checkpoints.save(1, {'mask': mask}, 0.5)
        checkpoints.close()
        monkeypatch.undo()
        sizes[version] = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
        checkpoints = checkpoint.Checkpoints(folder)
        _, state, seconds = checkpoints.restore_newest(jax.eval_shape(lambda: {'mask': mask}))
        checkpoints.close()
        np.testing.assert_array_equal(state['mask'], mask)
        assert seconds == 0.5
    assert mask.size / 8 < sizes[3] < mask.size / 8 + 20_000


def test_a_write_that_fails_is_told_at_a_later_step_and_the_one_before_stays(tmp_path):
    """A limit on the size of files, as a full disk would be."""
    tree = {'w': jax.random.normal(jax.random.key(0), (500, 500))}
    checkpoints = checkpoint.Checkpoints(tmp_path / 'run', keep=2)
    checkpoints.save(1, tree, 0.0)
    checkpoints._manager.wait_until_finished()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(Exception, match='File too large'):
            checkpoints.save(2, tree, 0.0)
            for _ in range(200):
                checkpoints.check()
                time.sleep(0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints = checkpoint.Checkpoints(tmp_path / 'run', keep=2)
    step, state, _ = checkpoints.restore_newest(jax.eval_shape(lambda: tree))
    assert step == 1 and _bits(state) == _bits(tree)
    checkpoints.save(2, tree, 0.0)
    checkpoints.close()
    assert (tmp_path / 'run' / '2').exists()


def _grown_up():
    """The optimizer and the parameters that the checkpoints in golden/ were made with: three steps of them."""
    options = dict(
        granularity='block:2x2', stacked=lambda path, _: path == 'blocks', track_exploration=True, dense=('out',), seed=5
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), sj.methods.set_(optax.sgd(0.1, 0.9), 0.3, update_every=2, total_steps=20, **options)
    )
    shapes = {'blocks': (2, 8, 6), 'out': (6, 4), 'fc': (8, 10), 'bias': (4,)}
    return tx, {name: jnp.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize('version', (1, 2))
def test_runs_of_older_formats_go_on(version, tmp_path):
    """Made by the version before format 3, which also made the three steps after them that are compared."""
    shutil.copytree(GOLDEN / f'format{version}', tmp_path / 'run')
    tx, params = _grown_up()
    target = jax.eval_shape(lambda p: {'params': p, 'opt_state': tx.init(p)}, params)
    layers = np.asarray(tx.init(params)[1].layers)
    checkpoints = checkpoint.Checkpoints(tmp_path / 'run')
    with pytest.raises(ValueError, match=f'has format {version}, which does not say what the layers are: give layers='):
        checkpoints.restore(3, target)
    step, state, seconds = checkpoints.restore_newest(target, layers)
    checkpoints.close()
    assert (step, seconds) == (3, 0.5)
    assert jax.tree.structure(state) == jax.tree.structure(target)
    assert sj.layer_names(state['opt_state']) == ['blocks[0]', 'blocks[1]', 'fc']
    params, opt_state = state['params'], state['opt_state']
    for t in range(3, 6):
        updates, opt_state = tx.update(jax.tree.map(lambda p, t=t: jnp.cos((t + 1) * p), params), opt_state, params)
        params = optax.apply_updates(params, updates)
    expected = np.load(GOLDEN / 'after_6_steps.npz')
    for name, mask in sj.get_masks(opt_state).items():
        np.testing.assert_array_equal(mask, expected[f'mask_{name}'])
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-6, atol=1e-7)


def test_a_new_checkpoint_holds_what_the_layers_are(tmp_path):
    tx, params = _grown_up()
    tree = {'params': params, 'opt_state': tx.init(params)}
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, tree, 0.0)
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    _, state, _ = checkpoints.restore_newest(jax.eval_shape(lambda: tree))
    checkpoints.close()
    assert _bits(state) == _bits(tree)
    assert json.loads((tmp_path / '1' / 'meta' / 'metadata').read_text())['format'] == 3
