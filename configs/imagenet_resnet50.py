"""ResNet-50 v1.5 on ImageNet: 25,557,032 parameters, of which 10, 20 or 30% of the weights exist.

    python launch.py --config=configs/imagenet_resnet50.py --workdir=runs/resnet50 --config.data.dir=IMAGENET --config.sparsity.density=0.1
    python launch.py --config=configs/imagenet_resnet50.py:partially_dense --workdir=runs/resnet50_partial --config.data.dir=IMAGENET
    python launch.py --config=configs/imagenet_resnet50.py:tuned --workdir=runs/resnet50_tuned --config.data.dir=IMAGENET

IMAGENET has the folders train/CLASS and test/CLASS, the latter with the 50,000 images of validation; images are scaled and cut to 224 pixels
and held in memory: 193 GB for training. Augmentation crops after padding by 4 pixels and flips, where the original crops parts of random
sizes.

Settings are the original's (github.com/TimDettmers/sparse_learning, imagenet): batches of 256, 100 epochs, learning rate 0.1, x0.1 after 30,
60 and 90 epochs, Nesterov momentum 0.9, L2 1e-4, prune rate 0.2, mask updates after each epoch. `tuned`: learning rate 0.2 after a warm-up of
5 epochs, x0.1 after 30, 60 and 80, label smoothing 0.1, prune rate 0.5. `partially_dense` keeps the first convolution and those of the
shortcuts dense.

Published there, not reproduced here, top-1 accuracy: fully sparse 72.33% at a density of 0.156, dense 74.9%; partially dense 72.4% at 10%
and 74.2% at 20%; tuned, fully sparse, 73.07, 74.91 and 75.92% at 10, 20 and 30%, dense 77.0%.

Cost: 500,400 steps, 3.0e18 operations for the dense network, for several accelerators; not run here.
"""

from sparse_jax import config as config_lib

VARIANTS = ('partially_dense', 'tuned')
_EPOCH = 1_281_167 // 256


def get_config(variant: str = '') -> config_lib.Config:
    if variant not in ('', *VARIANTS):
        raise ValueError(f'the variant {variant!r} does not exist: give none, or one of {", ".join(VARIANTS)}.')
    config = config_lib.Config()
    config.model.name, config.model.dtype = 'resnet50', 'bfloat16'
    config.data.name, config.data.dir, config.data.size, config.data.validation = 'folder', 'data/imagenet', 224, 0.0
    config.data.batch_size, config.data.eval_batch_size = 256, 256
    config.train.epochs = 100
    config.optimizer.learning_rate, config.optimizer.weight_decay = 0.1, 1e-4
    decays = (30, 60, 90)
    config.sparsity.density, config.sparsity.prune_rate = 0.1, 0.2
    if variant == 'tuned':
        config.optimizer.learning_rate, config.optimizer.warmup_steps = 0.2, 5 * _EPOCH
        config.train.label_smoothing, config.sparsity.prune_rate = 0.1, 0.5
        decays = (30, 60, 80)
    if variant == 'partially_dense':
        config.sparsity.dense = 'conv/*,*downsample/*'
    config.optimizer.decay_at = ','.join(str(epoch * _EPOCH) for epoch in decays)
    config.checkpoint.every, config.log.every = 1000, 100
    return config
