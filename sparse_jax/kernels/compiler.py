"""Compiles the C++ kernels with the system's compiler when they are first used, and keeps the library on disk.

A library in the cache is named by everything it depends on and ends in the digest of its own bytes: whoever comes first puts it
there whole (a rename), whoever finds it damaged makes it again. So several processes may start at once, and none needs a lock.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile

import jax

_SOURCES = pathlib.Path(__file__).parent / 'cpp'
_FLAGS = ('-std=c++17', '-O3', '-march=native', '-fno-math-errno', '-fPIC', '-shared')
_logger = logging.getLogger('sparse_jax')


class CompilerError(RuntimeError):
    """There is no library, and why."""


def cache_folder() -> pathlib.Path:
    """Where libraries and measured choices are kept: $SPARSE_JAX_CACHE, or sparse_jax in the user's cache folder."""
    if own := os.environ.get('SPARSE_JAX_CACHE'):
        return pathlib.Path(own)
    base = os.environ.get('XDG_CACHE_HOME')
    return (pathlib.Path(base) if base else pathlib.Path.home() / '.cache') / 'sparse_jax'


@functools.cache
def processor() -> str:
    """What this processor is and can do, as one line."""
    wanted = {'model name', 'flags', 'Features', 'CPU part'}
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines()
    except OSError:
        lines = []
    return ' '.join([platform.machine(), *(line for line in lines if line.split(':')[0].strip() in wanted)])


def _compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of the usual ones on the PATH."""
    if own := os.environ.get('CXX'):
        return shlex.split(own)
    for name in ('c++', 'g++', 'clang++'):
        if path := shutil.which(name):
            return [path]
    raise CompilerError('there is no C++ compiler: neither c++ nor g++ nor clang++ is on the PATH, and CXX is not set')


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompilerError(f'the compiler does not start: {error}; the command was: {shlex.join(command)}') from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f'exit status {done.returncode}']
        first = next((line for line in lines if 'error' in line.lower()), lines[0])
        raise CompilerError(f'the compiler failed: {first.strip()}; the command was: {shlex.join(command)}')
    return done.stdout


def _key(compiler: list[str], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    for part in (*flags, _run([*compiler, '--version']), processor(), jax.__version__, importlib.metadata.version('jaxlib')):
        digest.update(part.encode() + b'\0')
    return digest.hexdigest()[:24]


def _intact(path: pathlib.Path) -> bool:
    """Whether a file ends in the digest of what stands before it. To load a truncated library could kill the process."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) > 32 and hashlib.sha256(data[:-32]).digest() == data[-32:]


def _compile(compiler: list[str], flags: tuple[str, ...], path: pathlib.Path) -> None:
    """Compiles into a file beside its place, then renames it."""
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix='.so.partial')
    os.close(handle)
    try:
        _run([*compiler, *flags, '-isystem', jax.ffi.include_dir(), str(_SOURCES / 'kernels.cc'), '-o', partial])
        data = pathlib.Path(partial).read_bytes()
        with open(partial, 'ab') as file:  # the loader ignores what follows the last section
            file.write(hashlib.sha256(data).digest())
        os.replace(partial, path)
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, compiled if need be. Raises: CompilerError with the reason where it cannot be had."""
    compiler = _compiler()
    flags = (*_FLAGS, *shlex.split(os.environ.get('SPARSE_JAX_CXXFLAGS', '')))
    name = f'kernels-{_key(compiler, flags)}.so'
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        if not _intact(path):
            _logger.info('sparse_jax: compiling the CPU kernels, once (some seconds).')
            _compile(compiler, flags, path)
    except OSError as error:  # read-only or full: a library for this process alone
        _logger.warning(
            'sparse_jax: %s cannot keep the compiled CPU kernels (%s); they are compiled for this process alone.', folder, error
        )
        try:
            with tempfile.TemporaryDirectory() as temporary:
                path = pathlib.Path(temporary) / name
                _compile(compiler, flags, path)
                return ctypes.CDLL(str(path))
        except OSError as again:
            raise CompilerError(f'neither {folder} nor {tempfile.gettempdir()} takes the compiled library: {again}') from again
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(f'the compiled library does not load: {error}') from error
