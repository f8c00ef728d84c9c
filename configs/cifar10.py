"""What all CIFAR-10 experiments of the paper share; the files cifar10_*.py name the network and its density.

Settings are the original's (github.com/TimDettmers/sparse_learning): 250 epochs (issue 10 there) of batches of 128, a tenth of the training
images for validation, learning rate 0.1, x0.1 every 30,000 steps, Nesterov momentum 0.9, L2 5e-4, reflect-pad by 4, random crop, random flip.
Batch and decay are those of SNIP (arXiv:1810.02340, section 5), which the original compares with.
"""

from sparse_jax import config as config_lib


def get(
    model: str, density: float, variant: str, *, offline_batch: int, offline_epochs: int, offline_rate: float
) -> config_lib.Config:
    """The settings of one network; the variant `offline` takes the digits that need no download, and trains for a few epochs."""
    if variant not in ('', 'offline'):
        raise ValueError(f"the variant {variant!r} does not exist: give none, or ':offline'.")
    config = config_lib.Config()
    config.model.name = model
    config.sparsity.density = density
    config.data.name, config.data.dir = 'cifar10', 'data/cifar10'
    config.data.batch_size = 128
    config.data.eval_batch_size = 100
    config.train.epochs = 250
    config.optimizer.decay_every = 30_000
    if variant == 'offline':
        config.data.name = 'digits32'
        config.data.validation = 0.0  # these settings are fixed: there is nothing to choose
        config.data.batch_size = offline_batch
        config.train.epochs = offline_epochs
        config.optimizer.learning_rate, config.optimizer.schedule = offline_rate, 'cosine'
        steps = offline_epochs * (4000 // offline_batch)
        config.sparsity.update_every, config.train.eval_every, config.checkpoint.every = steps // 6, steps // 4, steps // 4
        config.log.every = 10
    return config
