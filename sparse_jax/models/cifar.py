"""The CIFAR networks of the paper: AlexNet and VGG in SNIP's variants, and wide residual networks.

Shapes, paddings and starting values are those of github.com/TimDettmers/sparse_learning (sparselearning/models.py), which
follows SNIP.

References: Krizhevsky et al., ImageNet classification with deep convolutional neural networks, 2012; Simonyan and Zisserman, Very
deep convolutional networks, 2015; Zagoruyko and Komodakis, Wide residual networks, 2016; Lee et al., SNIP, 2019.
"""

import jax
from flax import nnx

from sparse_jax.models import layers
from sparse_jax.models.layers import BatchNorm, Conv, Linear, Network, flatten, max_pool, pattern_at, relu


class AlexNet(Network):
    """Five convolutions with stride 2 and no pooling, three linear layers, batch normalisation: s has 1,024 hidden units, b 2,048."""

    takes_lanes = True

    def __init__(self, input_shape: tuple[int, int, int], num_outputs: int, *, hidden: int, rngs: nnx.Rngs):
        _check_cifar(input_shape, 'alexnet')
        features = input_shape[-1]
        for i, (width, size, pad) in enumerate(((96, 11, 2), (256, 5, 2), (384, 3, 1), (384, 3, 1), (256, 3, 1)), 1):
            padding = ((pad, pad), (pad, pad))
            setattr(self, f'conv{i}', Conv(features, width, (size, size), strides=(2, 2), padding=padding, rngs=rngs))
            setattr(self, f'norm{i}', BatchNorm(width))
            features = width
        for i, width in enumerate((hidden, hidden), 1):
            setattr(self, f'fc{i}', Linear(features, width, rngs=rngs))
            setattr(self, f'fc_norm{i}', BatchNorm(width))
            features = width
        self.fc3 = Linear(features, num_outputs, rngs=rngs)

    def __call__(self, x, *, train: bool, rng=None, patterns=None):
        for i in range(1, 6):
            x = getattr(self, f'conv{i}')(x, pattern_at(patterns, f'conv{i}', 'kernel'))
            x = relu(getattr(self, f'norm{i}')(x, train=train))
        x = flatten(x)
        for i in (1, 2):
            x = getattr(self, f'fc{i}')(x, pattern_at(patterns, f'fc{i}', 'kernel'))
            x = relu(getattr(self, f'fc_norm{i}')(x, train=train))
        return self.fc3(x, pattern_at(patterns, 'fc3', 'kernel'), out_dtype='float32')


_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(Network):
    """VGG-16 with batch normalisation in place of dropout and linear layers of 512; variant c, d or like.

    C has 1x1 kernels in the last convolution of the last three stages, padded by a pixel as in the original, so that its image grows by
    two pixels there; D has 3x3 kernels throughout; like is D with one hidden linear layer less.
    """

    takes_lanes = True

    def __init__(self, input_shape: tuple[int, int, int], num_outputs: int, *, variant: str, rngs: nnx.Rngs):
        _check_cifar(input_shape, f'vgg_{variant}')
        features, side = input_shape[-1], input_shape[0]
        self.stages = [len(widths) for widths in _VGG_WIDTHS]
        for stage, widths in enumerate(_VGG_WIDTHS, 1):
            for i, width in enumerate(widths, 1):
                size = 1 if variant == 'c' and i == 3 else 3
                padding = ((1, 1), (1, 1))
                setattr(self, f'conv{stage}_{i}', Conv(features, width, (size, size), padding=padding, rngs=rngs))
                setattr(self, f'norm{stage}_{i}', BatchNorm(width))
                features = width
                side += 3 - size
            side //= 2
        features *= side * side
        self.hidden = 1 if variant == 'like' else 2
        for i in range(1, self.hidden + 1):
            setattr(self, f'fc{i}', Linear(features, 512, rngs=rngs))
            setattr(self, f'fc_norm{i}', BatchNorm(512))
            features = 512
        self.out = Linear(features, num_outputs, rngs=rngs)

    def __call__(self, x, *, train: bool, rng=None, patterns=None):
        for stage, depth in enumerate(self.stages, 1):
            for i in range(1, depth + 1):
                x = getattr(self, f'conv{stage}_{i}')(x, pattern_at(patterns, f'conv{stage}_{i}', 'kernel'))
                x = relu(getattr(self, f'norm{stage}_{i}')(x, train=train))
            x = max_pool(x, (2, 2))
        x = flatten(x)
        for i in range(1, self.hidden + 1):
            x = relu(getattr(self, f'fc{i}')(x, pattern_at(patterns, f'fc{i}', 'kernel')))
            x = getattr(self, f'fc_norm{i}')(x, train=train)
        return self.out(x, pattern_at(patterns, 'out', 'kernel'), out_dtype='float32')


