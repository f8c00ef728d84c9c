"""Data sets of the user's: images in folders of their classes, arrays in an .npz file, or what a function gives."""

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_jax.core import errors, references

_LOG = logging.getLogger('sparse_jax')
_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.gif', '.webp', '.tif', '.tiff')
_ARRAYS = ('x_train', 'y_train', 'x_test', 'y_test')

Pair = tuple[np.ndarray, np.ndarray]  # inputs and labels


def from_folder(folder: str, *, size: int, skip_unreadable: bool) -> tuple[Pair, Pair]:
    """Images in a folder for each class: ``train/CLASS/*`` and ``test/CLASS/*``, or ``CLASS/*``, of which every tenth is for testing.

    Args:
      folder: with these folders. Classes are numbered in the order of their names.
      size: side in pixels to which each image is scaled, after its middle square is cut out; 0: all are of one size, and stay so.
      skip_unreadable: whether images that cannot be read are left out, with a warning each; else they are an error.

    Returns:
      Training and test images, uint8[n, height, width, 3], and their classes, int32[n].

    Raises:
      ValueError: for a folder without classes or images, an image that cannot be read, or images of several sizes.
    """
    root = pathlib.Path(folder)
    parts = [root / name for name in ('train', 'test')]
    if (root / 'train').is_dir() != (root / 'test').is_dir():
        raise ValueError(
            f'config.data.dir={folder!r} has one of the folders train and test: give both, or folders of classes only.'
        )
    is_split = parts[0].is_dir()
    names = sorted(path.name for path in (parts[0] if is_split else root).iterdir() if path.is_dir()) if root.is_dir() else []
    if len(names) < 2:
        raise ValueError(
            f'config.data.dir={folder!r} must have a folder of images for each class, at least two, got {names or "none"}.'
        )
    if is_split and (other := sorted({path.name for path in parts[1].iterdir() if path.is_dir()} - set(names))):
        raise ValueError(f'config.data.dir={folder!r}: test has the classes {", ".join(other)}, which train has not.')
    found = [[_images(part / name, size, skip_unreadable) for name in names] for part in (parts if is_split else [root])]
    if not is_split:
        tests = [[image for i, image in enumerate(images) if i % 10 == 9] for images in found[0]]
        found = [[[image for i, image in enumerate(images) if i % 10 != 9] for images in found[0]], tests]
    sizes = {image.shape for part in found for images in part for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f'config.data.dir={folder!r} has images of {len(sizes)} sizes, such as {" and ".join(f"{h}x{w}" for h, w, _ in sorted(sizes)[:2])}: '
            'give config.data.size, to which they are scaled.'
        )
    pairs = []
    for part, what in zip(found, ('training', 'test'), strict=True):
        if not any(part):
            raise ValueError(f'config.data.dir={folder!r} has no images for {what} ({", ".join(_SUFFIXES)}).')
        labels = np.concatenate([np.full(len(images), i, np.int32) for i, images in enumerate(part)])
        pairs.append((np.stack([image for images in part for image in images]), labels))
    order = np.random.default_rng(0).permutation(len(pairs[0][1]))  # the last ones are held out for validation
    return (pairs[0][0][order], pairs[0][1][order]), pairs[1]


def _images(folder: pathlib.Path, size: int, skip_unreadable: bool) -> list[np.ndarray]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError("config.data.name='folder' needs Pillow: pip install 'sparse_jax[images]'.") from error
    images = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() not in _SUFFIXES:
            continue
        try:
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened).convert('RGB')
        except Exception as error:  # whatever a damaged file makes of a decoder
            reason = f'{path} cannot be read as an image ({type(error).__name__}: {error})'
            if not skip_unreadable:
                raise ValueError(f'{reason}: mend or remove it, or give config.data.skip_unreadable=True.') from error
            _LOG.warning('%s: it is left out.', reason)
            continue
        if size:
            image = ImageOps.fit(image, (size, size))
        images.append(np.asarray(image))
    return images


