"""The documentation is true: its code runs, and its commands, links and files exist."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from absl import flags

import sparse_jax as sj

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
)
TEXT = '\n'.join((ROOT / name).read_text() for name in DOCS)


def _blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('code', _blocks('python'))
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


@pytest.mark.parametrize('command', _commands())
def test_commands_exist(command):
    words = command.split()
    if words[0] == 'make':
        targets = re.findall(r'^(\w[\w-]*):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        assert [w for w in words[1:] if '=' not in w] and all(w in targets for w in words[1:] if '=' not in w), command
    elif words[:2] == ['python', 'launch.py']:
        import launch  # noqa: F401  (defines the flags)

        program = 'import sys; sys.argv[0] = "launch.py"; import launch; launch._parse(sys.argv)'
        done = subprocess.run([sys.executable, '-c', program, *words[2:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f'{command}\n{done.stderr}'
    elif words[:2] == ['python', '-m']:
        done = subprocess.run([sys.executable, *words[1:], '--help'], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and 'usage' in done.stdout, command
    elif words[0].startswith('examples/'):
        assert os.access(ROOT / words[0], os.X_OK), command
    else:
        assert words[0] in ('git', 'cd', 'pip'), f'{command}: not a command that this test knows'
    assert flags.FLAGS.is_parsed()


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
