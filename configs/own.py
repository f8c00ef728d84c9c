"""A network and images of one's own, at 10% of the weights: a start for settings of one's own.

    python launch.py --config=configs/own.py --workdir=runs/own --config.model.name=nets:MyNet --config.data.dir=photos --config.data.size=64

Images are in a folder for each class (see docs/own_networks.md). Adam's schedule is a cosine over 30 epochs of batches of 64, a tenth of
the training images is held out for validation, masks are updated once an epoch. Published: nothing.
Cost and result are the network's.
"""

from sparse_jax import config as config_lib

VARIANTS = ()


def get_config(variant: str = '') -> config_lib.Config:
    if variant not in ('', *VARIANTS):
        raise ValueError(f'the variant {variant!r} does not exist: this config has none.')
    config = config_lib.Config()
    config.model.name = 'lenet5'  # to be replaced by a class of one's own
    config.data.name, config.data.dir = 'folder', 'data/own'
    config.data.batch_size = 64
    config.data.eval_batch_size = 256
    config.sparsity.density = 0.1
    config.train.epochs = 30
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = 'adamw', 1e-3, 'cosine'
    config.optimizer.weight_decay = 0.01
    return config