def from_npz(path: str) -> tuple[Pair, Pair]:
    """Arrays x_train, y_train, x_test and y_test of an .npz file: images [n, height, width] or [n, height, width, channels], and classes [n].

    Raises:
      ValueError: where it cannot be read, or an array is missing or of another form.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            if missing := [name for name in _ARRAYS if name not in stored]:
                raise ValueError(f'config.data.dir={path!r} has no {", ".join(missing)}: it has {", ".join(stored) or "nothing"}.')
            arrays = {name: stored[name] for name in _ARRAYS}
    except FileNotFoundError as error:
        raise ValueError(f'config.data.dir={path!r} is not there: give the path of an .npz file.') from error
    except (OSError, ValueError, EOFError) as error:
        if str(error).startswith('config.'):
            raise
        raise ValueError(f'config.data.dir={path!r} cannot be read as an .npz file ({error}).') from error
    return checked(f'config.data.dir={path!r}', *((arrays[f'x_{part}'], arrays[f'y_{part}']) for part in ('train', 'test')))


def from_function(name: str, folder: str) -> Any:
    """What ``package.module:load`` gives, called with the folder: a ``sparse_jax.data.Dataset``, or ((x_train, y_train), (x_test, y_test)).

    Raises:
      ValueError: where it cannot be imported, fails, or gives something else.
    """
    function: Callable = references.load('config.data.name', name)
    errors.check_takes(f'config.data.name={name!r}', function, '(folder)')
    try:
        made = function(folder)
    except Exception as error:  # of the user's own code
        raise ValueError(f'config.data.name={name!r} fails ({type(error).__name__}: {" ".join(str(error).split())}).') from error
    if hasattr(made, 'train') and hasattr(made, 'num_outputs'):
        return made
    try:
        train, test = ((np.asarray(inputs), np.asarray(labels)) for inputs, labels in made)
    except (TypeError, ValueError):
        raise ValueError(
            f'config.data.name={name!r} must give ((x_train, y_train), (x_test, y_test)) or a sparse_jax.data.Dataset, got {type(made).__name__}.'
        ) from None
    return checked(f'config.data.name={name!r}', train, test)


def checked(what: str, train: Pair, test: Pair) -> tuple[Pair, Pair]:
    """Images with channels and classes from 0 on; ValueError where they are none."""
    pairs = []
    for part, (inputs, labels) in (('train', train), ('test', test)):
        inputs = inputs[..., None] if inputs.ndim == 3 else inputs
        if inputs.ndim != 4 or not (inputs.dtype == np.uint8 or np.issubdtype(inputs.dtype, np.floating)):
            raise ValueError(
                f'{what}: x_{part} must be uint8 or float of [n, height, width, channels], got {inputs.dtype}{list(inputs.shape)}.'
            )
        if labels.shape != (len(inputs),) or not np.issubdtype(labels.dtype, np.integer) or (labels.size and labels.min() < 0):
            raise ValueError(
                f'{what}: y_{part} must be classes from 0 on, integers of [{len(inputs)}], got {labels.dtype}{list(labels.shape)}.'
            )
        pairs.append((inputs if inputs.dtype == np.uint8 else inputs.astype(np.float32), labels.astype(np.int32)))
    if not len(pairs[0][1]) or not len(pairs[1][1]):
        raise ValueError(f'{what}: there must be images for training and for testing.')
    if pairs[0][0].shape[1:] != pairs[1][0].shape[1:] or pairs[0][0].dtype != pairs[1][0].dtype:
        raise ValueError(
            f'{what}: x_train {pairs[0][0].shape[1:]} and x_test {pairs[1][0].shape[1:]} must be of one size and type.'
        )
    if pairs[1][1].max() > pairs[0][1].max():
        raise ValueError(f'{what}: y_test has class {pairs[1][1].max()}, y_train no more than {pairs[0][1].max()}.')
    return pairs[0], pairs[1]


def statistics(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of uint8 images, in units of 255; a constant channel has 1."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    mean = flat.mean(0, dtype=np.float64) / 255
    deviation = np.sqrt(np.maximum(np.square(flat, dtype=np.float64).mean(0) / 255**2 - mean**2, 0))
    return mean, np.where(deviation > 0, deviation, 1)
