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
import stat
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
    if folder := os.environ.get('SPARSE_JAX_CACHE'):
        return pathlib.Path(folder)
    base = os.environ.get('XDG_CACHE_HOME')
    try:
        return (pathlib.Path(base) if base else pathlib.Path.home() / '.cache') / 'sparse_jax'
    except RuntimeError:  # a user without a home, as in containers
        return pathlib.Path(tempfile.gettempdir()) / f'sparse_jax-{os.getuid()}'


def is_trusted(path: pathlib.Path) -> bool:
    """Whether this user (or root) owns a file and the folder it is in, and nobody else may write to them: what others could have put there is
    neither loaded nor believed."""
    try:
        found = [path.stat(), path.parent.stat()]
    except OSError:
        return False
    return all(status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) for status in found)


def make_cache_folder() -> pathlib.Path:
    """The cache's folder, for this user alone; OSError where it cannot be made, or is another user's."""
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise PermissionError('it belongs to another user; name a folder of your own in SPARSE_JAX_CACHE')
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):  # made by an older version, or under another umask
        folder.chmod(0o700)
    return folder


@functools.cache
def processor() -> str:
    """What this processor is and can do, as one line."""
    fields = {'model name', 'flags', 'Features', 'CPU part'}
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines()
    except OSError:
        lines = []
    return ' '.join([platform.machine(), *(line for line in lines if line.split(':')[0].strip() in fields)])


def _compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of the usual ones on the PATH."""
    if command := os.environ.get('CXX'):
        return shlex.split(command)
    for name in ('c++', 'g++', 'clang++'):
        if path := shutil.which(name):
            return [path]
    raise CompilerError('there is no C++ compiler: neither c++ nor g++ nor clang++ is on the PATH, and CXX is not set')


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {'LC_ALL': 'C'})
    except OSError as error:
        raise CompilerError(f'the compiler does not start: {error}; the command was: {shlex.join(command)}') from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f'exit status {done.returncode}']
        first = next((line for line in lines if 'error' in line.lower()), lines[0])
        raise CompilerError(f'the compiler failed: {first.strip()}; the command was: {shlex.join(command)}')
    return done.stdout


def _flags() -> tuple[str, ...]:
    return *_FLAGS, *shlex.split(os.environ.get('SPARSE_JAX_CXXFLAGS', ''))


@functools.cache
def key() -> str:
    """Everything that a library depends on, as a digest; CompilerError where there is no compiler."""
    digest = hashlib.sha256()
    try:
        for path in sorted(path for path in _SOURCES.iterdir() if path.suffix in ('.h', '.cc')):
            digest.update(path.name.encode() + path.read_bytes())
    except OSError as error:
        raise CompilerError(f'the sources cannot be read: {error}') from error
    for part in (*_flags(), _run([*_compiler(), '--version']), processor(), jax.__version__, importlib.metadata.version('jaxlib')):
        digest.update(part.encode() + b'\0')
    return digest.hexdigest()[:24]


def _intact(path: pathlib.Path) -> bool:
    """Whether a file ends in the digest of what stands before it. To load a truncated library could kill the process."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) > 32 and hashlib.sha256(data[:-32]).digest() == data[-32:]


def _compile(path: pathlib.Path) -> None:
    _run([*_compiler(), *_flags(), '-isystem', jax.ffi.include_dir(), str(_SOURCES / 'kernels.cc'), '-o', str(path)])
    digest = hashlib.sha256(path.read_bytes()).digest()
    with open(path, 'ab') as file:  # the loader ignores what follows the last section
        file.write(digest)


def _keep(library: pathlib.Path, path: pathlib.Path) -> None:
    """Copies a library into the cache: beside its place, then renamed."""
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix='.so.partial')
    os.close(handle)
    try:
        shutil.copyfile(library, partial)
        os.replace(partial, path)
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, compiled if need be. Raises: CompilerError with the reason where it cannot be had."""
    folder = cache_folder()
    path = folder / f'kernels-{key()}.so'
    try:
        if is_trusted(path) and _intact(path):
            return ctypes.CDLL(str(path))
        _logger.info('sparse_jax: compiling the CPU kernels, once (some seconds).')
        with tempfile.TemporaryDirectory() as temporary:
            fresh = pathlib.Path(temporary) / path.name
            _compile(fresh)
            try:
                make_cache_folder()
                _keep(fresh, path)
            except OSError as error:  # read-only or full
                message = 'sparse_jax: %s cannot keep the compiled CPU kernels (%s); they are compiled for this process alone.'
                _logger.warning(message, folder, error)
            return ctypes.CDLL(str(fresh))
    except OSError as error:
        raise CompilerError(f'the compiled library cannot be written or loaded: {error}') from error
