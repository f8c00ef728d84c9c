"""Data sets in memory, and their training batches as a random-access grain data set whose position is one integer."""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np

from sparse_jax.core import errors, references
from sparse_jax.data import augment as augment_lib
from sparse_jax.data import cifar, mnist, own, text

NAMES = ('mnist', 'mnist_offline', 'cifar10', 'cifar100', 'digits32', 'folder', 'npz', 'text', 'stdlib')
TEXT = ('text', 'stdlib')


class Split(NamedTuple):
    """The examples of one split: training, validation or test."""

    inputs: np.ndarray  # images [n, height, width, channels], or tokens [n, length]
    labels: np.ndarray  # classes [n], or the next tokens [n, length]


class Dataset(NamedTuple):
    """A data set in memory."""

    train: Split
    validation: Split  # may be empty
    test: Split  # may be empty
    num_outputs: int  # number of classes, or size of the vocabulary
    prepare: Callable[[np.ndarray], np.ndarray]  # turns inputs as they are stored into what a model takes
    augment: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None  # (inputs, random bits), training only, before `prepare`
    bytes_per_token: float | None = None  # average over the validation text; None for images
    fingerprint: str = ''  # checksum of data that the config does not identify; empty for those that are known

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example's input."""
        return self.train.inputs.shape[1:]


def _standardized(mean, std) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that computes (x / 255 - mean) / std for each channel with one product and one sum."""
    scale = (1 / (255 * np.array(std))).astype(np.float32)
    shift = (-np.array(mean) / np.array(std)).astype(np.float32)
    return lambda pixels: pixels * scale + shift


standardized_cifar = _standardized(cifar.MEAN, cifar.STD)


def _identity(inputs: np.ndarray) -> np.ndarray:
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
    size: int = 0,
    skip_unreadable: bool = False,
) -> Dataset:
    """Loads a data set by name.

    Args:
      name: one of ``NAMES``. ``digits32`` is the offline digits in CIFAR's shape; ``stdlib`` is the source code of Python's standard
        library. Or ``package.module:function``, which gets the folder, and gives a Dataset or ((x_train, y_train), (x_test, y_test)).
      folder: folder that holds the files, or that they are downloaded to; of ``npz`` the file.
      download: whether to download missing files.
      validation: fraction of the training examples, in [0, 1), that is held out for validation: the last examples, or for text a
        random choice of the files.
      augment: whether training images are cropped at random (and those of CIFAR mirrored). Only used by CIFAR and ``digits32``.
      pattern: glob pattern of the files below ``folder``. Only used by ``text``.
      tokenizer: JSON file of a tokenizer; if empty, tokens are bytes. Only used by ``text`` and ``stdlib``.
      length: number of tokens in a sequence. Only used by ``text`` and ``stdlib``.
      size: side of the images, to which they are scaled; 0: their own. Only used by ``folder``.
      skip_unreadable: whether images that cannot be read are left out. Only used by ``folder``.

    Returns:
      The data set in memory.

    Raises:
      ValueError: if the name is unknown, files are missing or damaged, or text is not UTF-8.
    """
    is_own = references.is_reference(name)
    if name not in NAMES and not is_own:
        raise errors.unknown('data.name', name, NAMES)
    if is_own or name in ('folder', 'npz'):
        made = own.from_function(name, folder) if is_own else own.from_npz(folder) if name == 'npz' else None
        made = own.from_folder(folder, size=size, skip_unreadable=skip_unreadable) if made is None else made
        return made if isinstance(made, Dataset) else _of_images(*made, validation=validation, augment=augment and name == 'folder')
    if name in TEXT:
        paths = text.find(folder, pattern) if name == 'text' else text.standard_library()
        corpus = text.load(paths, validation=validation, tokenizer=tokenizer)
        train, held_out = (
            Split(*text.pack(part.stream, length, purpose))
            for part, purpose in ((corpus.train, 'training'), (corpus.validation, 'validation'))
        )
        return Dataset(
            train=train,
            validation=held_out,
            test=Split(held_out.inputs[:0], held_out.labels[:0]),
            num_outputs=corpus.num_tokens,
            prepare=_tokens,
            bytes_per_token=corpus.validation.num_bytes / len(corpus.validation.stream),
            fingerprint=f'{zlib.crc32(corpus.validation.stream.data, zlib.crc32(corpus.train.stream.data)):08x}',
        )
    augmentation, prepare, num_outputs = None, _identity, 10
    if name == 'mnist':
        if download:
            mnist.download(folder)
        train, test = mnist.load(folder)
    elif name == 'mnist_offline':
        train, test = mnist.load_offline()
    elif name == 'digits32':
        train, test = cifar.digits()
        prepare = _standardized((mnist.MEAN,) * 3, (mnist.STD,) * 3)
        augmentation = functools.partial(augment_lib.crop_and_flip, flip=False)  # a mirrored digit is no digit
    else:
        if download:
            cifar.download(name, folder)
        train, test = cifar.load(name, folder)
        prepare, num_outputs, augmentation = standardized_cifar, cifar.CLASSES[name], augment_lib.crop_and_flip
    return _split(train, test, validation, num_outputs, prepare, augmentation if augment else None)


def _of_images(train: own.Pair, test: own.Pair, *, validation: float, augment: bool) -> Dataset:
    """Images that no setting identifies: standardized where they are of bytes, and with their checksum."""
    prepare = _standardized(*own.statistics(train[0])) if train[0].dtype == np.uint8 else _identity
    fingerprint = functools.reduce(lambda crc, x: zlib.crc32(np.ascontiguousarray(x).data, crc), (*train, *test), 0)
    made = _split(train, test, validation, int(train[1].max()) + 1, prepare, augment_lib.crop_and_flip if augment else None)
    return made._replace(fingerprint=f'{fingerprint:08x}')


def _split(
    train: own.Pair, test: own.Pair, validation: float, num_outputs: int, prepare: Callable, augment: Callable | None
) -> Dataset:
    inputs, labels = train
    num_train = len(labels) - round(validation * len(labels))
    return Dataset(
        train=Split(inputs[:num_train], labels[:num_train]),
        validation=Split(inputs[num_train:], labels[num_train:]),
        test=Split(*test),
        num_outputs=num_outputs,
        prepare=prepare,
        augment=augment,
    )


class Shapes(NamedTuple):
    """What decides a network's program."""

    num_train: int  # before any are held out
    input_shape: tuple[int, ...]
    num_outputs: int


