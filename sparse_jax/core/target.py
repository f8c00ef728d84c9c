"""For which platform programs are being traced: this process's own, or one that it compiles for without having it."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from sparse_jax.core import errors

PLATFORMS = ('cpu', 'gpu', 'tpu')


class Target(NamedTuple):
    """A platform that is not here."""

    platform: str
    capability: str  # of a GPU
    interpret: bool


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar('target', default=None)


# Pallas asks for which device it lowers: kind and number of multiprocessors or cores.
_DEVICES = {'gpu': ('NVIDIA H100 80GB HBM3', 132), 'tpu': ('TPU v5 lite', 1)}


def _abstract(platform: str) -> AbstractMesh:
    kind, cores = _DEVICES[platform]
    return AbstractMesh((), (), abstract_device=AbstractDevice(device_kind=kind, num_cores=cores, platform=platform))


@contextlib.contextmanager
def lowering_for(platform: str, *, capability: str = '9.0', interpret: bool = False, mesh: Any = None) -> Iterator[None]:
    """Within it, sparse products are traced for this platform, whatever runs here: to lower or export programs for a GPU or a TPU on a
    machine without one.

    Functions that were jitted and traced before keep what they were traced for: jit them inside.

    Args:
      platform: ``'cpu'``, ``'gpu'`` or ``'tpu'``.
      capability: of the GPU, such as ``'9.0'`` (Hopper).
      interpret: whether Pallas kernels run in their interpreter, so that they can be executed here: slowly, to test them.
      mesh: of the program, where it has one; its devices say what they are.

    Yields:
      Nothing. Products whose implementation nobody names are the reference's inside, as densities were measured for devices that are here.

    Raises:
      ValueError: for another platform.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from sparse_jax import kernels
      >>> pattern = kernels.make_pattern(np.kron(np.eye(2, dtype=bool), np.ones((64, 64), bool)), block=(64, 64))
      >>> x, w = jnp.ones((64, 128), jnp.bfloat16), jnp.ones((128, 128), jnp.bfloat16)
      >>> with kernels.lowering_for('gpu'):
      ...     step = jax.jit(lambda x, w: kernels.sparse_dot(x, w, pattern, implementation='gpu'))
      ...     text = step.trace(x, w).lower(lowering_platforms=('cuda',)).as_text()
      >>> 'mosaic_gpu' in text
      True
    """
    if platform not in PLATFORMS:
        raise errors.unknown('platform', platform, PLATFORMS)
    token = _TARGET.set(Target(platform, capability, interpret))
    try:
        with (
            contextlib.nullcontext()
            if interpret or mesh is not None or platform == 'cpu'
            else use_abstract_mesh(_abstract(platform))
        ):
            yield
    finally:
        _TARGET.reset(token)


def platform() -> str:
    """'cpu', 'gpu' or 'tpu', as jax calls them."""
    own = _TARGET.get()
    return own.platform if own else jax.default_backend()


def is_elsewhere() -> bool:
    """Whether programs are traced for a machine that is not this one."""
    return _TARGET.get() is not None


def interpret() -> bool:
    """Whether Pallas kernels are to be interpreted."""
    own = _TARGET.get()
    return own is not None and own.interpret


def capability() -> str:
    """Of the GPU, such as '9.0' (Hopper), or what else its maker calls it."""
    own = _TARGET.get()
    return own.capability if own else str(getattr(jax.devices()[0], 'compute_capability', 'unknown'))
