"""Data sets as arrays, and their batches as a random-access grain data set whose position is one integer."""

import functools
from typing import NamedTuple

import grain
import numpy as np

from sparse_jax import _names
from sparse_jax.data import mnist

NAMES = ('mnist', 'mnist_offline')


class Split(NamedTuple):
    """Examples of one purpose."""

    images: np.ndarray  # float32[n, height, width, channels]
    labels: np.ndarray  # int32[n]


class Dataset(NamedTuple):
    """A data set in memory."""

    train: Split
    validation: Split  # may be empty
    test: Split
    num_classes: int


def load(name: str, folder: str, *, download: bool = False, validation: float = 0.0) -> Dataset:
    """A data set by name.

    Args:
      name: one of ``NAMES``.
      folder: where its files are, or are downloaded to.
      download: whether to fetch missing files.
      validation: part of the training examples, the last ones, that is set apart, in [0, 1).

    Returns:
      The data set.

    Raises:
      ValueError: if the name is unknown, or files are missing or damaged.
    """
    if name == 'mnist':
        if download:
            mnist.download(folder)
        train, test = mnist.load(folder)
    elif name == 'mnist_offline':
        train, test = mnist.load_offline()
    else:
        raise _names.unknown('data.name', name, NAMES)
    images, labels = train
    held_out = round(validation * len(labels))
    kept = len(labels) - held_out
    return Dataset(Split(images[:kept], labels[:kept]), Split(images[kept:], labels[kept:]), Split(*test), num_classes=10)


def batches(split: Split, *, batch_size: int, seed: int, num_batches: int) -> grain.MapDataset:
    """Shuffled batches by number: the n-th batch is a function of the seed and n alone.

    Each epoch goes through the examples in a new order and leaves out those that do not fill a batch. An element is a whole batch:
    grain spends about 10 microseconds on an element, which at one example each would take longer than a LeNet's step.

    Args:
      split: the examples.
      batch_size: examples a batch, at most as many as there are.
      seed: of the order.
      num_batches: length of the data set; the training's steps.

    Returns:
      A grain data set of dictionaries ``image`` (float32[batch, ...]) and ``label`` (int32[batch]).

    Raises:
      ValueError: if a batch is larger than the split.

    Example:
      >>> split = Split(np.zeros((10, 2, 2, 1), np.float32), np.arange(10, dtype=np.int32))
      >>> data = batches(split, batch_size=5, seed=0, num_batches=4)
      >>> len(data), sorted(np.concatenate([data[2]['label'], data[3]['label']]).tolist())
      (4, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    per_epoch = len(split.labels) // batch_size
    if per_epoch == 0:
        raise ValueError(f'data.batch_size={batch_size} is more than the {len(split.labels)} training examples.')

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(split.labels))

    def batch(number: int) -> dict[str, np.ndarray]:
        epoch, position = divmod(int(number), per_epoch)
        index = order(epoch)[position * batch_size : (position + 1) * batch_size]
        return {'image': split.images[index], 'label': split.labels[index]}

    return grain.MapDataset.range(num_batches).map(batch)