_SHAPES = {
    'mnist': Shapes(60_000, (28, 28, 1), 10),
    'mnist_offline': Shapes(4000, (28, 28, 1), 10),
    'cifar10': Shapes(50_000, (32, 32, 3), 10),
    'cifar100': Shapes(50_000, (32, 32, 3), 100),
    'digits32': Shapes(4000, (32, 32, 3), 10),
}


def known_shapes(name: str) -> Shapes | None:
    """The shapes of a data set that its name tells; None where its files do.

    >>> known_shapes('cifar100').num_outputs, known_shapes('text')
    (100, None)
    """
    return _SHAPES.get(name)


def batches(
    data: Dataset, *, batch_size: int, seed: int, num_batches: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """Makes shuffled training batches that are addressed by number: batch n depends only on the seed and n.

    Each epoch visits the examples in a new order and drops those that do not fill a batch. One element is a whole batch: grain
    spends about 10 microseconds on an element, and with one example per element that would exceed the time of a LeNet's step.

    Args:
      data: data set to draw from.
      batch_size: number of examples in a batch over all processes; at most the number of training examples.
      seed: seed of the order and of the augmentation.
      num_batches: number of batches in the result, usually the number of training steps.
      process_index: index of this process.
      process_count: number of processes, a divisor of ``batch_size``. Each process gets one contiguous part of every batch.

    Returns:
      A grain data set of dictionaries with the keys ``input`` and ``label``.

    Raises:
      ValueError: if ``batch_size`` exceeds the number of training examples or is not a multiple of ``process_count``.

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
    """Iterates over the batches from a position on and prepares some of them ahead of time in a thread.

    Args:
      data: data set from :func:`batches`.
      start: number of batches already drawn.
      prefetch: number of batches to prepare ahead of time; 0 uses no thread.

    Returns:
      An iterator over batches.
    """
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(data[start:].to_iter_dataset(options))
