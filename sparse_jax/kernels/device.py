"""The device that kernels are traced for: this process's own, or one that is not here."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from sparse_jax.core import errors, target

PLATFORMS = ('cpu', 'gpu', 'tpu')


class AbsentDevice(NamedTuple):
    """A device that programs are traced for and that is not here."""

    capability: str  # of a GPU
    interpret: bool
    stand_in: Any = None  # what jax's compiler takes for it


_ABSENT: contextvars.ContextVar[AbsentDevice | None] = contextvars.ContextVar('absent_device', default=None)

# Pallas asks which device it lowers for: its kind and its number of multiprocessors or cores.
_DEVICES = {'gpu': ('NVIDIA H100 80GB HBM3', 132), 'tpu': ('TPU v5 lite', 1)}


def _abstract_mesh(platform: str) -> AbstractMesh:
    kind, cores = _DEVICES[platform]
    return AbstractMesh((), (), abstract_device=AbstractDevice(device_kind=kind, num_cores=cores, platform=platform))


@contextlib.contextmanager
def lowering_for(
    platform: str, *, capability: str = '9.0', interpret: bool = False, mesh: Any = None, stand_in: Any = None
) -> Iterator[None]:
    """Traces sparse products for this platform, whatever this process runs on: to lower or export programs for a GPU or a TPU on a
    machine without one.

    Functions that were jitted and traced before keep what they were traced for: jit them inside.

    Args:
      platform: ``'cpu'``, ``'gpu'`` or ``'tpu'``.
      capability: compute capability of the GPU, such as ``'9.0'`` (Hopper).
      interpret: whether Pallas kernels run in their interpreter, so that they can be executed here: slowly, to test them.
      mesh: mesh of the program, where it has one; its devices say what they are.
      stand_in: the device that the program will be compiled for, as of ``jax.experimental.topologies``: nothing can be computed within
        the context then, only traced. Without it, attention takes no kernel of tokamax's.

    Yields:
      Nothing. Within the context, products without a named implementation take the reference, since densities were measured for devices
      that are here.

    Raises:
      ValueError: for another platform.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from sparse_jax import kernels
      >>> mask = np.kron(np.eye(2, dtype=bool), np.ones((64, 64), bool))
      >>> pattern = kernels.make_pattern(mask, granularity='block:64x64')
      >>> x, w = jnp.ones((64, 128), jnp.bfloat16), jnp.ones((128, 128), jnp.bfloat16)
      >>> with kernels.lowering_for('gpu'):
      ...     step = jax.jit(lambda x, w: kernels.sparse_dot(x, w, pattern, implementation='gpu'))
      ...     text = step.trace(x, w).lower(lowering_platforms=('cuda',)).as_text()
      >>> 'mosaic_gpu' in text
      True
    """
    if platform not in PLATFORMS:
        raise errors.unknown('platform', platform, PLATFORMS)
    tokens = target.PLATFORM.set(platform), _ABSENT.set(AbsentDevice(capability, interpret, stand_in))
    described = interpret or mesh is not None or platform == 'cpu'
    try:
        with contextlib.ExitStack() as stack:
            if not described:
                stack.enter_context(use_abstract_mesh(_abstract_mesh(platform)))
            if stand_in is not None:  # libraries ask for the default device
                stack.enter_context(jax.default_device(stand_in))
            yield
    finally:
        target.PLATFORM.reset(tokens[0])
        _ABSENT.reset(tokens[1])


def is_absent() -> bool:
    """Whether programs are traced for a device that is not here."""
    return _ABSENT.get() is not None


def interpret() -> bool:
    """Whether Pallas kernels run in their interpreter."""
    absent = _ABSENT.get()
    return absent is not None and absent.interpret


def stand_in() -> Any:
    """What jax's compiler takes for a device that is not here; None: nothing, or the device is here."""
    absent = _ABSENT.get()
    return absent.stand_in if absent else None


def capability() -> str:
    """Compute capability of the GPU, such as '9.0' (Hopper), or what another maker calls it."""
    absent = _ABSENT.get()
    return absent.capability if absent else str(getattr(jax.devices()[0], 'compute_capability', 'unknown'))
