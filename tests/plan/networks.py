"""Small networks that the planner's tests share."""

import functools

from configs import cifar10_wrn_16_8, lm_tiny, mnist_lenet5, mnist_lenet300
from sparse_jax.plan import network

CONFIGS = {
    'lenet300': lambda: mnist_lenet300.get_config('offline'),
    'lenet5': lambda: mnist_lenet5.get_config('offline'),
    'wrn': lambda: cifar10_wrn_16_8.get_config('offline'),
    'lm': lm_tiny.get_config,
}


@functools.cache
def planned(name: str, **settings: object) -> network.Network:
    """The network of a config, with settings whose dots are written as double underscores."""
    config = CONFIGS[name]()
    for setting, value in settings.items():
        section, _, field = setting.partition('__')
        setattr(getattr(config, section), field, value)
    return network.of_config(config)
