"""VGG-16 with one hidden linear layer, on CIFAR-10 at 3% of the weights: 14,991,946 parameters.

    python launch.py --config=configs/cifar10_vgg_like.py --workdir=runs/vgg_like --config.data.download=True
    python launch.py --config=configs/cifar10_vgg_like.py:offline --workdir=runs/vgg_like_offline

Settings: configs/cifar10.py. Published, not reproduced here: error of SNIP at 3%: 8.00%, its dense network: 8.26% (arXiv:1810.02340, table 2).

Cost: 87,750 steps of 128 images, for an accelerator, not run here; `offline`: not timed; of its kind vgg_d and wrn_16_8 were, at two to four minutes on
two CPU cores.
"""

from sparse_jax import config as config_lib
from sparse_jax.configs import cifar10

VARIANTS = ('offline',)


def get_config(variant: str = '') -> config_lib.Config:
    return cifar10.get('vgg_like', 0.03, variant, offline_batch=50, offline_epochs=3, offline_rate=0.02)
