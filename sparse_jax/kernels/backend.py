"""The backends, and which of them runs a product."""

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax

from sparse_jax.core import errors, target
from sparse_jax.kernels import gpu, sharded, tpu
from sparse_jax.kernels.cpu import operations as cpu
from sparse_jax.kernels.pattern import Pattern

_LOG = logging.getLogger('sparse_jax')


def _on_cpu(dtype, block: tuple[int, int]) -> str:
    del block
    platform = target.platform()
    return f'it runs on CPU, not on {platform}' if platform != 'cpu' else cpu.unsupported(dtype, dtype) or cpu.unavailable()


class _Backend(NamedTuple):
    module: str  # with forward, input_gradient and weight_gradient; imported when one runs
    unsupported: Callable[..., str]  # (dtype, block): why it does not run a layer, where programs are traced for
    pallas: bool = False


_BACKENDS = {
    'reference': _Backend('reference', lambda dtype, block: ''),
    'cpu': _Backend('cpu.operations', _on_cpu),
    'gpu': _Backend('gpu.operations', gpu.unsupported, pallas=True),
    'tpu': _Backend('tpu.operations', tpu.unsupported, pallas=True),
}
IMPLEMENTATIONS = tuple(_BACKENDS)


def unsupported(implementation: str, dtype, block: tuple[int, int]) -> str:
    """Why an implementation cannot run a layer where programs are traced for, and what would work; empty where it can.

    Args:
      implementation: one of IMPLEMENTATIONS.
      dtype: of x and w.
      block: of the pattern; (1, 1): single weights.

    Returns:
      The reason, or ''.

    Raises:
      ValueError: if there is no such implementation.

    Example:
      >>> unsupported('gpu', 'bfloat16', (64, 64))
      'it runs on an NVIDIA GPU, not on cpu'
    """
    if implementation not in _BACKENDS:
        raise errors.unknown('implementation', implementation, IMPLEMENTATIONS)
    return _BACKENDS[implementation].unsupported(dtype, block)


def choose(implementation: str | None, dtype, pattern: Pattern, *, empty: bool) -> str:
    """The backend that runs; NotImplementedError where one named here cannot, ValueError where there is none of that name.

    A pattern may name one too, or have one by rule; where that cannot run, the reference does, and says so once. Of empty operands and
    results the reference makes zeros, whoever is named.
    """
    wanted = implementation or pattern.implementation or pattern.by_rule
    if empty and wanted in _BACKENDS:
        return 'reference'
    reason = unsupported(wanted, dtype, pattern.block)
    if not reason:
        return wanted
    if implementation:
        raise NotImplementedError(
            f"implementation={wanted!r} does not run here: {reason}. Take implementation=None or 'reference'."
        )
    if wanted != pattern.by_rule or target.platform() != 'cpu':
        _say_once(wanted, pattern.name, reason)
    return 'reference'


@functools.cache
def _say_once(wanted: str, name: str, reason: str) -> None:
    _LOG.warning("sparse_jax: the reference multiplies%s instead of '%s': %s.", f' {name}' if name else '', wanted, reason)


def call(name: str, implementation: str, *operands) -> jax.Array:
    """A backend's function of this name. Pallas kernels count in int32, whatever integers jax has by default."""
    backend = _BACKENDS[implementation]
    function = getattr(importlib.import_module(f'sparse_jax.kernels.{backend.module}'), name)
    with jax.enable_x64(False) if backend.pallas else contextlib.nullcontext():
        return function(*operands)


def run(name: str, implementation: str, pattern: Pattern, *operands) -> jax.Array:
    """A backend's product, on a mesh by its parts."""
    function = functools.partial(call, name, implementation)
    return function(*operands) if pattern.split is None else getattr(sharded, name)(function, *operands)
