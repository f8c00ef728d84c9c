"""Which hardware, which parallelism, which density: arithmetic on a config, before anything runs.

Example:
  >>> from sparse_jax.configs import cifar10_wrn_16_8
  >>> network = of_config(cifar10_wrn_16_8.get_config())
  >>> planned = best(network, devices()['A100'], 4)
  >>> planned.fits, planned.devices
  (True, 4)
"""

from sparse_jax.plan import answers, computation, convolution, hardware, network, scaling, search
from sparse_jax.plan.answers import Answer, answer, recommended
from sparse_jax.plan.collectives import Mesh
from sparse_jax.plan.hardware import Device, devices
from sparse_jax.plan.network import Network, of_config
from sparse_jax.plan.search import Plan, best, evaluate
from sparse_jax.plan.step_time import Choice

__all__ = [
    'Answer',
    'Choice',
    'Device',
    'Mesh',
    'Network',
    'Plan',
    'answer',
    'answers',
    'best',
    'computation',
    'convolution',
    'devices',
    'evaluate',
    'hardware',
    'network',
    'of_config',
    'recommended',
    'scaling',
    'search',
]
