"""What programs are traced for: this process's own platform, or another one that it only lowers for, and the mesh that they lie over."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

# None: the platform of this process. Set within kernels.lowering_for.
PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


def platform() -> str:
    """'cpu', 'gpu' or 'tpu', as jax calls them."""
    return PLATFORM.get() or jax.default_backend()


_MESH: contextvars.ContextVar[jax.sharding.Mesh | None] = contextvars.ContextVar('mesh', default=None)


def mesh() -> jax.sharding.Mesh | None:
    """The mesh that a program's arrays lie over, where it was named: compilers cannot divide every kernel by themselves."""
    return _MESH.get()


@contextlib.contextmanager
def over(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Names the mesh of what is traced within."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)