class _WideBlock(nnx.Module):
    """Pre-activation residual block: two 3x3 convolutions with dropout in between, and a 1x1 shortcut where the width changes."""

    def __init__(self, features: int, width: int, stride: int, *, dropout: float, rngs: nnx.Rngs):
        conv = lambda f, k, s: Conv(
            f, width, (k, k), strides=(s, s), padding=_SAME[k], use_bias=False, init=layers.he_fan_out, rngs=rngs
        )
        self.norm1 = BatchNorm(features)
        self.conv1 = conv(features, 3, stride)
        self.norm2 = BatchNorm(width)
        self.conv2 = conv(width, 3, 1)
        self.widens = features != width
        if self.widens:
            self.shortcut = conv(features, 1, stride)
        self.dropout = dropout

    def __call__(self, x, *, train: bool, rng=None, patterns=None):
        y = relu(self.norm1(x, train=train))
        residual = self.shortcut(y, pattern_at(patterns, 'shortcut', 'kernel')) if self.widens else x
        y = self.conv1(y, pattern_at(patterns, 'conv1', 'kernel'))
        y = relu(self.norm2(y, train=train))
        y = layers.dropout(y, self.dropout, rng, train=train)
        return self.conv2(y, pattern_at(patterns, 'conv2', 'kernel'), residual=residual)


_SAME = {3: ((1, 1), (1, 1)), 1: ((0, 0), (0, 0))}  # PyTorch's padding: with stride 2 'SAME' would pad the other side


class WideResNet(Network):
    """WRN-depth-width: a 3x3 convolution, three stages of (depth - 4) / 6 blocks, global average, a linear layer."""

    takes_lanes = True

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_outputs: int,
        *,
        depth: int,
        width: int,
        dropout: float = 0.3,
        rngs: nnx.Rngs,
    ):
        _check_cifar(input_shape, f'wrn_{depth}_{width}')
        self.conv = Conv(input_shape[-1], 16, (3, 3), padding=_SAME[3], use_bias=False, init=layers.he_fan_out, rngs=rngs)
        features, self.blocks = 16, (depth - 4) // 6
        for stage in (1, 2, 3):
            for i in range(1, self.blocks + 1):
                stride = 2 if stage > 1 and i == 1 else 1
                block = _WideBlock(features, 16 * width * 2 ** (stage - 1), stride, dropout=dropout, rngs=rngs)
                setattr(self, f'block{stage}_{i}', block)
                features = 16 * width * 2 ** (stage - 1)
        self.norm = BatchNorm(features)
        self.fc = Linear(features, num_outputs, rngs=rngs)

    def __call__(self, x, *, train: bool, rng=None, patterns=None):
        x = self.conv(x, pattern_at(patterns, 'conv', 'kernel'))
        for stage in (1, 2, 3):
            for i in range(1, self.blocks + 1):
                name = f'block{stage}_{i}'
                key = None if rng is None else jax.random.fold_in(rng, 1000 * stage + i)
                x = getattr(self, name)(x, train=train, rng=key, patterns=pattern_at(patterns, name))
        x = relu(self.norm(x, train=train))
        return self.fc(layers.average(x), pattern_at(patterns, 'fc', 'kernel'), out_dtype='float32')


def _check_cifar(input_shape, name: str) -> None:
    if len(input_shape) != 3 or tuple(input_shape[:2]) != (32, 32):
        raise ValueError(
            f'model.name={name!r} takes images of 32x32 pixels, got {tuple(input_shape)}: choose other data, or lenet300.'
        )
