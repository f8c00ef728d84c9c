"""Networks, data and callbacks as a user writes them, for the settings that name them."""

import numpy as np
from flax import linen, nnx

import sparse_jax.data

SEEN = []


class Net(nnx.Module):
    def __init__(self, input_shape, num_outputs, width=8, *, rngs: nnx.Rngs):
        height, columns, channels = input_shape
        self.convs = nnx.List(
            [nnx.Conv(channels, width, (3, 3), strides=2, rngs=rngs), nnx.Conv(width, width, (3, 3), strides=2, rngs=rngs)]
        )
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(width * -(-height // 4) * -(-columns // 4), num_outputs, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(conv(x))
        x = self.drop(self.norm(x))
        return self.out(x.reshape(len(x), -1))


class Dense(linen.Module):
    num_outputs: int
    width: int = 16

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.relu(linen.Dense(self.width)(x.reshape(len(x), -1)))
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(0.2, deterministic=not train)(x)
        return linen.Dense(self.num_outputs)(x)


class Tokens(nnx.Module):
    def __init__(self, num_outputs, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(num_outputs, 16, rngs=rngs)
        self.out = nnx.Linear(16, num_outputs, rngs=rngs)

    def __call__(self, x):
        return self.out(self.embed(x))


class SevenClasses(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.out = nnx.Linear(784, 7, rngs=rngs)

    def __call__(self, x):
        return self.out(x.reshape(len(x), -1))


class NoRngs(nnx.Module):
    def __init__(self, width=3):
        self.width = width


class Needy(nnx.Module):
    def __init__(self, width, *, rngs: nnx.Rngs):
        self.out = nnx.Linear(width, width, rngs=rngs)


class Fails(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.out = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        raise KeyError('no such layer')


def arrays(seed=0, count=60, size=12):
    """Images whose brightest quarter is their class."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    images = random.integers(0, 100, (count, size, size, 3)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(label, 2)
        image[row * size // 2 :][: size // 2, column * size // 2 :][:, : size // 2] += 120
    return images, labels


def load(folder):
    assert folder == 'data/mnist'
    return arrays(0), arrays(1, 40)


def load_whole(folder):
    images, labels = arrays()
    split = sparse_jax.data.Split(images.astype(np.float32), labels.astype(np.int32))
    return sparse_jax.data.Dataset(split, split, split, 4, np.asarray)


def load_nothing(folder):
    return 3


def load_fails(folder):
    raise OSError('the server is away')


def callback(step, values):
    SEEN.append((step, values))


def wrong_callback(step):
    pass
