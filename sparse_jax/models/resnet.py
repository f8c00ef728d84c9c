"""ResNet-50 v1.5 for images of any size, usually 224x224: 25,557,032 parameters with 1,000 classes.

Version 1.5 halves the image in the 3x3 convolution of a stage's first block, version 1 in the 1x1 before it. Starting values are those of
torchvision: normal of variance 2 / fan-out for convolutions.

Reference: He et al., Deep residual learning for image recognition, 2016.
"""

from typing import Any

from flax import nnx

from sparse_jax.models import layers
from sparse_jax.models.layers import BatchNorm, Conv, Linear, Network, pattern_at, relu

_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width of the bottleneck, and blocks
_EXPANSION = 4


class _Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, each normalised; a 1x1 `downsample` on the shortcut where shapes differ."""

    def __init__(self, features: int, width: int, stride: int, *, rngs: nnx.Rngs):
        outputs = _EXPANSION * width
        sizes = ((features, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1))
        for i, (inputs, channels, size, step) in enumerate(sizes, 1):
            setattr(self, f'conv{i}', _conv(inputs, channels, size, step, rngs))
            setattr(self, f'norm{i}', BatchNorm(channels))
        self.has_downsample = stride > 1 or features != outputs
        if self.has_downsample:
            self.downsample = _conv(features, outputs, 1, stride, rngs)
            self.downsample_norm = BatchNorm(outputs)

    def __call__(self, x, *, train: bool, patterns=None):
        y = x
        for i in (1, 2, 3):
            y = getattr(self, f'conv{i}')(y, pattern_at(patterns, f'conv{i}', 'kernel'))
            y = getattr(self, f'norm{i}')(y, train=train)
            y = relu(y) if i < 3 else y
        if self.has_downsample:
            x = self.downsample_norm(self.downsample(x, pattern_at(patterns, 'downsample', 'kernel')), train=train)
        return relu(x + y)


def _conv(inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs) -> Conv:
    padding = ((size // 2, size // 2),) * 2  # PyTorch's: with stride 2 'SAME' would pad the other side
    return Conv(
        inputs, outputs, (size, size), strides=(stride, stride), padding=padding, use_bias=False, init=layers.he_fan_out, rngs=rngs
    )


class ResNet50(Network):
    """A 7x7 convolution and a pooling, both of stride 2, 16 bottleneck blocks in four stages, the global average, a linear layer."""

    def __init__(self, input_shape: tuple[int, int, int], num_outputs: int, *, rngs: nnx.Rngs):
        if min(input_shape[:2]) < 32:
            raise ValueError(
                f"model.name='resnet50' halves images five times, got {tuple(input_shape)}: choose data of at least 32x32 pixels, or config.data.size."
            )
        self.conv = _conv(input_shape[-1], 64, 7, 2, rngs)
        self.norm = BatchNorm(64)
        features = 64
        for stage, (width, blocks) in enumerate(_STAGES, 1):
            for i in range(1, blocks + 1):
                stride = 2 if stage > 1 and i == 1 else 1
                setattr(self, f'block{stage}_{i}', _Bottleneck(features, width, stride, rngs=rngs))
                features = _EXPANSION * width
        self.fc = Linear(features, num_outputs, rngs=rngs)

    def __call__(self, x, *, train: bool, rng=None, patterns=None):
        del rng
        x = self.conv(x, pattern_at(patterns, 'conv', 'kernel'))
        padding: Any = ((1, 1), (1, 1))  # which flax takes, and whose type it does not say
        x = nnx.max_pool(relu(self.norm(x, train=train)), (3, 3), (2, 2), padding)
        for stage, (_, blocks) in enumerate(_STAGES, 1):
            for i in range(1, blocks + 1):
                name = f'block{stage}_{i}'
                x = getattr(self, name)(x, train=train, patterns=pattern_at(patterns, name))
        return self.fc(layers.average(x), pattern_at(patterns, 'fc', 'kernel'), out_dtype='float32')
