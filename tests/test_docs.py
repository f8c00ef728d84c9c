"""README tells the truth: its code runs, its commands exist, and what it counts is so."""

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
README = '\n'.join((ROOT / name).read_text() for name in DOCS)


def _blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('code', _blocks('python'))
def test_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {'__name__': 'readme'}
    exec(compile(code, 'README.md', 'exec'), names)
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


def test_the_core_is_as_long_as_it_says():
    lines = sum(len(p.read_text().splitlines()) for p in (ROOT / 'sparse_jax').glob('*.py') if p.name != 'config.py')
    told = int(re.search(r'core is ([\d,]+) lines', README).group(1).replace(',', ''))
    assert abs(lines - told) <= 0.05 * told, f'README says {told} lines, there are {lines}'
