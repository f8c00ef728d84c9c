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
    """What is kept under this name; nothing where the file is absent or damaged, since it can be measured again."""
    try:
        content = json.loads((compiler.cache_folder() / name).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(name: str, content: dict[str, Any]) -> None:
    """Whole or not at all. Of two processes that write at once one wins, and the other's is measured again some time."""
    path = compiler.cache_folder() / name
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a measurement next time
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix='.json.partial')
        try:
            with os.fdopen(handle, 'w') as file:
                json.dump(content, file)
            os.replace(partial, path)
        finally:
            pathlib.Path(partial).unlink(missing_ok=True)


def crossover(device: str, granularity: Granularity) -> float | None:
    """Up to which density the kernels were measured to be the faster ones on this kind of device; None: it was not measured."""
    return read(_CROSSOVERS).get(device, {}).get(_sides(granularity))


def write_crossover(device: str, granularity: Granularity, density: float) -> None:
    """Keeps what :func:`crossover` gives."""
    content = read(_CROSSOVERS)
    content.setdefault(device, {})[_sides(granularity)] = rounded(density)
    write(_CROSSOVERS, content)


def _sides(granularity: Granularity) -> str:
    rows, columns = granularity.sides
    return f'{rows}x{columns}'
