"""AlexNet-b, SNIP's, on CIFAR-10 at 10% of the weights: 8,501,322 parameters.

    python launch.py --config=configs/cifar10_alexnet_b.py --workdir=runs/alexnet_b --config.data.download=True
    python launch.py --config=configs/cifar10_alexnet_b.py:offline --workdir=runs/alexnet_b_offline

Settings: configs/cifar10.py. Published, not reproduced here: error of SNIP at 10%: 14.50%, its dense network: 13.92% (arXiv:1810.02340, table 2).

Cost: 87,750 steps of 128 images, for an accelerator, not run here; `offline`: not timed; of its kind vgg_d and wrn_16_8 were, at two to four minutes on
two CPU cores.
"""

from sparse_jax import config as config_lib
from sparse_jax.configs import cifar10

VARIANTS = ('offline',)


def get_config(variant: str = '') -> config_lib.Config:
    return cifar10.get('alexnet_b', 0.1, variant, offline_batch=50, offline_epochs=3, offline_rate=0.02)
