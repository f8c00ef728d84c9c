"""The C++ compiler and the cache of what it made, with real processes."""

import os
import pathlib
import subprocess
import sys

import pytest

from sparse_jax.kernels.cpu import operations as cpu

needs_compiler = pytest.mark.skipif(bool(cpu.unavailable()), reason='needs a C++ compiler: install g++ or clang++')
ROOT = pathlib.Path(__file__).parents[2]
QUICK = {'SPARSE_JAX_CXXFLAGS': '-O0'}  # the kernels compile in a fifth of the time, and are as right


def _process(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment,
    )  # fmt: skip


@needs_compiler
@pytest.mark.slow
def test_two_processes_build_the_cache_at_once_and_threads_change_no_bit(tmp_path):
    both = [
        _process('-m', 'tests.kernels.kernel_cases', SPARSE_JAX_CACHE=str(tmp_path), NPROC=n, SPARSE_JAX_CXXFLAGS='-O1')
        for n in '15'
    ]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and len(outputs[0][0]) == 65
    assert len(list(tmp_path.glob('*.so'))) == 1 and not list(tmp_path.glob('*.partial'))


_ONE = """
import numpy as np, jax.numpy as jnp, sys
from sparse_jax import kernels
from sparse_jax.kernels.cpu import operations as cpu
w = jnp.eye(4)
print(kernels.sparse_dot(2 * w, w, kernels.make_pattern(np.eye(4, dtype=bool), implementation='cpu'))[3, 3], cpu.unavailable())
try:
    kernels.sparse_dot(w, w, kernels.make_pattern(np.eye(4, dtype=bool)), implementation='cpu')
except NotImplementedError as error:
    print(error)
"""


def _script(path: pathlib.Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@needs_compiler
@pytest.mark.slow
def test_a_damaged_library_is_built_again(tmp_path):
    own = dict(SPARSE_JAX_CACHE=str(tmp_path), **QUICK)
    first = _process('-c', _ONE, **own)
    assert first.communicate(timeout=300)[0].split() == ['2.0']
    (path,) = tmp_path.glob('*.so')
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    output, problems = _process('-c', _ONE, **own).communicate(timeout=300)
    assert output.split() == ['2.0'], problems
    assert len(path.read_bytes()) == len(whole)


@pytest.mark.parametrize('what', ['none', 'fails', 'missing'])
def test_without_a_working_compiler_the_reference_runs_and_one_line_says_why(tmp_path, what):
    if what == 'none':
        environment, reason = {'PATH': str(tmp_path)}, 'there is no C++ compiler'
    elif what == 'fails':
        text = '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho "In file x"; echo "x.cc:1: error: bad flag" >&2; exit 1\n'
        environment, reason = (
            {'CXX': _script(tmp_path / 'cxx', text)},
            'the compiler failed: x.cc:1: error: bad flag; the command was:',
        )
    else:
        environment, reason = {'CXX': str(tmp_path / 'nowhere')}, 'the compiler does not start'
    output, problems = _process('-c', _ONE, SPARSE_JAX_CACHE=str(tmp_path / 'cache'), **environment).communicate(timeout=300)
    assert output.startswith('2.0') and reason in output, problems
    assert "implementation='cpu' does not run here" in output
    assert problems.count('no CPU kernels, the reference runs instead') == 1 and reason in problems


@needs_compiler
@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_a_compilation_only(tmp_path):
    """A folder that cannot be made; a read-only one would not stop the superuser, who runs tests too."""
    (tmp_path / 'file').write_text('')
    output, problems = _process('-c', _ONE, SPARSE_JAX_CACHE=str(tmp_path / 'file' / 'cache'), **QUICK).communicate(timeout=300)
    assert output.split() == ['2.0'] and problems.count('they are compiled for this process alone') == 1
