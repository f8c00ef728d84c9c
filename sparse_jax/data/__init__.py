"""Data sets as arrays, and their batches as a random-access grain data set whose position is one integer."""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np

from sparse_jax.core import errors
from sparse_jax.data import augment as augment_lib
from sparse_jax.data import cifar, mnist, text

NAMES = ('mnist', 'mnist_offline', 'cifar10', 'cifar100', 'digits32', 'text', 'stdlib')
TEXT = ('text', 'stdlib')


class Split(NamedTuple):
    """Examples of one purpose."""

    inputs: np.ndarray  # images [n, height, width, channels], or tokens [n, length]
    labels: np.ndarray  # [n], or the next tokens [n, length]


class Dataset(NamedTuple):
    """A data set in memory."""

    train: Split
    validation: Split  # may be empty
    test: Split  # may be empty
    num_outputs: int  # classes, or tokens that exist
    prepare: Callable[[np.ndarray], np.ndarray]  # from an example's form in memory to what a model takes
    augment: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = (
        None  # (inputs, random bits): training inputs, before `prepare`
    )
    bytes_per_token: float | None = None  # of the validation text
    fingerprint: str = ''  # of a text, which no setting tells

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.train.inputs.shape[1:]


def _standardized(mean, std) -> Callable[[np.ndarray], np.ndarray]:
    """(x / 255 - mean) / std by channel, as one product and one sum."""
    scale = (1 / (255 * np.array(std))).astype(np.float32)
    shift = (-np.array(mean) / np.array(std)).astype(np.float32)
    return lambda pixels: pixels * scale + shift


standardized_cifar = _standardized(cifar.MEAN, cifar.STD)


def _as_they_are(inputs: np.ndarray) -> np.ndarray:
    return inputs


def _tokens(inputs: np.ndarray) -> np.ndarray:
    return inputs.astype(np.int32)


def load(
    name: str,
    folder: str = '',
    *,
    download: bool = False,
    validation: float = 0.0,
    augment: bool = True,
    pattern: str = '**/*.txt',
    tokenizer: str = '',
    length: int = 256,
) -> Dataset:
    """A data set by name.

    Args:
      name: one of ``NAMES``: digits32 are the offline digits in CIFAR's shape, stdlib the sources of Python's standard library.
      folder: where its files are, or are downloaded to.
      download: whether to fetch missing files.
      validation: part of the training examples, the last ones, that is set apart, in [0, 1); of text, part of the files.
      augment: CIFAR and digits32: whether training images are cropped (and CIFAR's mirrored) at random.
      pattern: text: which files below the folder.
      tokenizer: text: JSON file of a tokenizer; empty: bytes.
      length: text: tokens of a sequence.

    Returns:
      The data set.

    Raises:
      ValueError: if the name is unknown, files are missing or damaged, or text is not UTF-8.
    """
    if name not in NAMES:
        raise errors.unknown('data.name', name, NAMES)
    if name in TEXT:
        paths = text.find(folder, pattern) if name == 'text' else text.standard_library()
        corpus = text.load(paths, validation=validation, tokenizer=tokenizer)
        train, held_out = (
            Split(*text.pack(part.stream, length, purpose))
            for part, purpose in ((corpus.train, 'training'), (corpus.validation, 'validation'))
        )
        none = Split(held_out.inputs[:0], held_out.labels[:0])
        per_token = corpus.validation.num_bytes / len(corpus.validation.stream)
        fingerprint = f'{zlib.crc32(corpus.validation.stream.data, zlib.crc32(corpus.train.stream.data)):08x}'
        return Dataset(train, held_out, none, corpus.num_tokens, _tokens, None, per_token, fingerprint)
    change, prepare, num_outputs = None, _as_they_are, 10
    if name == 'mnist':
        if download:
            mnist.download(folder)
        train, test = mnist.load(folder)
    elif name == 'mnist_offline':
        train, test = mnist.load_offline()
    elif name == 'digits32':
        train, test = cifar.digits()
        prepare = _standardized((mnist.MEAN,) * 3, (mnist.STD,) * 3)
        change = functools.partial(augment_lib.crop_and_flip, flip=False)  # a mirrored digit is another sign
    else:
        if download:
            cifar.download(name, folder)
        train, test = cifar.load(name, folder)
        prepare, num_outputs, change = standardized_cifar, cifar.CLASSES[name], augment_lib.crop_and_flip
    inputs, labels = train
    kept = len(labels) - round(validation * len(labels))
    parts = Split(inputs[:kept], labels[:kept]), Split(inputs[kept:], labels[kept:]), Split(*test)
    return Dataset(*parts, num_outputs, prepare, change if augment else None)


def batches(
    data: Dataset, *, batch_size: int, seed: int, num_batches: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """Shuffled training batches by number: the n-th batch is a function of the seed and n alone.

    Each epoch goes through the examples in a new order and leaves out those that do not fill a batch. An element is a whole batch:
    grain spends about 10 microseconds on an element, which at one example each would take longer than a LeNet's step.

    Args:
      data: the data set.
      batch_size: examples a step, of all processes together; at most as many as there are.
      seed: of the order and of the augmentation.
      num_batches: length of the data set; the training's steps.
      process_index: of this process.
      process_count: each process gets its own part of every batch, one after the other; divides the batch size.

    Returns:
      A grain data set of dictionaries ``input`` and ``label``.

    Raises:
      ValueError: if a batch is larger than the data, or cannot be divided.

    Example:
      >>> split = Split(np.zeros((10, 2, 2, 1), np.float32), np.arange(10, dtype=np.int32))
      >>> data = batches(Dataset(split, split, split, 10, np.array), batch_size=5, seed=0, num_batches=4)
      >>> len(data), sorted(np.concatenate([data[2]['label'], data[3]['label']]).tolist())
      (4, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    count = len(data.train.labels)
    per_epoch = count // batch_size
    if per_epoch == 0:
        raise ValueError(f'data.batch_size={batch_size} is more than the {count} training examples.')
    if batch_size % process_count:
        raise ValueError(f'data.batch_size={batch_size} must be a multiple of the {process_count} processes.')
    part = batch_size // process_count

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def batch(number: int) -> dict[str, np.ndarray]:
        epoch, position = divmod(int(number), per_epoch)
        start = position * batch_size + process_index * part
        index = order(epoch)[start : start + part]
        inputs = data.train.inputs[index]
        if data.augment is not None:
            inputs = data.augment(inputs, augment_lib.random_bits(seed, epoch, index))
        return {'input': data.prepare(inputs), 'label': data.train.labels[index].astype(np.int32, copy=False)}

    return grain.MapDataset.range(num_batches).map(batch)


def stream(data: grain.MapDataset, start: int, prefetch: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches from a position on, some made ahead in a thread.

    Args:
      data: from :func:`batches`.
      start: batches drawn so far.
      prefetch: how many are made ahead; 0: none, and no thread.

    Returns:
      An iterator.
    """
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(data[start:].to_iter_dataset(options))
