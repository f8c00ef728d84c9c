"""Measurements kept on disk for this user's next processes, as JSON in the cache's folder."""

import contextlib
import json
import os
import pathlib
import tempfile
from typing import Any

from sparse_jax.core.granularity import Granularity
from sparse_jax.kernels.cpu import compiler

_CROSSOVERS = 'crossovers.json'  # kind of device -> sides of a block -> density


def rounded(density: float) -> float:
    """A density as measurements are kept: to two digits.

    >>> rounded(0.04951), rounded(1 - 0.9)
    (0.05, 0.1)
    """
    return float(f'{density:.1e}')


def read(name: str) -> dict[str, Any]:
    """What is kept under this name; nothing where the file is absent, damaged or not this user's, since it can be measured again."""
    path = compiler.cache_folder() / name
    if not compiler.is_trusted(path):
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write(name: str, content: dict[str, Any]) -> None:
    """Whole or not at all. Of two processes that write at once one wins, and the other's is measured again some time."""
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a measurement next time
        path = compiler.make_cache_folder() / name
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix='.json.partial')
        try:
            with os.fdopen(handle, 'w') as file:
                json.dump(content, file)
            os.replace(partial, path)
        finally:
            pathlib.Path(partial).unlink(missing_ok=True)


def crossover(device: str, granularity: Granularity) -> float | None:
    """Up to which density the kernels were measured to be the faster ones on this kind of device; None: it was not measured."""
    of_device = read(_CROSSOVERS).get(device)
    density = of_device.get(_sides(granularity)) if isinstance(of_device, dict) else None
    return density if isinstance(density, float) and 0 < density <= 1 else None


def write_crossover(device: str, granularity: Granularity, density: float) -> None:
    """Keeps what :func:`crossover` gives."""
    content = read(_CROSSOVERS)
    of_device = content.get(device)
    content[device] = (of_device if isinstance(of_device, dict) else {}) | {_sides(granularity): rounded(density)}
    write(_CROSSOVERS, content)


def _sides(granularity: Granularity) -> str:
    rows, columns = granularity.sides
    return f'{rows}x{columns}'
