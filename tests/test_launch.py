"""The launcher: help, the list of settings, and wrong input, told in one line with exit code 2 before anything is written."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from sparse_jax import config as config_lib
from sparse_jax.launch import allocator, command_line, usage
from tests import launcher

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = '--config=configs/mnist_lenet300.py:offline'


# For each command line: exit code, and the beginning of what stderr says.
FRONT = (
    (['--help'], 0, 'usage: python launch.py'),
    (['-h'], 0, 'usage: python launch.py'),
    (['--helpshort'], 0, 'usage: python launch.py'),
    (['--helpfull', '--config=nope'], 0, 'usage: python launch.py'),
    ([], 2, 'usage: python launch.py'),
    (['--workdir={}'], 2, 'error: --config is missing: give for instance --config=configs/mnist_lenet300.py:offline.'),
    (['--workdir={}', '--config='], 2, 'error: --config is missing'),
    (['--workdir={}', '--config.seed=1'], 2, 'error: --config is missing'),
    (['--config=lenet'], 2, "error: --config='lenet' does not exist. Did you mean configs/mnist_lenet300.py or configs/mnist_lenet5.py?"),
    (['--config=mnist_lenet300'], 2, "error: --config='mnist_lenet300' does not exist. Did you mean configs/mnist_lenet300.py?"),
    (['--config', 'configs/mnist_lent5.py'], 2, "error: --config='configs/mnist_lent5.py' does not exist. Did you mean configs/mnist_lenet5.py or"),
    (['--config=configs/nope.py', '--workdir={}'], 2, "error: --config='configs/nope.py' does not exist.\n"),
    (['--config=configs'], 2, "error: --config='configs' is a folder."),
    (['--config=configs/cifar10.py'], 2, "error: --config='configs/cifar10.py' has no function get_config"),
    (['--config=configs/mnist_lenet300.py:ofline', '--workdir={}'], 2,
     "error: --config='configs/mnist_lenet300.py:ofline': the variant 'ofline' does not exist. "
     'Give configs/mnist_lenet300.py or configs/mnist_lenet300.py:offline.'),
)  # fmt: skip


def test_help_and_wrong_configs_tell_what_there_is_without_jax(tmp_path):
    program = (
        'import contextlib, io, json, sys\nfrom sparse_jax.launch import command_line\n'
        'answers = []\n'
        'for argv in json.loads(sys.argv[1]):\n'
        '    with contextlib.redirect_stderr(io.StringIO()) as stderr:\n'
        '        try:\n'
        '            command_line.parse(["launch.py", *argv])\n'
        '        except SystemExit as end:\n'
        '            answers.append((end.code, stderr.getvalue()))\n'
        'print(json.dumps((answers, "jax" in sys.modules)))\n'
    )
    lines = json.dumps([[flag.format(tmp_path / 'run') for flag in flags] for flags, _, _ in FRONT])
    environment = os.environ | {'COLUMNS': '80'}
    done = subprocess.run([sys.executable, '-c', program, lines], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers, is_jax_imported = json.loads(done.stdout)
    assert not is_jax_imported
    for (flags, code, beginning), (answered, stderr) in zip(FRONT, answers, strict=True):
        assert answered == code and stderr.startswith(beginning), (flags, stderr)
        assert '  configs/mnist_lenet300.py :offline\n      LeNet-300-100 on MNIST at 5% of the weights.\n' in stderr, flags
        assert stderr.count('  configs/') == 15 and 'configs/cifar10.py\n' not in stderr.partition('\n')[2], flags
        assert '--list_settings' in stderr and 'python launch.py --config=configs/mnist_lenet300.py:offline --workdir=' in stderr
        if beginning.startswith('usage'):
            assert all(f'\n  --{name} ' in stderr for name in ('config', 'workdir', 'sweep', 'distributed', 'process_id')), flags
            assert all(f'\n  --mode={mode} ' in stderr for mode in command_line.MODES), flags
            assert 'verbosity' not in stderr and 'repeat this option' not in stderr, "absl's own flags"
        else:
            assert 'python launch.py --help' in stderr
    assert not (tmp_path / 'run').exists()


def test_every_flag_of_the_launcher_is_in_its_help():
    defined = [flag.name for flag in command_line.flags.FLAGS.flags_by_module_dict()['sparse_jax.launch.command_line']]
    assert sorted(defined) == sorted(flag.name for flag in command_line.FLAGS)


def test_configs_are_found_without_running_them(tmp_path):
    (tmp_path / 'mine.py').write_text('"""Mine.\n\nMore."""\nfrom base import get_config\nraise SystemExit')
    (tmp_path / 'helper.py').write_text('"""What mine shares."""\nfrom base import other\nbase.get_config()')
    (tmp_path / 'computed.py').write_text('VARIANTS = base.VARIANTS\ndef get_config(variant=""): ...')
    (tmp_path / 'broken.py').write_text('def get_config(:')
    configs = {pathlib.Path(path).name: config for path, config in usage.find_configs(tmp_path).items()}
    assert configs == {'mine.py': usage.ConfigFile('Mine.', None), 'computed.py': usage.ConfigFile('', None)}
    usage.check_config(f'{tmp_path}/mine.py:any')  # only running it tells
    usage.check_config(f'{tmp_path}/broken.py')
    with pytest.raises(usage.WrongConfig, match='Did you mean .*mine.py'):
        usage.check_config(f'{tmp_path}/min.py')


def test_every_setting_is_described():
    settings = config_lib.describe()
    assert [setting.name for setting in settings] == list(config_lib.flatten(config_lib.Config()))
    for setting in settings:
        description = setting.description
        assert description[:1].isupper() and description.endswith('.') and '#' not in description, setting
        if setting.default == '' or setting.default == -1:  # they stand for something else
            assert ('empty:' if setting.default == '' else '-1:') in description, setting
        if setting.type == 'int' and setting.default == 0 and setting.name != 'seed':
            assert '0: ' in description or '0 for ' in description, setting
    assert all(name in {setting.name for setting in settings} for name in usage._choices())


def test_settings_are_listed(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    page = usage.settings_page()
    for name, value in config_lib.flatten(config_lib.Config()).items():
        assert page.count(f'\n  {name} = {value!r}  (') == 1, name
    assert max(map(len, page.split('\n'))) <= 80
    assert '  sparsity.density = 0.05  (float, in (0, 1])\n      Fraction of the sparse layers' in page
    assert 'One of: sgd, adamw.' in page and 'Only with data.name=text.\n' in page
    command = [sys.executable, 'launch.py', '--list_settings', CONFIG, '--config.sparsity.density=0.1']
    environment = os.environ | {'COLUMNS': '80'}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    marked = [line for line in done.stdout.split('\n')[2:] if line.startswith('*')]
    assert [line.split(' ')[1] for line in marked] == ['data.name', 'data.validation', 'optimizer.decay_every', 'sparsity.density']
    assert marked[-1] == '* sparsity.density = 0.1  (float, in (0, 1]; default 0.05)'


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([CONFIG], '--workdir is missing'),
        ([CONFIG, '--workdir={}', '--mode=trian'], 'Did you mean train?'),
        ([CONFIG, '--workdir={}', '--worksteps=3'], "Unknown command line flag 'worksteps'"),
        ([CONFIG, '--workdir={}', 'density=0.1'], "'density=0.1' is not a flag"),
        ([CONFIG, '--workdir={}', '--config.sparsity.densty=0.1'], 'Did you mean \'sparsity.density\''),
        ([CONFIG, '--workdir={}', '--config.sparsity.density=lots'], 'config.sparsity.density'),
        ([CONFIG, '--workdir={}', '--config.sparsity.density=2'], 'config.sparsity.density=2.0: must be in (0, 1]'),
        ([CONFIG, '--workdir={}', '--config.sparsity.method=sparse_momemtum'], "Did you mean 'sparse_momentum'?"),
        ([CONFIG, '--workdir={}', '--config.model.name=lenet3000'], "Did you mean 'lenet300'"),
        ([CONFIG, '--workdir={}', '--config.sparsity.density=0.000001'], 'fewer than the 3 sparse layers'),
        ([CONFIG, '--workdir={}', '--config.data.batch_size=5000'], 'is more than the 4000 training examples'),
        ([CONFIG, '--workdir={}', '--config.sparsity.granularity=block:16x16'], 'larger than a leaf of shape (100, 10)'),
        ([CONFIG, '--workdir={}', '--config.sparsity.accumulate_steps=5'], "accumulate_steps=5 has no effect with sparsity.method='sparse_momentum', only with rigl, dense"),
        ([CONFIG, '--workdir={}', '--config.sparsity.dense=fc9/*'], "the pattern 'fc9/*' matches no sparse leaf"),
        ([CONFIG, '--workdir={}', '--config.sparsity.grow=gradint'], "Did you mean 'gradient'"),
        (['--config=configs/mnist_lenet300.py', '--workdir={}', '--config.data.dir=nowhere'], "data.dir='nowhere' has no train-images"),
        ([CONFIG, '--workdir={}', '--mode=evaluate'], 'has no checkpoint: train first'),
        ([CONFIG, '--workdir={}', '--config.data.name=cifar11'], "Did you mean 'cifar10' or 'cifar100'"),
        ([CONFIG, '--workdir={}', '--config.model.name=vgg_d'], 'takes images of 32x32 pixels'),
        ([CONFIG, '--workdir={}', '--config.optimizer.name=adma'], "Did you mean 'adamw'"),
        ([CONFIG, '--workdir={}', '--config.optimizer.beta2=0.9'], "no effect with optimizer.name='sgd', only with adamw"),
        ([CONFIG, '--workdir={}', '--config.data.length=64'], "no effect with data.name='mnist_offline', only with text, stdlib"),
        ([CONFIG, '--workdir={}', '--config.sparsity.method=dense', '--config.sparsity.granularity=blok'], 'blok'),
        ([CONFIG, '--workdir={}', '--config.optimizer.learning_rate=inf'], 'must be positive and finite'),
        ([CONFIG, '--workdir={}', '--jobs=2'], '--jobs has no meaning with --mode=train'),
        ([CONFIG, '--workdir={}', '--sweep=seed=0,1'], '--sweep has no meaning with --mode=train'),
        (['--config=configs/cifar10_vgg_d.py', '--workdir={}', '--config.data.dir=nowhere'], "(from https://www.cs.toronto.edu/~kriz/)"),
        (['--config=configs/lm_tiny.py', '--workdir={}', '--config.data.name=text', '--config.data.dir=benchmarks'], "name='stdlib'"),
        (['--config=configs/lm_tiny.py', '--workdir={}', '--config.data.name=text', '--config.data.dir=docs/images',
          '--config.data.pattern=mnist*.png'], 'at least two of them, found 1'),
        (['--config=configs/lm_tiny.py', '--workdir={}', '--config.model.heads=5'], 'model.heads=5 must divide model.features=192'),
    ],
)  # fmt: skip
def test_wrong_input(flags, message, tmp_path):
    workdir = tmp_path / 'run'
    done = launcher.launch(*(f.format(workdir) for f in flags))
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().split('\n')
    assert len(lines) == 1 and lines[0].startswith('error: ') and message in lines[0], done.stderr
    assert not workdir.exists(), 'a file was made'


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('config.sparsity.densty = 0.1', "config.sparsity.densty does not exist. Did you mean 'density'"),
        ('config.densty = 0.1', 'config.densty does not exist.'),
        ('config.sparsity = 0.1', 'config.sparsity=0.1: is a group of settings'),
        ("config.optimizer.nesterov = 'False'", "config.optimizer.nesterov='False': must be true or false"),
        ("config.sparsity.density = '0.1'", "config.sparsity.density='0.1': must be a number"),
        ('config.train.steps = 100.0', 'config.train.steps=100.0: must be a whole number'),
        ('config.train.steps = True', 'config.train.steps=True: must be a whole number'),
        ('config.seed = {}', 'config.seed={}: must be a whole number'),
        ('config.mesh.data = None', 'config.mesh.data=None: must be a whole number'),
        ('config.mesh.data = 0', 'config.mesh.data=0: must be at least 1, or -1'),
        ('config.train.steps = 2**31', 'config.train.steps=2147483648: must be below 2^31'),
        ('config.log.every = 10**400', 'must be below 2^31'),
        ('config.model.name = 3', 'config.model.name=3: must be text'),
    ],
)
def test_wrong_settings_in_a_config_file(line, message, tmp_path):
    text = (ROOT / 'configs' / 'mnist_lenet300.py').read_text()
    (tmp_path / 'own.py').write_text(text.replace('    return config', f'    {line}\n    return config'))
    done = launcher.launch(f'--config={tmp_path / "own.py"}:offline', f'--workdir={tmp_path / "run"}')
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().split('\n')
    assert len(lines) == 1 and lines[0].startswith('error: ') and message in lines[0], done.stderr
    assert not (tmp_path / 'run').exists()


def test_every_number_has_a_range():
    for name, value in config_lib.flatten(config_lib.Config()).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert name in config_lib._RANGES, name


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / 'good.txt').write_text('some text ' * 1000)
    (tmp_path / 'bad.txt').write_bytes(b'some text \xff')
    flags = [
        '--config=configs/lm_tiny.py',
        '--config.data.name=text',
        f'--config.data.dir={tmp_path}',
        f'--workdir={tmp_path / "run"}',
    ]
    done = launcher.launch(*flags)
    assert done.returncode == 2 and f'error: {tmp_path / "bad.txt"} is not UTF-8 at offset 10' in done.stderr
    assert len(done.stderr.strip().split('\n')) == 1 and not (tmp_path / 'run').exists()


def test_a_workdir_that_is_a_file_or_holds_something_else(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.tex').write_text('')
    for name, message in (('file', 'is a file'), ('full', 'holds files but no experiment')):
        command = [sys.executable, 'launch.py', CONFIG, f'--workdir={tmp_path / name}']
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and message in done.stderr
    assert [p.name for p in (tmp_path / 'full').iterdir()] == ['thesis.tex']


def test_the_core_imports_jax_and_optax_only():
    program = (
        'import sys; heavy = {"flax", "orbax", "grain", "matplotlib", "absl.flags", "rich", "ml_collections"}\n'
        'import jax, optax; before = set(sys.modules); import sparse_jax\n'
        'new = {m.split(".")[0] for m in set(sys.modules) - before}; print(sorted(new & heavy), "sparse_jax" in new)'
    )
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == '[] True', done.stdout + done.stderr


@pytest.mark.slow
def test_a_script_elsewhere_trains_a_nested_tuple_to_exact_density(tmp_path):
    """The README's promise to a user of optax, with jax, optax and sparse_jax alone."""
    script = tmp_path / 'mine.py'
    script.write_text(
        'import jax, jax.numpy as jnp, optax\n'
        'import sparse_jax as sj\n'
        'params = ((jnp.ones((30, 20)), jnp.zeros(20)), ((jnp.ones((20, 10)), (jnp.ones((10, 5)),)),))\n'
        'params = jax.tree.map(lambda p, k: jax.random.normal(k, p.shape), params, optax.tree.split_key_like(jax.random.key(0), params))\n'
        'tx = optax.chain(optax.clip_by_global_norm(1.0), '
        'sj.sparsify(optax.adamw(1e-2), density=0.1, update_every=5, total_steps=100))\n'
        'state = tx.init(params)\n'
        'params = sj.apply_masks(params, sj.get_masks(state))\n'
        '@jax.jit\n'
        'def step(params, state, key):\n'
        '    grads = jax.tree.map(lambda p: p - jnp.sin(jnp.arange(p.size, dtype=float).reshape(p.shape)), params)\n'
        '    updates, state = tx.update(grads, state, params)\n'
        '    return optax.apply_updates(params, updates), state\n'
        'for t in range(60):\n'
        '    params, state = step(params, state, t)\n'
        'sj.check_sparse(params, state)\n'
        'print(sum(int(m.sum()) for m in jax.tree.leaves(sj.get_masks(state)) if m.ndim))\n'
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == '85', done.stderr  # round(0.1 * (600 + 200 + 50))


def test_it_starts_anew_once_with_memory_kept_in_the_same_process():
    program = 'import os; from sparse_jax.launch import allocator; allocator.keep_memory(); print(os.getpid(), os.environ["GLIBC_TUNABLES"])'
    environment = {key: value for key, value in os.environ.items() if key != 'GLIBC_TUNABLES'}
    for given, expected in ((None, allocator.MALLOC), ('glibc.malloc.arena_max=2', 'glibc.malloc.arena_max=2')):
        tuned = environment | ({'GLIBC_TUNABLES': given} if given else {})
        process = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, env=tuned, stdout=subprocess.PIPE, text=True)
        out, _ = process.communicate(timeout=60)
        assert out.split() == [str(process.pid), expected]


