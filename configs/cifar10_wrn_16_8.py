"""WRN-16-8, on CIFAR-10 at 5% of the weights: 10,961,370 parameters.

    python launch.py --config=configs/cifar10_wrn_16_8.py --workdir=runs/wrn_16_8 --config.data.download=True
    python launch.py --config=configs/cifar10_wrn_16_8.py:offline --workdir=runs/wrn_16_8_offline

Settings: configs/cifar10.py. Published, not reproduced here: error of SNIP at 5%: 6.63%, its dense network: 6.21% (arXiv:1810.02340, table 2).

Cost: 87,750 steps of 128 images, for an accelerator, not run here; `offline`: three and a half minutes on two CPU cores, 87.3% of the test digits in one run (flags: docs/experiments.md), dense 92.9%.
"""

from sparse_jax import config as config_lib
from sparse_jax.configs import cifar10

VARIANTS = ('offline',)


def get_config(variant: str = '') -> config_lib.Config:
    return cifar10.get('wrn_16_8', 0.05, variant, offline_batch=20, offline_epochs=1, offline_rate=0.1)
