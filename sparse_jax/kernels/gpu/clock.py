"""The time of a call by a GPU's own clock: the host's reads 15 to 20 us more for each, by which small layers look slow."""

from collections.abc import Callable
from typing import Any

from sparse_jax.core import errors


def device_seconds(function: Callable[..., Any], *arguments: Any) -> float | None:
    """Runs a compiled function once and adds up the times of its kernels.

    Args:
      function: jitted, and called before.
      *arguments: of it, arrays.

    Returns:
      Seconds; None where the profiler cannot be used, which is said once.
    """
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, milliseconds = profiler.measure(function)(*arguments)
    except Exception as error:  # no library, no permission, another profiler: each says so in its own way
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        errors.say_once(f"sparse_jax: the GPU does not tell its own times ({reason}): kernels are compared by the host's clock.")
        return None
    return None if milliseconds is None else 1e-3 * milliseconds
