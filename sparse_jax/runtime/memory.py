"""The memory of a process on CPU: what compiling and starting leave behind is given back."""

import ctypes
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from sparse_jax import config as config_lib
from sparse_jax.runtime import failures

# XLA emits a fused loop through a context of MLIR of its own, which takes some 300 MB for the thousands of loops of a mask update; by the
# older emitters it takes a tenth, and a third more time. For programs that run seldom; releases of jax that have one kind of emitter do
# not know the option. (Random bits are no such program: by the older emitters they take three times as long to compile.)
_FRUGAL = {'xla_cpu_use_fusion_emitters': False}

_SECONDS = 2.0  # at least between two releases, but for those of a new program: small networks change programs many times a second
_FIRST = 4  # steps after a new program until the buffers have found their places in the heap


@functools.cache
def frugal_compiler_options() -> dict[str, bool] | None:
    """Options of ``jax.jit`` by which compiling takes less memory, for programs that run seldom; None where there are none.

    What they change is the last bits of a program's results, as any release of XLA may; on one backend all runs have the same.
    """
    if jax.default_backend() != 'cpu':
        return None
    try:
        jax.jit(lambda: 0, compiler_options=_FRUGAL).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return _FRUGAL


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform.startswith('linux') else None


def exhausted(config: config_lib.Config, error: Exception) -> str:
    """What to say where a device has no memory left: how much was wanted, and which settings take less."""
    batch, parts = config.data.batch_size, config.train.accumulate
    less = [f'config.data.batch_size={max(1, batch // 2)} instead of {batch}'] if batch > 1 else []
    if batch % (2 * parts) == 0:
        less.append(f'config.train.accumulate={2 * parts} (the same batch, in parts)')
    if config.model.name == 'transformer' and config.model.remat != 'all':
        less.append("config.model.remat='all' (activations are computed again)")
    device = jax.devices()[0].device_kind
    return f'the device ({device}) has no memory left ({failures.reason(error)[:160]}). Less is taken by {", or ".join(less or ["a smaller model"])}.'


def release() -> None:
    """Gives memory that is free, and that malloc keeps for the next step, back to the system: what was needed once will not be again.

    It takes some milliseconds, and the next step some more, in which pages are cleared.
    """
    if jax.default_backend() == 'cpu' and (trim := _trim()) is not None:
        trim(0)


class Settling:
    """Releases memory while a run's programs come to be: before each one is compiled, after its first step, and until the buffers have
    found their places again; later where another program takes over, whose buffers do not fit into the holes of the one before."""

    def __init__(self):
        release()  # what the start has left
        self._seen: set[Any] = set()
        self._left, self._last, self._next = 0, (), time.monotonic()

    def before(self, *program: Any) -> None:
        """The program that these names stand for will be called."""
        if program not in self._seen or (program != self._last and time.monotonic() >= self._next):
            self._release()
        self._last = program

    def after(self, *program: Any) -> None:
        """It has run, or is on its way."""
        if program not in self._seen:
            self._seen.add(program)
            self._left = _FIRST
        if self._left:
            self._left -= 1
            self._release()

    def _release(self) -> None:
        release()
        self._next = time.monotonic() + _SECONDS
