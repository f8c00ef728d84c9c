"""The examples, each run as a user would."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.launcher import check_flags

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted({path.name for path in (ROOT / 'examples').glob('*.py')} - {'convolution.py'}))
def test_example_learns_and_stays_sparse(name):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
        [sys.executable, str(ROOT / 'examples' / name)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert 'Warning' not in done.stderr, done.stderr
    accuracies = re.findall(r'test accuracy ([\d.]+)%', done.stdout)
    assert accuracies and float(accuracies[-1]) > 88
    assert re.search(r'^all +\d+ +\d+ +(5\.00|10\.00)%', done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_the_ways_of_a_convolution_agree_and_are_drawn(tmp_path):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, str(ROOT / 'examples' / 'convolution.py'), str(tmp_path / 'convolution.png')]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'Warning' not in done.stderr, done.stderr
    assert len(re.findall(r'differs from XLA by \d.\de-\d\d|differs from XLA by 0.0e\+00', done.stdout)) == 4
    assert (tmp_path / 'convolution.png').stat().st_size > 10_000


def test_scripts_for_many_hosts_are_whole():
    """They parse, and launch.py takes their flags; two_hosts.sh runs as a whole in .ci/run."""
    commands = []
    for name in ('two_hosts.sh', 'slurm.sbatch', 'jobset.yaml', 'xpk.sh', 'tpu_pod.sh'):
        path = ROOT / 'examples' / name
        if path.suffix != '.yaml':
            subprocess.run(['bash', '-n', str(path)], check=True)
            assert os.access(path, os.X_OK) or path.suffix == '.sbatch'
        flags = re.findall(r'--(?:distributed|config[.\w]*=[\w./:+-]+)', path.read_text())
        assert '--distributed' in flags and any(flag.startswith('--config=') for flag in flags), name
        commands.append([*flags, '--workdir=somewhere'])
    check_flags(commands)
