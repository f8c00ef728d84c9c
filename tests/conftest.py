"""What all tests share: eight virtual CPU devices, parsed flags (grain asks absl for some), and caches of kernels and programs."""

import gc
import os
import pathlib
import shutil
import signal
import tempfile

import jax
import pytest
from absl import flags
from hypothesis import settings

jax.config.update('jax_num_cpu_devices', 8)
settings.register_profile('default', deadline=None, derandomize=True, print_blob=True)
settings.load_profile('default')

# They need a compiler for a GPU or a TPU, or a long time in an interpreter: make test-gpu-aot and make test-tpu-aot collect them.
_FOR_DEVICES = ['aot/test_gpu.py', 'aot/test_tpu.py', 'kernels/test_gpu_kernels.py', 'kernels/test_tpu_kernels.py']
collect_ignore = [] if os.environ.get('AOT') else _FOR_DEVICES

_CACHES = 'SPARSE_JAX_TEST_CACHES'


class _Maps:
    """Drops the compiled programs of a worker that has many.

    Each takes several of the 65,530 memory maps that Linux allows a process by default; XLA crashes where there is none left.
    """

    _MOST, _EVERY = 20_000, 10  # maps, tests

    def __init__(self):
        self._path, self._tests = pathlib.Path('/proc/self/maps'), 0

    def pytest_runtest_teardown(self):
        self._tests += 1
        if self._tests % self._EVERY == 0 and self._path.exists() and self._path.read_bytes().count(b'\n') > self._MOST:
            jax.clear_caches()
            gc.collect()


def pytest_configure(config):
    """Gives this run caches of its own: for the C++ kernels and measurements, and for the programs that XLA compiles.

    They begin empty, so that a run depends on nothing that one before it left; all workers and the processes they start share them, as the
    same small programs are compiled over and over. (The environment is for those processes: this one has imported jax already.)
    """
    config.pluginmanager.register(_Maps())
    if _CACHES not in os.environ:
        folder = tempfile.mkdtemp(prefix='sparse_jax_tests_')
        os.environ[_CACHES] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    folder = os.environ[_CACHES]
    os.environ.setdefault('SPARSE_JAX_CACHE', f'{folder}/kernels')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{folder}/programs'
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    jax.config.update('jax_compilation_cache_dir', f'{folder}/programs')
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


@pytest.fixture(scope='session', autouse=True)
def _parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(['tests'])


@pytest.fixture
def interruptible():
    """Tests may run in the background, where a shell has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
