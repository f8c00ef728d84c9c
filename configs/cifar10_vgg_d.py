"""VGG-16 variant D, on CIFAR-10 at 5% of the weights: 15,255,626 parameters.

    python launch.py --config=configs/cifar10_vgg_d.py --workdir=runs/vgg_d --config.data.download=True
    python launch.py --config=configs/cifar10_vgg_d.py:offline --workdir=runs/vgg_d_offline

Settings: configs/cifar10.py. Published, not reproduced here: error of sparse momentum at 5%: 6.67% (0.08 standard error; prune rate 0.2: 6.39%; results/sensitivity_prune_rate_vgg-d.csv of
sparse_learning); of SNIP at 5%: 7.09%, its dense network: 6.76% (arXiv:1810.02340, table 2).

Cost: 87,750 steps of 128 images, for an accelerator, not run here; `offline`: 248 steps of 64 images, three minutes on two CPU cores; in one
run of 240 steps of 50 images (flags: docs/experiments.md) 96.7% of the test digits, dense 72.1%.
"""

from sparse_jax import config as config_lib
from sparse_jax.configs import cifar10

VARIANTS = ('offline',)


def get_config(variant: str = '') -> config_lib.Config:
    return cifar10.get('vgg_d', 0.05, variant, offline_batch=64, offline_epochs=4, offline_rate=0.02)
