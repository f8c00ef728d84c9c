"""How many units each layer starts with: exact integers on the host, from the layers' shapes alone."""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from sparse_jax.core import errors


class Layer(NamedTuple):
    """What a distribution knows of a layer."""

    name: str  # its path, joined by /
    shape: tuple[int, ...]  # of its weights; the last two axes are inputs and outputs
    size: int  # units; weights where selection is unstructured


# Maps the layers and a density in (0, 1] to the units that each layer starts with.
Distribution = Callable[[Sequence[Layer], float], list[int]]


def budget(layers: Sequence[Layer], density: float) -> int:
    """The exact total, round(density * units); ValueError if it is below one unit a layer.

    >>> budget([Layer('a', (8, 8), 64), Layer('b', (8, 2), 16)], 0.1)
    8
    """
    size = sum(layer.size for layer in layers)
    total = round(density * size)
    if total < len(layers):
        raise ValueError(
            f'density={density} keeps {total} of {size} units, fewer than the {len(layers)} sparse layers: every layer needs at '
            f'least one, so density must be at least {len(layers) / size:.3g}.'
        )
    return total


def _proportional(total: int, weights: Sequence[int | Fraction], sizes: Sequence[int]) -> list[int]:
    """A total given out in proportion to weights, no layer getting more than its size or less than 1, in exact arithmetic.

    Layers whose part would be more than they can hold are full, and what is left is given to the others in proportion: repeated
    until none overflows, which is the one solution of sum min(size, c * weight) = total. Then the floors, and what is left goes
    one each to the largest remainders (the first layer first). A layer that would get nothing gets one, from the one that has
    the most.
    """
    full: set[int] = set()
    while True:
        open_ = [i for i in range(len(sizes)) if i not in full]
        left = total - sum(sizes[i] for i in full)
        sum_weights = sum(weights[i] for i in open_)
        parts = {i: Fraction(left) * weights[i] / sum_weights for i in open_}
        overflowing = {i for i in open_ if parts[i] > sizes[i]}
        if not overflowing:
            break
        full |= overflowing
    counts = [sizes[i] if i in full else int(parts[i]) for i in range(len(sizes))]
    by_remainder = sorted((i for i in open_ if counts[i] < sizes[i]), key=lambda i: (-(parts[i] - int(parts[i])), i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for i, count in enumerate(counts):
        if count == 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    return counts


def uniform(layers: Sequence[Layer], density: float) -> list[int]:
    r"""The same density in every layer, with an exact total.

    The total is :math:`\mathrm{round}(d \sum_l n_l)`. Layer l gets the floor of its proportional part, and what is left
    goes one each to the largest remainders (the first layer first). A layer that would get nothing gets one unit, taken from
    the layer that has the most.

    Args:
      layers: the sparse layers.
      density: share of the units that exist, in (0, 1].

    Returns:
      The units of each layer; their sum is exact.

    Raises:
      ValueError: if the total is below one unit a layer.

    Example:
      >>> shapes = {'fc1': (784, 300), 'fc2': (300, 100), 'fc3': (100, 10)}
      >>> uniform([Layer(name, shape, shape[0] * shape[1]) for name, shape in shapes.items()], 0.05)
      [11760, 1500, 50]

    Reference:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch <https://arxiv.org/abs/1907.04840>`_, 2019 (their ``constant``,
      with exact counts in place of coin tosses).
    """
    sizes = [layer.size for layer in layers]
    return _proportional(budget(layers, density), sizes, sizes)


def erdos_renyi(layers: Sequence[Layer], density: float) -> list[int]:
    r"""Erdős-Rényi: a layer's density is proportional to :math:`(n_{in} + n_{out}) / (n_{in} n_{out})`, saturation solved exactly.

    Small layers are denser than large ones. A layer for which that would be more than all of its units is full, and the factor
    is solved again for the others, so that the total is exact.

    >>> erdos_renyi([Layer('a', (100, 100), 10_000), Layer('b', (10, 10), 100)], 0.0242)
    [222, 22]

    Reference:
      Mocanu et al., `Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
      <https://arxiv.org/abs/1707.04780>`_, 2018.
    """
    weights = [Fraction(layer.size * sum(layer.shape[-2:]), _area(layer.shape[-2:])) for layer in layers]
    return _proportional(budget(layers, density), weights, [layer.size for layer in layers])


def erdos_renyi_kernel(layers: Sequence[Layer], density: float) -> list[int]:
    r"""Erdős-Rényi-Kernel (ERK): as :func:`erdos_renyi` with a convolution's height and width counted too.

    A layer's density is proportional to :math:`(n_{in} + n_{out} + h + w) / (n_{in} n_{out} h w)`.

    >>> erdos_renyi_kernel([Layer('conv', (3, 3, 16, 16), 2304), Layer('fc', (64, 10), 640)], 0.05)
    [50, 97]

    Reference:
      Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    weights = [Fraction(layer.size * sum(layer.shape), _area(layer.shape)) for layer in layers]
    return _proportional(budget(layers, density), weights, [layer.size for layer in layers])


def _area(shape: Sequence[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def matching(patterns: Sequence[str], names: Sequence[str], setting: str) -> list[int | None]:
    """For each name the index of the first pattern (``*`` matches anything) that matches it; ValueError for an idle pattern.

    >>> matching(['fc1/*', '*'], ['fc1/kernel', 'fc2/kernel'], 'distribution')
    [0, 1]
    """

    def matches(pattern: str, name: str) -> bool:
        expression = '.*'.join(map(re.escape, pattern.split('*')))
        return any(
            re.fullmatch(expression, n) for n in (name, re.sub(r'\[\d+\]$', '', name))
        )  # a stacked leaf's layer, or the leaf

    first_match = [next((i for i, pattern in enumerate(patterns) if matches(pattern, name)), None) for name in names]
    for i, pattern in enumerate(patterns):
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                f'{setting}: the pattern {pattern!r} matches no sparse leaf.{errors.did_you_mean(pattern, names)} They are '
                f'{", ".join(names)}; * matches any part of a path.'
            )
        if i not in first_match:
            raise ValueError(
                f'{setting}: the pattern {pattern!r} never comes into play: patterns before it match all that it does.'
            )
    return first_match


def by_pattern(densities: Mapping[str, float], rest: Distribution = uniform) -> Distribution:
    """Densities of one's own for the layers that a pattern matches; the others share what is left of the total.

    Args:
      densities: path pattern (``*`` matches anything; the first that matches counts) to the layer's density, in (0, 1].
      rest: distribution of what is left over the layers that no pattern matches.

    Returns:
      A distribution. It raises ValueError for a pattern that matches nothing, and for a total that cannot be met: where every
      layer is matched it must be the density asked for.

    Example:
      >>> layers = [Layer('conv1/kernel', (3, 3, 3, 64), 1728), Layer('conv2/kernel', (3, 3, 64, 64), 36864)]
      >>> by_pattern({'conv1/*': 0.5})(layers, 0.1)
      [864, 2995]
    """
    for pattern, density in densities.items():
        if not isinstance(density, (int, float)) or not 0 < density <= 1:
            raise ValueError(f'distribution: {pattern!r} is given the density {density!r}; it must be in (0, 1].')

    def distribution(layers: Sequence[Layer], density: float) -> list[int]:
        first_match = matching(list(densities), [layer.name for layer in layers], 'distribution')
        values = list(densities.values())
        counts = [0 if i is None else max(1, round(values[i] * layer.size)) for i, layer in zip(first_match, layers, strict=True)]
        others = [i for i, index in enumerate(first_match) if index is None]
        size, total = sum(layer.size for layer in layers), budget(layers, density)
        left = total - sum(counts)
        if not others and abs(left) > len(layers):
            raise ValueError(
                f'distribution fixes every layer, at {sum(counts) / size:.6g} of the units in all, but density={density}: give '
                'density that value, or leave a layer out to take the rest.'
            )
        if others:
            room = sum(layers[i].size for i in others)
            if not len(others) <= left <= room:
                raise ValueError(
                    f'distribution gives {sum(counts)} units to the layers it names, which leaves {left} of the {total} that '
                    f'density={density} allows for the other {len(others)} layers, of {room} units: change one or the other.'
                )
            for i, count in zip(others, rest([layers[i] for i in others], left / room), strict=True):
                counts[i] = count
        # rounding: to the unit, from the layers that have the most room or the most units
        while (difference := total - sum(counts)) != 0:
            sign = 1 if difference > 0 else -1
            by_slack = max(range(len(layers)), key=lambda i: layers[i].size - counts[i] if sign > 0 else counts[i])
            counts[by_slack] += sign
        return counts

    return distribution


_BY_NAME = {'uniform': uniform, 'erdos_renyi': erdos_renyi, 'erk': erdos_renyi_kernel, 'erdos_renyi_kernel': erdos_renyi_kernel}


def get(distribution: str | Mapping[str, float] | Distribution) -> Distribution:
    """The distribution of that name, that of a mapping of path patterns, or the given function; ValueError where there is none.

    >>> get('uniform')([Layer('a', (2, 4), 8), Layer('b', (8,), 8)], 0.5)
    [4, 4]
    """
    if isinstance(distribution, Mapping):
        return by_pattern(distribution)
    if callable(distribution):
        errors.check_takes('distribution', distribution, '(layers, density) -> counts')
        return distribution
    if not isinstance(distribution, str) or distribution not in _BY_NAME:
        raise errors.unknown('distribution', distribution, _BY_NAME)
    return _BY_NAME[distribution]


def counts(distribution: Distribution, layers: Sequence[Layer], density: float) -> list[int]:
    """The distribution's counts, checked: one for each layer, at least 1 and at most all of its units."""
    if not layers:
        return []
    given = distribution(layers, density)
    is_counts = np.ndim(given) == 1 and len(given) == len(layers)
    if not is_counts or not all(1 <= n <= layer.size for n, layer in zip(given, layers, strict=True)):
        raise ValueError(
            f'distribution returned {given} for layers of {[layer.size for layer in layers]} units: it must give each layer 1 to '
            'all of them.'
        )
    return [int(n) for n in given]
