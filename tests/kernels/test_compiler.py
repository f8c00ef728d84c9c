"""The C++ compiler and the cache of what it made, with real processes."""

import os
import pathlib
import subprocess
import sys

import pytest

import sparse_jax as sj
from sparse_jax.kernels import store
from sparse_jax.kernels.cpu import compiler
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
import sparse_jax as sj
from sparse_jax.kernels import store
from sparse_jax.kernels.cpu import compiler
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


_PLANTED = """
import pathlib, sys
from sparse_jax.kernels import store
from sparse_jax.kernels.cpu import compiler
folder = pathlib.Path(sys.argv[1])
source = folder.parent / 'planted.c'
source.write_text('#include <stdio.h>\\n__attribute__((constructor)) void run(void) { fclose(fopen("%s", "w")); }' % sys.argv[2])
library = folder / f'kernels-{compiler.key()}.so'
compiler._run([*compiler._compiler(), '-x', 'c', '-shared', '-fPIC', str(source), '-o', str(library)])
library.write_bytes(library.read_bytes() + compiler.hashlib.sha256(library.read_bytes()).digest())
(folder / 'measured.json').write_text('{"planted": 1}')
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize('how', ['another user', 'writable file'])
def test_planted_code_is_not_loaded(tmp_path, how):
    """A user without a home: the folder in the temporary directory has a name that anybody can know, and make first."""
    if how == 'another user' and os.getuid() != 0:
        pytest.skip('only the superuser can give a folder to another user: run make test-slow as root, as in a container')
    folder, ran = tmp_path / 'cache', tmp_path / 'it_ran'
    folder.mkdir()
    own = dict(SPARSE_JAX_CACHE=str(folder), **QUICK)
    planting = _process('-c', _PLANTED, str(folder), str(ran), **own)
    assert planting.communicate(timeout=300) is not None and planting.returncode == 0
    (library,) = folder.glob('*.so')
    if how == 'another user':
        for path in (library, folder / 'measured.json', folder):
            os.chown(path, 65534, 65534)
    else:
        library.chmod(0o666)
    output, problems = _process('-c', _ONE, **own).communicate(timeout=300)
    assert output.split() == ['2.0'] and not ran.exists(), problems
    assert ('it belongs to another user' in problems) == (how == 'another user')
    read = _process('-c', "from sparse_jax.kernels import store; print(store.read('measured.json'))", **own).communicate(
        timeout=300
    )
    assert read[0].strip() == ('{}' if how == 'another user' else "{'planted': 1}"), read


def test_the_cache_is_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv('SPARSE_JAX_CACHE', str(tmp_path / 'a' / 'cache'))
    assert compiler.make_cache_folder().stat().st_mode & 0o777 == 0o700
    compiler.cache_folder().chmod(0o777)
    store.write('numbers.json', {'a': 1.0})
    assert compiler.cache_folder().stat().st_mode & 0o022 == 0 and store.read('numbers.json') == {'a': 1.0}
    (compiler.cache_folder() / 'numbers.json').chmod(0o666)
    assert store.read('numbers.json') == {}


@pytest.mark.parametrize('density', ['0.2', -1.0, 7.0, None, [0.2]])
def test_a_stored_crossover_is_a_density_or_nothing(tmp_path, monkeypatch, density):
    monkeypatch.setenv('SPARSE_JAX_CACHE', str(tmp_path))
    block = sj.granularity.Block(64, 64)
    store.write('crossovers.json', {'H100': {'64x64': density}, 'A100': 3})
    assert store.crossover('H100', block) is None and store.crossover('A100', block) is None
    store.write_crossover('A100', block, 0.2)
    assert store.crossover('A100', block) == 0.2
