"""WRN-22-8, on CIFAR-10 at 5% of the weights: 17,158,106 parameters.

    python launch.py --config=configs/cifar10_wrn_22_8.py --workdir=runs/wrn_22_8 --config.data.download=True
    python launch.py --config=configs/cifar10_wrn_22_8.py:offline --workdir=runs/wrn_22_8_offline

Settings: configs/cifar10.py. Published, not reproduced here: error of SNIP at 5%: 5.85%, its dense network: 6.14% (arXiv:1810.02340, table 2); accuracy of sparse momentum: 95.04% (entry on Papers with Code).

Cost: 87,750 steps of 128 images, for an accelerator, not run here; `offline`: not timed; of its kind vgg_d and wrn_16_8 were, at two to four minutes on
two CPU cores.
"""

from sparse_jax import config as config_lib
from sparse_jax.configs import cifar10

VARIANTS = ('offline',)


def get_config(variant: str = '') -> config_lib.Config:
    return cifar10.get('wrn_22_8', 0.05, variant, offline_batch=20, offline_epochs=1, offline_rate=0.1)