def test_the_installed_command_finds_the_configs_that_came_with_the_package(tmp_path):
    script = tmp_path / 'sparse-jax'  # as an installer writes it
    script.write_text('import sys\nfrom sparse_jax.launch import run\nsys.exit(run())\n')
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'COLUMNS': '80'}
    command = lambda *flags: subprocess.run(
        [sys.executable, str(script), *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    said = command('--help').stderr
    assert said.startswith('usage: sparse-jax ') and '\n  configs/mnist_lenet5.py :offline\n' in said and 'launch.py' not in said
    wrong = command('--config=configs/mnist_lenet5.py:oflin', '--workdir=x').stderr
    assert "error: --config='configs/mnist_lenet5.py:oflin'" in wrong and 'Give configs/mnist_lenet5.py or' in wrong
    assert 'error: --config is missing' in command('--workdir=new', '--config.seed=1').stderr
    small = [CONFIG, '--config.train.steps=4', '--config.log.every=2', '--config.sparsity.kernels=reference']
    done = command('--mode=sweep', *small, '--workdir=sweep', '--sweep=seed=0:2')
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / 'sweep').glob('seed=*')} == {'seed=0', 'seed=1'}
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'mnist_lenet300.py').write_text(
        "def get_config(variant=''):\n    raise ValueError('the one that is here')\n"
    )
    assert 'the one that is here' in command(*small, '--workdir=run').stderr
