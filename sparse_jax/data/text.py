"""Text as packed sequences of tokens: any UTF-8 files, or the sources of the Python standard library, which are always there."""

import pathlib
import sysconfig
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

END = 256  # of a file, among bytes
_AT_ONCE = 64  # files that are tokenized together


class Tokens(NamedTuple):
    """Files as one row of tokens, with an end token after each."""

    stream: np.ndarray  # uint16 or uint32[n]
    num_bytes: int  # of the files


class Corpus(NamedTuple):
    """Text for training and for validation; no file is in both."""

    train: Tokens
    validation: Tokens
    num_tokens: int  # that exist


def standard_library() -> list[pathlib.Path]:
    """Sources of the running Python's standard library, without its tests, sorted. They differ from version to version."""
    root = pathlib.Path(sysconfig.get_paths()['stdlib'])
    left_out = {'site-packages', 'dist-packages', 'test', 'tests', '__pycache__'}
    return sorted(path for path in root.rglob('*.py') if not left_out & set(path.relative_to(root).parts))


def find(folder: str, pattern: str) -> list[pathlib.Path]:
    """The files below a folder that match a pattern, sorted.

    Args:
      folder: where to look.
      pattern: such as ``**/*.txt``.

    Returns:
      Paths.

    Raises:
      ValueError: if there are none.
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
    """Splits files at random, the same ones every time: (training, validation), at least one in each.

    Args:
      paths: files.
      validation: part of the files to set apart, in (0, 1).

    Returns:
      The two lists.

    Raises:
      ValueError: if there are fewer than two files, or nothing is to be set apart.
    """
    if validation == 0:
        raise ValueError('data.validation=0.0: text is split by file, and needs a part to evaluate on: give for instance 0.02.')
    if len(paths) < 2:
        found = ', '.join(map(str, paths)) or 'none'
        raise ValueError(f'text is split by file and needs at least two of them, found {len(paths)} ({found}): split it in two.')
    order = np.random.default_rng(0).permutation(len(paths))
    count = min(max(round(validation * len(paths)), 1), len(paths) - 1)
    return [paths[i] for i in sorted(order[count:])], [paths[i] for i in sorted(order[:count])]


def read(path: pathlib.Path) -> bytes:
    """A file's bytes; ValueError, naming file and offset, where they are not UTF-8."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f'{path} is not UTF-8 at offset {error.start} ({error.reason}): convert it, or change data.pattern.'
        ) from error
    return content


def _bytes(contents: Iterable[bytes]) -> Tokens:
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
        encoder.no_truncation()  # a file may have been saved with either
        encoder.no_padding()
        return encoder
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f'data.tokenizer={path!r} cannot be read ({error}): give the JSON file of a tokenizer.') from error


def load(paths: Sequence[pathlib.Path], *, validation: float, tokenizer: str = '') -> Corpus:
    """Reads files as tokens.

    Args:
      paths: UTF-8 files.
      validation: part of the files to set apart, in (0, 1).
      tokenizer: JSON file of the library ``tokenizers``; empty: the 256 bytes, and one token for the end of a file.

    Returns:
      The tokens of both parts.

    Raises:
      ValueError: if a file is not UTF-8, or the tokenizer cannot be read.
    """
    parts = split(paths, validation)
    if not tokenizer:
        return Corpus(*(_bytes(map(read, part)) for part in parts), num_tokens=END + 1)
    encoder = _tokenizer(tokenizer)
    end = max(encoder.get_vocab().values()) + 1  # ids may have gaps
    kind = np.uint16 if end < 2**16 else np.uint32  # `end` is the largest token

    def encode(part: Sequence[pathlib.Path]) -> Tokens:
        rows, total = [], 0
        for first in range(0, len(part), _AT_ONCE):  # the library takes a hundred times the memory that its tokens do
            contents = [read(path) for path in part[first : first + _AT_ONCE]]
            encoded = encoder.encode_batch([content.decode() for content in contents], add_special_tokens=False)
            rows += [np.array([*row.ids, end], kind) for row in encoded]
            total += sum(map(len, contents))
        return Tokens(np.concatenate(rows), total)

    return Corpus(*(encode(part) for part in parts), num_tokens=end + 1)


def pack(tokens: np.ndarray, length: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a row of tokens into sequences, one after the other, and leaves out what fills none.

    A sequence may hold the end of one file and the beginning of the next, with the end token in between.

    Args:
      tokens: [n].
      length: of a sequence.
      name: of the part, for errors.

    Returns:
      Inputs and labels [m, length]: a label is the token after its input. Views; nothing is copied.

    Raises:
      ValueError: if there is not a single sequence.

    Example:
      >>> inputs, labels = pack(np.arange(10), 4, 'training')
      >>> inputs.tolist(), labels.tolist()
      ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    """
    if len(tokens) <= length:
        raise ValueError(f'the {name} text has {len(tokens)} tokens, fewer than a sequence of data.length={length} and one more.')
    rows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
    return rows[:, :-1], rows[:, 1:]
