"""What one unit of selection is. Units are scored, pruned and grown whole."""

import dataclasses

from sparse_jax import _names


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every weight is a unit of its own."""


def get(granularity: str | Unstructured) -> Unstructured:
    """The granularity that a config's text names, or the given one itself; ValueError where there is none.

    >>> get('unstructured')
    Unstructured()
    """
    if isinstance(granularity, Unstructured):
        return granularity
    if granularity == 'unstructured':
        return Unstructured()
    raise _names.unknown('granularity', granularity, ['unstructured'])
