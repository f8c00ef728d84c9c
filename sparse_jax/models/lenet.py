"""LeNet-300-100 and LeNet-5 as in the paper's MNIST experiments.

Reference: LeCun et al., Gradient-based learning applied to document recognition, 1998; LeNet-5 in Caffe's variant.
"""

import jax
from flax import nnx

from sparse_jax.models.layers import Conv, Linear, Network, max_pool, pattern_at


class LeNet300(Network):
    """784-300-100-classes, ReLU: 266,610 parameters with 10 classes."""

    def __init__(self, input_shape: tuple[int, int, int], num_outputs: int, *, rngs: nnx.Rngs):
        height, width, channels = input_shape
        self.fc1 = Linear(height * width * channels, 300, rngs=rngs)
        self.fc2 = Linear(300, 100, rngs=rngs)
        self.fc3 = Linear(100, num_outputs, rngs=rngs)

    def __call__(self, x, *, train: bool, rng=None, patterns=None):
        x = x.reshape(len(x), -1)
        for name in ('fc1', 'fc2'):
            x = jax.nn.relu(getattr(self, name)(x, pattern_at(patterns, name, 'kernel')))
        return self.fc3(x, pattern_at(patterns, 'fc3', 'kernel'), out_dtype='float32')


class LeNet5(Network):
    """20@5x5, pool, 50@5x5, pool, 500, classes: 431,080 parameters with 28x28x1 images and 10 classes."""

    def __init__(self, input_shape: tuple[int, int, int], num_outputs: int, *, rngs: nnx.Rngs):
        height, width, channels = input_shape
        if height % 4 or width % 4 or min(height, width) < 16:
            raise ValueError(f'lenet5 needs images whose sides are multiples of 4 and at least 16, got {height}x{width}.')
        self.conv1 = Conv(channels, 20, (5, 5), padding='VALID', rngs=rngs)
        self.conv2 = Conv(20, 50, (5, 5), padding='VALID', rngs=rngs)
        pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
        self.fc1 = Linear(pixels * 50, 500, rngs=rngs)
        self.fc2 = Linear(500, num_outputs, rngs=rngs)

    def __call__(self, x, *, train: bool, rng=None, patterns=None):
        for name in ('conv1', 'conv2'):
            x = max_pool(getattr(self, name)(x, pattern_at(patterns, name, 'kernel')), (2, 2))
            x = jax.nn.relu(x)  # after the pooling: the same values from a quarter of the work
        x = x.reshape(len(x), -1)
        x = jax.nn.relu(self.fc1(x, pattern_at(patterns, 'fc1', 'kernel')))
        return self.fc2(x, pattern_at(patterns, 'fc2', 'kernel'), out_dtype='float32')
