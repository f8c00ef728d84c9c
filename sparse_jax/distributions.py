"""How many weights each layer starts with: exact integers on the host, from the layers' sizes alone."""

from collections.abc import Sequence
from typing import Protocol

from sparse_jax import _names


class Distribution(Protocol):
    """Maps the layers' sizes (weights each) and a density in (0, 1] to the nonzeros each layer starts with."""

    def __call__(self, sizes: Sequence[int], density: float) -> list[int]: ...


def uniform(sizes: Sequence[int], density: float) -> list[int]:
    r"""The same density in every layer, with an exact total.

    The total is :math:`\mathrm{round}(d \sum_l n_l)`. Layer l gets the floor of its proportional part, and what is left
    goes one each to the largest remainders (the first layer first). A layer that would get nothing gets one weight, taken from
    the layer that has the most.

    Args:
      sizes: number of weights of each layer.
      density: share of the weights that exist, in (0, 1].

    Returns:
      The number of nonzeros of each layer; their sum is exact.

    Raises:
      ValueError: if the total is below one weight a layer.

    Example:
      >>> import sparse_jax as sj
      >>> sj.distributions.uniform([235_200, 30_000, 1_000], 0.05)
      [11760, 1500, 50]

    Reference:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch <https://arxiv.org/abs/1907.04840>`_, 2019 (their ``constant``,
      with exact counts in place of coin tosses).
    """
    size, total = sum(sizes), round(density * sum(sizes))
    if total < len(sizes):
        raise ValueError(
            f'density={density} keeps {total} of {size} weights, fewer than the {len(sizes)} sparse layers: every layer needs at '
            f'least one weight, so density must be at least {len(sizes) / size:.3g}.'
        )
    counts = [total * n // size for n in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % size), i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for i, count in enumerate(counts):
        if count == 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    return counts


_BY_NAME = {'uniform': uniform}


def get(distribution: str | Distribution) -> Distribution:
    """The distribution of that name, or the given function itself; ValueError where there is none.

    >>> get('uniform')([8, 8], 0.5)
    [4, 4]
    """
    if callable(distribution):
        return distribution
    if distribution not in _BY_NAME:
        raise _names.unknown('distribution', distribution, _BY_NAME)
    return _BY_NAME[distribution]
