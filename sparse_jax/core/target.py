"""The platform that programs are traced for: this process's own, or another one that it only lowers for."""

import contextvars

import jax

# None: the platform of this process. Set within kernels.lowering_for.
PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


def platform() -> str:
    """'cpu', 'gpu' or 'tpu', as jax calls them."""
    return PLATFORM.get() or jax.default_backend()
