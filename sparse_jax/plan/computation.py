"""How much computation a training is, beside amounts that are known; and what brains are estimated to do a second.

An operation is one multiplication or one addition. Trainings that others published are counted in the same way, to about a factor of two;
estimates of brains differ by eight orders of magnitude, since they say how much it takes to imitate different things.
"""

import math
from typing import NamedTuple

from sparse_jax.plan.network import Network

_PFLOPS_DAY = 1e15 * 86_400


class Amount(NamedTuple):
    """A known amount of computation."""

    name: str
    operations: float  # in all, or a second of a brain
    low: float  # the range of what is said of it
    high: float
    source: str


def brain(
    neurons: float = 86e9,
    share: float = 0.5,
    inputs: tuple[int, ...] = (100_000, 5),
    filters: tuple[int, ...] = (10, 1000, 5),
    granule_inputs: tuple[int, ...] = (15, 5),
    granule_filters: tuple[int, ...] = (3, 4, 5),
    soma: tuple[int, ...] = (1, 1, 5),
) -> float:
    r"""Operations a second of a brain whose neurons filter their inputs over space and time.

    .. math:: s N (i f + i_g f_g + f_s)

    for N neurons of which a share s is counted, as if each were a Purkinje neuron: i inputs, filtered by f weights, in 5 time steps; and the
    much smaller terms of granule cells and of the cell body. With its defaults it is the 1.075e21 of the reference, which gives sizes of the
    filters but shows its formula in a picture only: that half of the neurons are counted is what reproduces the figure.

    Args:
      neurons: of the brain.
      share: of them that is counted, or their mean rate a second.
      inputs: of a Purkinje neuron: synapses, time steps.
      filters: of its dendrites.
      granule_inputs: of a granule cell.
      granule_filters: of its dendrites.
      soma: the filter of a cell body.

    Returns:
      Operations a second.

    Example:
      >>> f'{brain():.4g}', f'{brain(inputs=(1000, 1), filters=(1,)):.2g}'
      ('1.075e+21', '2.4e+14')

    Reference: Dettmers, The brain vs deep learning, part I, 2015.
    """
    size = math.prod
    return share * neurons * (size(inputs) * size(filters) + size(granule_inputs) * size(granule_filters) + size(soma))


def amounts() -> list[Amount]:
    """Known amounts: trainings, machines for an hour or a day, and a second of a brain by several estimates; the least first."""
    exactly = lambda name, value, source: Amount(name, value, value, value, source)
    rows = [
        Amount('an hour of a laptop', 1.8e15, 3.6e14, 1e16, '0.1 to 3 TFLOP/s that programs reach'),
        exactly('an hour of an H100 at half its peak', 0.5 * 989.4e12 * 3600, 'its datasheet'),
        exactly('training of AlexNet, 2012', 0.0058 * _PFLOPS_DAY, 'OpenAI, AI and compute, 2018'),
        exactly('training of GPT-1, 2018', 0.96 * _PFLOPS_DAY, 'OpenAI, AI and compute, 2018'),
        Amount('training of GPT-2, 2019', 1.5e21, 1e21, 2e21, 'estimates of others; OpenAI published none'),
        exactly('training of GPT-3, 2020', 3.14e23, 'Brown et al., 2020, table D.1'),
        exactly('a day of the first exaflop machine, 2022', 1.1e18 * 86_400, 'TOP500, June 2022'),
        Amount(
            'a second of a brain: signals of neurons',
            1e15,
            1e13,
            1e17,
            'Carlsmith, How much computational power does it take, 2020',
        ),
        Amount(
            'a second of a brain: synapses',
            1e16,
            1e13,
            1e16,
            'Merkle, Energy limits to the computational power of the human brain, 1989',
        ),
        exactly(
            'a second of a brain: filters in dendrites', brain(), 'Dettmers, The brain vs deep learning, 2015, as a lower bound'
        ),
    ]
    return sorted(rows, key=lambda row: row.operations)


def of_training(network: Network) -> float:
    """Operations of a network's training: what a machine without waste would do.

    Args:
      network: what is trained.

    Returns:
      Those of its products, at the density that they have, two for each multiply-add.
    """
    densities = network.densities()
    total = 0.0
    for product in network.counts.products:
        density = densities.get(product.name, 1.0)
        gradient = network.dense_gradients + (1 - network.dense_gradients) * density  # of the weight
        backward = product.needs_input_gradient * (density if product.name else 2) + (gradient if product.name else 0.0)
        total += product.operations * (density + backward)
    return 2 * total * network.config.data.batch_size * network.steps


class Comparison(NamedTuple):
    """A known amount, and how many of it a run is."""

    amount: Amount
    times: float


def compare(operations: float) -> list[Comparison]:
    """A run beside every known amount.

    Args:
      operations: of the run, in all.

    Returns:
      A row for each amount, the least first.

    Raises:
      ValueError: for a number that is not above 0.

    Example:
      >>> round(next(row.times for row in compare(3.14e23) if 'GPT-3' in row.amount.name), 2)
      1.0
    """
    if not operations > 0:
        raise ValueError(f'operations={operations!r}: must be above 0.')
    return [Comparison(amount, operations / amount.operations) for amount in amounts()]


def table(operations: float) -> str:
    """The comparison as lines of text.

    >>> print(table(1e18).splitlines()[0])
    1e+18 operations are
    """
    rows = [f'  {row.times:>10.3g} x {row.amount.name} ({row.amount.operations:.2g})' for row in compare(operations)]
    return '\n'.join([f'{operations:.3g} operations are', *rows])
