"""Text as packed sequences of tokens, from any UTF-8 files or from the sources of Python's standard library, which need no download."""

import pathlib
import sysconfig
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sparse_jax.data import files as files_lib

END = 256  # the token after each file where tokens are bytes
_FILES_PER_BATCH = 64  # files passed to the tokenizer in one call


class Tokens(NamedTuple):
    """The tokens of some files in one row, with an end token after each file."""

    stream: np.ndarray  # uint16 or uint32[n]
    num_bytes: int  # size of the files


class Corpus(NamedTuple):
    """Text for training and for validation; no file is in both."""

    train: Tokens
    validation: Tokens
    num_tokens: int  # size of the vocabulary, end token included


def standard_library() -> list[pathlib.Path]:
    """Returns the sorted source files of the running Python's standard library, without tests; they depend on Python's version."""
    root = pathlib.Path(sysconfig.get_paths()['stdlib'])
    excluded = {'site-packages', 'dist-packages', 'test', 'tests', '__pycache__'}
    return sorted(path for path in root.rglob('*.py') if not excluded & set(path.relative_to(root).parts))


def find(folder: str, pattern: str) -> list[pathlib.Path]:
    """Finds the files below a folder that match a pattern.

    Args:
      folder: folder to search.
      pattern: glob pattern relative to the folder, such as ``**/*.txt``.

    Returns:
      Sorted paths.

    Raises:
      ValueError: if no file matches or the pattern is not valid.
    """
    try:
        paths = sorted(path for path in pathlib.Path(folder).glob(pattern) if path.is_file())
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f'data.pattern={pattern!r} is not a pattern below data.dir ({error}): give one such as **/*.txt.'
        ) from error
    if not paths:
        raise ValueError(
            f'data.dir={folder!r} has no file that matches data.pattern={pattern!r}: put UTF-8 text there, change data.pattern, or '
            "train on the Python standard library with data.name='stdlib'."
        )
    return paths


def split(paths: Sequence[pathlib.Path], validation: float) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Splits files at random, with a fixed seed, into training and validation files, at least one each.

    Args:
      paths: files to split.
      validation: fraction of the files to hold out for validation, in (0, 1).

    Returns:
      Training files and validation files.

    Raises:
      ValueError: if there are fewer than two files, or ``validation`` is 0.
    """
    if validation == 0:
        raise ValueError('data.validation=0.0: text is split by file, and needs a part to evaluate on: give for instance 0.02.')
    if len(paths) < 2:
        names = ', '.join(map(str, paths)) or 'none'
        raise ValueError(f'text is split by file and needs at least two of them, found {len(paths)} ({names}): split it in two.')
    order = np.random.default_rng(0).permutation(len(paths))
    count = min(max(round(validation * len(paths)), 1), len(paths) - 1)
    return [paths[i] for i in sorted(order[count:])], [paths[i] for i in sorted(order[:count])]


def read(path: pathlib.Path) -> bytes:
    """Reads a file's bytes; raises ValueError with file and offset if they are not UTF-8."""
    content = files_lib.read(path)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f'{path} is not UTF-8 at offset {error.start} ({error.reason}): convert it, or change data.pattern.'
        ) from error
    return content


def _byte_tokens(contents: Iterable[bytes]) -> Tokens:
    parts, total = [], 0
    for content in contents:
        parts += [np.frombuffer(content, np.uint8).astype(np.uint16), np.array([END], np.uint16)]
        total += len(content)
    return Tokens(np.concatenate(parts), total)


def _tokenizer(path: str):
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError("data.tokenizer needs the package tokenizers: pip install 'sparse_jax[text]'.") from error
    if not pathlib.Path(path).is_file():
        raise ValueError(f'data.tokenizer={path!r} is not a file: give the JSON file of a tokenizer, or leave it empty for bytes.')
    try:
        encoder = tokenizers.Tokenizer.from_file(path)
        encoder.no_truncation()  # the file may have been saved with truncation or padding enabled
        encoder.no_padding()
        return encoder
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f'data.tokenizer={path!r} cannot be read ({error}): give the JSON file of a tokenizer.') from error


def load(paths: Sequence[pathlib.Path], *, validation: float, tokenizer: str = '') -> Corpus:
    """Reads files as tokens.

    Args:
      paths: UTF-8 files.
      validation: fraction of the files to hold out for validation, in (0, 1).
      tokenizer: JSON file of the library ``tokenizers``; if empty, the tokens are the 256 bytes and one for the end of a file.

    Returns:
      The tokens of the training and of the validation files.

    Raises:
      ValueError: if a file is not UTF-8, or the tokenizer cannot be read.
    """
    train, held_out = split(paths, validation)
    if not tokenizer:
        return Corpus(_byte_tokens(map(read, train)), _byte_tokens(map(read, held_out)), num_tokens=END + 1)
    encoder = _tokenizer(tokenizer)
    end = max(encoder.get_vocab().values()) + 1  # ids may have gaps
    dtype = np.uint16 if end < 2**16 else np.uint32  # `end` is the largest token

    def encode(paths: Sequence[pathlib.Path]) -> Tokens:
        rows, num_bytes = [], 0
        for first in range(0, len(paths), _FILES_PER_BATCH):  # an encoding takes a hundred times the memory of its tokens
            contents = [read(path) for path in paths[first : first + _FILES_PER_BATCH]]
            encoded = encoder.encode_batch([content.decode() for content in contents], add_special_tokens=False)
            rows += [np.array([*row.ids, end], dtype) for row in encoded]
            num_bytes += sum(map(len, contents))
        return Tokens(np.concatenate(rows), num_bytes)

    return Corpus(encode(train), encode(held_out), num_tokens=end + 1)


def pack(tokens: np.ndarray, length: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a row of tokens into consecutive sequences and drops the tokens that do not fill one.

    A sequence may contain the end of one file and the beginning of the next, with the end token in between.

    Args:
      tokens: tokens [n].
      length: number of tokens in a sequence.
      name: name of the split, used in error messages.

    Returns:
      Inputs and labels [m, length], where a label is the token after its input. Both are views of ``tokens``.

    Raises:
      ValueError: if the tokens do not fill a single sequence.

    Example:
      >>> inputs, labels = pack(np.arange(10), 4, 'training')
      >>> inputs.tolist(), labels.tolist()
      ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    """
    if len(tokens) <= length:
        raise ValueError(f'the {name} text has {len(tokens)} tokens, fewer than a sequence of data.length={length} and one more.')
    rows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
    return rows[:, :-1], rows[:, 1:]
