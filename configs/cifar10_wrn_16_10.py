"""WRN-16-10, on CIFAR-10 at 5% of the weights: 17,116,634 parameters.

    python launch.py --config=configs/cifar10_wrn_16_10.py --workdir=runs/wrn_16_10 --config.data.download=True
    python launch.py --config=configs/cifar10_wrn_16_10.py:offline --workdir=runs/wrn_16_10_offline

Settings: configs/cifar10.py. Published, not reproduced here: error of SNIP at 5%: 6.43%, its dense network: 5.91% (arXiv:1810.02340, table 2).

Cost: 87,750 steps of 128 images, for an accelerator, not run here; `offline`: not timed; of its kind vgg_d and wrn_16_8 were, at two to four minutes on
two CPU cores.
"""

from sparse_jax import config as config_lib
from sparse_jax.configs import cifar10

VARIANTS = ('offline',)


def get_config(variant: str = '') -> config_lib.Config:
    return cifar10.get('wrn_16_10', 0.05, variant, offline_batch=20, offline_epochs=1, offline_rate=0.1)
