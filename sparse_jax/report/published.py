"""Published accuracies to stand beside measured ones: only numbers that were read at their source."""

from typing import NamedTuple


class Published(NamedTuple):
    """One number from a paper or its code."""

    accuracy: float  # percent
    of: str  # what reached it
    source: str


_LOGS = 'github.com/TimDettmers/sparse_learning, results/'
_SNIP = 'Lee et al., SNIP, arXiv:1810.02340, table 2'


def _rows():
    """((model, data, method, density or None for dense), number)"""
    mnist = {
        'sparse_momentum': {0.01: 97.53, 0.02: 98.20, 0.03: 98.30, 0.04: 98.42, 0.05: 98.53, 0.1: 98.67},
        'dsr': {0.01: 97.54, 0.02: 98.14, 0.03: 98.20, 0.04: 98.23, 0.05: 98.32, 0.1: 98.44},
        'set': {0.01: 95.80, 0.02: 97.74, 0.03: 98.06, 0.04: 98.10, 0.05: 98.14, 0.1: 98.39},
        'dense': {None: 98.69},
    }
    cifar = {
        'sparse_momentum': {0.1: 93.61, 0.2: 94.32, 0.3: 94.58, 0.4: 94.68, 0.5: 94.75},
        'dsr': {0.1: 93.59, 0.2: 94.40, 0.3: 94.57, 0.4: 94.66, 0.5: 94.73},
        'set': {0.1: 93.28, 0.2: 94.25, 0.3: 94.40, 0.4: 94.55, 0.5: 94.76},
        'dense': {None: 94.70},
    }
    lenet5 = {'sparse_momentum': {0.01: 99.17, 0.02: 99.24, 0.05: 99.31}}
    for model, data, table, source in (
        ('lenet300', 'mnist', mnist, _LOGS + 'MNIST_sparse_summary.csv'),
        ('lenet5', 'mnist', lenet5, _LOGS + 'MNIST_compression_comparison_lenet5.csv'),
        ('wrn_28_2', 'cifar10', cifar, _LOGS + 'WRN-28-2_results_summary.csv'),
    ):
        for method, numbers in table.items():
            for density, accuracy in numbers.items():
                yield (model, data, method, density), Published(accuracy, '', source)
    yield ('vgg_d', 'cifar10', 'sparse_momentum', 0.05), Published(93.33, '', _LOGS + 'sensitivity_prune_rate_vgg-d.csv')
    yield ('alexnet_s', 'cifar10', 'sparse_momentum', 0.05), Published(85.50, '', _LOGS + 'sensivity_momentum_alexnet-s.csv')
    yield ('alexnet_s', 'cifar10', 'dense', None), Published(87.32, '', _LOGS + 'sensivity_momentum_alexnet-s.csv')
    for model, density, snip, dense in (
        ('alexnet_s', 0.1, 14.99, 14.12),
        ('alexnet_b', 0.1, 14.50, 13.92),
        ('vgg_c', 0.05, 7.27, 6.82),
        ('vgg_d', 0.05, 7.09, 6.76),
        ('vgg_like', 0.03, 8.00, 8.26),
        ('wrn_16_8', 0.05, 6.63, 6.21),
        ('wrn_16_10', 0.05, 6.43, 5.91),
        ('wrn_22_8', 0.05, 5.85, 6.14),
    ):
        yield (model, 'cifar10', 'sparse_momentum', density), Published(round(100 - snip, 2), 'SNIP', _SNIP)
        yield (model, 'cifar10', 'dense', None), Published(round(100 - dense, 2), "SNIP's", _SNIP)


def find(model: str, data: str, method: str, density: float) -> list[Published]:
    """Published accuracies of a network, data set, method and density.

    Args:
      model: name.
      data: name; the offline digits have none.
      method: name.
      density: as the config says it; not read for dense.

    Returns:
      The numbers, most comparable first.

    Example:
      >>> [(p.accuracy, p.of) for p in find('vgg_d', 'cifar10', 'sparse_momentum', 0.05)]
      [(93.33, ''), (92.91, 'SNIP')]
    """
    key = (model, data, method, None if method == 'dense' else density)
    return [number for where, number in _rows() if where == key]
