"""WRN-28-2, on CIFAR-10 at 10% of the weights: 1,467,610 parameters.

    python launch.py --config=configs/cifar10_wrn_28_2.py --workdir=runs/wrn_28_2 --config.data.download=True
    python launch.py --config=configs/cifar10_wrn_28_2.py:offline --workdir=runs/wrn_28_2_offline

Settings: configs/cifar10.py. Published, not reproduced here: accuracy of sparse momentum at 10, 20, 30, 40, 50%: 93.61, 94.32, 94.58, 94.68, 94.75%, dense 94.70%
(results/WRN-28-2_results_summary.csv of sparse_learning).

Cost: 87,750 steps of 128 images, for an accelerator, not run here; `offline`: not timed; of its kind vgg_d and wrn_16_8 were, at two to four minutes on
two CPU cores.
"""

from sparse_jax import config as config_lib
from sparse_jax.configs import cifar10

VARIANTS = ('offline',)


def get_config(variant: str = '') -> config_lib.Config:
    return cifar10.get('wrn_28_2', 0.1, variant, offline_batch=20, offline_epochs=1, offline_rate=0.1)
