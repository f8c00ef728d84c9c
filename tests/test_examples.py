"""The examples, each run as a user would."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'examples').glob('*.py')))
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
