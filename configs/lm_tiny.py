"""A small sparse Transformer on the sources of Python's standard library, byte by byte: 10% of the weights, one CPU.

    python launch.py --config=configs/lm_tiny.py --workdir=runs/lm
    python launch.py --config=configs/lm_tiny.py:dense --workdir=runs/lm_dense
    python launch.py --config=configs/lm_tiny.py:small --workdir=runs/lm_small

The variant `dense` is its dense twin, everything else equal; `small` a dense network with as many weights as the sparse one has.
The text is always there, and differs from one version of Python to the next: compare runs on one machine only.
Cost: seven minutes on two CPU cores, the small one two and a half. Result (one run each, Python 3.11): validation loss 1.606 nats a byte sparse, 1.383
dense, 1.638 small; measured with dense gradients in every step and masked dense products: docs/experiments.md.
"""

from sparse_jax import config as config_lib

VARIANTS = ('dense', 'small')


def get_config(variant: str = '') -> config_lib.Config:
    if variant not in ('', *VARIANTS):
        raise ValueError(f"the variant {variant!r} does not exist: give none, ':dense' or ':small'.")
    config = config_lib.Config()
    config.model.name = 'transformer'
    config.model.depth, config.model.features, config.model.heads = 4, 192, 4
    config.data.name, config.data.length, config.data.validation = 'stdlib', 128, 0.01
    config.data.batch_size, config.data.eval_batch_size = 32, 32
    config.optimizer.name, config.optimizer.schedule = 'adamw', 'cosine'
    config.optimizer.learning_rate, config.optimizer.warmup_steps, config.optimizer.final_factor = 2e-3, 50, 0.1
    config.optimizer.weight_decay, config.optimizer.clip_norm = 0.1, 1.0
    config.train.steps, config.train.eval_every = 700, 100
    config.sparsity.density, config.sparsity.update_every = 0.1, 50
    config.sparsity.stop_step = 525  # then the masks rest, as in RigL
    config.checkpoint.every, config.log.every = 200, 20
    if variant == 'dense':
        config.sparsity.method = 'dense'
    if variant == 'small':
        config.sparsity.method = 'dense'
        config.model.features, config.model.hidden, config.model.heads = 64, 188, 4
    return config
