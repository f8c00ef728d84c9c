"""VGG-16 variant C, on CIFAR-10 at 5% of the weights: 11,323,466 parameters.

    python launch.py --config=configs/cifar10_vgg_c.py --workdir=runs/vgg_c --config.data.download=True
    python launch.py --config=configs/cifar10_vgg_c.py:offline --workdir=runs/vgg_c_offline

Settings: configs/cifar10.py. Published, not reproduced here: error of SNIP at 5%: 7.27%, its dense network: 6.82% (arXiv:1810.02340, table 2); its network has 10.5 million parameters, as the original's code pads 1x1
kernels and so has a larger first linear layer.

Cost: 87,750 steps of 128 images, for an accelerator, not run here; `offline`: not timed; of its kind vgg_d and wrn_16_8 were, at two to four minutes on
two CPU cores.
"""

from sparse_jax import config as config_lib
from sparse_jax.configs import cifar10

VARIANTS = ('offline',)


def get_config(variant: str = '') -> config_lib.Config:
    return cifar10.get('vgg_c', 0.05, variant, offline_batch=50, offline_epochs=3, offline_rate=0.02)
