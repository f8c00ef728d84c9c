"""The documentation is true: its code runs, and its commands, links and files exist."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import sparse_jax as sj
from sparse_jax import models as sj_models
from tests.launcher import check_flags

ROOT = pathlib.Path(__file__).parent.parent
DOCS = (
    'README.md',
    'docs/speed.md',
    'docs/experiments.md',
    'docs/kernels.md',
    'docs/training_step.md',
    'docs/distributed.md',
    'docs/gpu.md',
    'docs/gpu_predicted.md',
    'docs/optimizers.md',
    'docs/own_networks.md',
    'docs/memory.md',
    'docs/structures.md',
)
TEXT = '\n'.join((ROOT / name).read_text() for name in DOCS)


def _blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


OWN = (ROOT / 'docs/own_networks.md').read_text()


def test_the_code_on_networks_of_ones_own_runs(tmp_path, monkeypatch, capsys):
    """One page, from top to bottom; what it puts into files is imported, but for wandb's, which is another service's."""
    monkeypatch.chdir(tmp_path)
    names: dict = {'__name__': 'docs'}
    files = {}
    for code in _blocks('python', OWN):
        if file := re.match(r'# (\w+\.py)', code):
            files[file[1]] = code
        else:
            exec(compile(code.replace('/tmp/', f'{tmp_path}/'), 'docs', 'exec'), names)
    assert files.keys() == {'nets.py', 'logs.py'} and (tmp_path / 'cnn.npz').exists()
    printed = capsys.readouterr().out
    assert "'out/kernel'" in printed and '(10, 64)' in printed and '(1, 10)' in printed
    (tmp_path / 'nets.py').write_text(files['nets.py'])
    made = sj_models.create('nets:MyNet', input_shape=(32, 32, 3), num_outputs=5, width=8)
    assert made.apply(*made.init(jax.random.key(0)), jax.numpy.ones((2, 32, 32, 3)), train=False)[0].shape == (2, 5)
    compile(files['logs.py'], 'logs.py', 'exec')


MEMORY = (ROOT / 'docs/memory.md').read_text()


def test_the_code_on_memory_runs():
    names: dict = {'__name__': 'docs'}
    for code in _blocks('python', MEMORY):
        exec(compile(code, 'docs', 'exec'), names)
    assert names['values']['w'].shape == (round(0.05 * 512 * 512),) and names['y'].shape == (8, 512)


STRUCTURES = (ROOT / 'docs/structures.md').read_text()


def test_the_code_on_structures_runs(capsys):
    names: dict = {'__name__': 'docs'}
    for code in _blocks('python', STRUCTURES):
        exec(compile(code, 'docs', 'exec'), names)
    assert "{'conv': 2304, 'fc': 2560}" in capsys.readouterr().out
    assert {int(n) for n in names['masks']['fc'].reshape(128, 4, 10).sum(1).ravel()} == {1}
    layout = {'qkv': {'kernel': jax.numpy.ones((8, 2, 4))}, 'out': jax.numpy.ones((4, 4))}
    for name in ('of_flax', 'of_torch', 'of_mine'):
        assert sj.stats.density(names[name].init(layout)) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize('code', _blocks('python', TEXT.replace(OWN, '').replace(MEMORY, '').replace(STRUCTURES, '')))
def test_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {'__name__': 'docs'}
    exec(compile(code, 'docs', 'exec'), names)
    params, opt_state = names['params'], names['opt_state']
    for _ in range(101):  # past a mask update
        params, opt_state = names['step'](params, opt_state)
    sj.check_sparse(params, opt_state)
    masks = [m for m in jax.tree.leaves(sj.get_masks(opt_state)) if m.ndim]
    assert sum(int(m.sum()) for m in masks) == round(0.05 * sum(m.size for m in masks)), 'the example is not exactly sparse'


def _commands() -> list[str]:
    text = '\n'.join(_blocks('sh')).replace('\\\n', ' ')
    return [re.sub(r'\s+#.*', '', line).strip() for line in text.split('\n') if line.strip() and not line.startswith('#')]


def test_commands_exist():
    targets = re.findall(r'^(\w[\w-]*):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    commands = [command.split() for command in _commands()]
    for words in commands:
        if words[0] == 'make':
            assert [w for w in words[1:] if '=' not in w] and all(w in targets for w in words[1:] if '=' not in w), words
        elif words[0].startswith('examples/'):
            assert os.access(ROOT / words[0], os.X_OK), words
        else:
            known = words[0] in ('git', 'cd', 'pip') or words[:2] in (['python', 'launch.py'], ['python', '-m'])
            assert known, f'{words}: not a command that this test knows'
    launched = [words[2:] for words in commands if words[:2] == ['python', 'launch.py']]
    for flags in launched:
        if not any(flag.startswith(('--config=', '--mode=report')) for flag in flags):
            flags.insert(0, '--config=configs/mnist_lenet300.py:offline')  # as if the run were there
    check_flags(launched)


_HELP = """
import contextlib, io, json, runpy, sys
for module, *flags in json.loads(sys.stdin.read()):
    sys.argv, text = [module, *flags, '--help'], io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_module(module, run_name='__main__', alter_sys=True)
        except SystemExit as end:
            assert not end.code, (module, end.code)
    assert 'usage' in text.getvalue(), module
"""


def test_modules_explain_themselves():
    commands = [words[2:] for words in map(str.split, _commands()) if words[:2] == ['python', '-m']]
    assert len(commands) > 10
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'GLIBC_TUNABLES': ''}  # set: or the process would start itself anew
    command = [sys.executable, '-c', _HELP]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(commands), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    for name in DOCS:
        for target in re.findall(r'\]\((?!https?:)([^)#]+)\)', (ROOT / name).read_text()):
            assert ((ROOT / name).parent / target).exists(), f'{target} in {name}'


def test_rooms_and_modules_exist():
    for path in re.findall(r'(?:sparse_jax|benchmarks|configs|examples|tests)/(?:[\w/]*\w\.(?:py|cc|h)\b|[\w/]+/(?=`))', TEXT):
        assert (ROOT / path).exists(), path
    for module in re.findall(r'\bbenchmarks(?:\.\w+)+', TEXT):
        path = ROOT / module.replace('.', '/')
        assert path.with_suffix('.py').exists() or (path / '__main__.py').exists(), module
    order = re.search(r'read the files of `(sparse_jax/core/)` in this order:\n\n(.*?)\n\n', TEXT, re.DOTALL)
    assert order
    for name in re.findall(r'`(\w+\.py)`', order[2]):
        assert (ROOT / order[1] / name).exists(), name
