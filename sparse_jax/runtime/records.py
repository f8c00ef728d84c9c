"""The JSON files of a workdir: written whole or not at all, and read in this one place, each against what it must hold."""

import contextlib
import json
import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

CONFIG, DATA, KERNELS, MACHINE, RESULT, SWEEP = 'config.json', 'data.json', 'kernels.json', 'run.json', 'result.json', 'sweep.json'
TICKETS = 'lottery.json'  # the table of all rounds of lottery tickets
LOTTERY = 'lottery_settings.json'  # what the rounds of lottery tickets are made of
SETTINGS = 'settings.json'  # all of them, as the run was started last; those of config.json stay
METRICS = 'metrics.jsonl'
_CHECKSUM = 'checksum'  # of a result, which nothing else would tell from one with another digit
_BY_LAYER = ('density', 'share', 'pruned', 'grown')  # metrics that are a number for each layer


class UnreadableError(ValueError):
    """A file that cannot be read, or does not hold what it must."""

    def __init__(self, path: pathlib.Path, reason: str):
        super().__init__(f'{path} {reason}')
        self.reason = reason  # without the path


class Row(NamedTuple):
    """One line of metrics.jsonl."""

    text: str  # as it stands there
    values: dict[str, Any]  # its numbers, and dictionaries of numbers by layer; ``step`` is among them


def write(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file that is either whole or not there; what has its name and is no file is put aside. A result has a checksum."""
    if path.name == RESULT:
        content = content | {_CHECKSUM: _checksum(content)}
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + '\n')


@contextlib.contextmanager
def replacing(path: pathlib.Path, suffix: str = '.tmp') -> Iterator[pathlib.Path]:
    """Gives the path to write a file at, which then takes the place of `path`; what has either name and is no file is put aside."""
    partial = path.with_suffix(suffix)
    for name in (path, partial):
        if os.path.lexists(name) and not name.is_file():
            put_aside(name)
    yield partial
    os.replace(partial, path)


def read(path: pathlib.Path) -> Any:
    """The content of a JSON file of a workdir.

    Args:
      path: a file of one of the names above.

    Returns:
      What it holds, of the types that whoever wrote it gave it.

    Raises:
      UnreadableError: in one line that names the file, whatever is wrong with it; also where it is not there.
    """
    try:
        content = json.loads(_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableError(path, f'cannot be read ({_reason(error)})') from error
    if not isinstance(content, dict):
        raise UnreadableError(path, 'cannot be read (it is not a JSON object)')
    if wrong := _WRONG[path.name](content):
        raise UnreadableError(path, f'is broken, or made by another version: {wrong}')
    if _CHECKSUM in content and content.pop(_CHECKSUM) != _checksum(content):
        raise UnreadableError(path, 'is broken, or was changed: it is not what was written')
    return content


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in content.items() if k != _CHECKSUM}, sort_keys=True).encode())


def is_whole(path: pathlib.Path) -> bool:
    """Whether a JSON file is there and can be read."""
    try:
        read(path)
    except UnreadableError:
        return False
    return True


def read_rows(path: pathlib.Path) -> tuple[list[Row], str]:
    """The lines of a metrics.jsonl that can be used, and what is wrong with the first other one.

    A line that a kill has cut off, which is the last one and has no end, is left out and is nothing wrong; so is a file that is not there.

    Args:
      path: the file.

    Returns:
      The lines, and a reason in words; empty where all is well.
    """
    try:
        text = _text(path)
    except FileNotFoundError:
        return [], ''
    except OSError as error:
        return [], _reason(error)
    except UnicodeDecodeError:
        text = path.read_bytes().decode(errors='replace')  # a replaced character is in no number: its line stands, or is no JSON
    rows, wrong = [], ''
    lines = text.split('\n')
    for number, line in enumerate(lines, start=1):
        values = _row(line)
        if values is not None:
            rows.append(Row(line, values))
        elif line and number < len(lines):
            wrong = wrong or f'line {number} holds no metrics of a step'
    return rows, wrong


def put_aside(path: pathlib.Path) -> str:
    """Renames what cannot be used, a file or a folder, and returns its new name: NAME.corrupt, or with a number behind it."""
    new, count = path.with_name(f'{path.name}.corrupt'), 1
    while os.path.lexists(new):
        count += 1
        new = path.with_name(f'{path.name}.corrupt{count}')
    path.rename(new)
    return new.name


def is_number(value: Any) -> bool:
    """Whether a value is a number that a table or a figure can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e18 < value < 1e18


def _text(path: pathlib.Path) -> str:
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise OSError('it is a folder' if path.is_dir() else 'it is not a file')
    return path.read_text(encoding='utf-8')


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f'it is not UTF-8 at byte {error.start}'
    if isinstance(error, RecursionError):
        return 'it is nested too deeply'
    if isinstance(error, json.JSONDecodeError):
        return f'it is not JSON: {error}'
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not _is_count(row.get('step')):
        return None
    is_right = lambda name, value: _is_numbers(value) if name in _BY_LAYER else is_number(value)
    return {name: value for name, value in row.items() if is_right(name, value)}


def _is_count(value: Any) -> bool:
    return is_number(value) and isinstance(value, int) and value >= 0


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value)) and all(map(is_number, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()  # lone surrogates and control characters are not


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_layers(value: Any) -> bool:
    is_pair = lambda pair: isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)) and pair[0] <= pair[1] > 0
    return isinstance(value, dict) and all(map(_is_text, value)) and all(map(is_pair, value.values()))


def _is_setting(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, bool | str)
        or (isinstance(value, int | float) and -sys.float_info.max <= value <= sys.float_info.max)
    )


def _are_choices(value: Any) -> bool:
    """By layer: the density that a kernel was chosen at, which, and the seconds of each."""
    fields: Any = {'density': is_number, 'implementation': _is_text, 'seconds': _is_numbers}
    is_choice = lambda row: isinstance(row, dict) and all(is_right(row.get(name)) for name, is_right in fields.items())
    return isinstance(value, dict) and all(map(_is_text, value)) and all(map(is_choice, value.values()))


def _fields(needed: dict[str, Callable[[Any], bool]], optional: dict[str, Callable[[Any], bool]]) -> Callable[[Any], str]:
    """A check of an object's fields: what is wrong, or nothing. An optional one may be null; others are left as they are."""

    def wrong(content: dict[str, Any]) -> str:
        unusable = [name for name, is_right in needed.items() if not is_right(content.get(name))]
        unusable += [name for name, is_right in optional.items() if content.get(name) is not None and not is_right(content[name])]
        return f'it has no usable {", ".join(unusable)}' if unusable else ''

    return wrong


def _each(names: tuple[str, ...], is_right: Callable[[Any], bool]) -> dict[str, Callable[[Any], bool]]:
    return dict.fromkeys(names, is_right)


def _config(content: dict[str, Any]) -> str:
    unusable = [name for name, value in content.items() if not (_is_text(name) and _is_setting(value))]
    return f'it has no usable {unusable[0]!r}' if unusable else ''


def _kernels(content: dict[str, Any]) -> str:
    is_right = all(step.isdecimal() and step.isascii() and len(step) < 11 and _are_choices(rows) for step, rows in content.items())
    return '' if is_right else 'it does not hold choices by step and layer'


def _result(content: dict[str, Any]) -> str:
    wrong = _RESULT_FIELDS(content)
    if not wrong and content.get('test_accuracy') is None and content.get('eval_loss') is None:
        wrong = 'it has no usable test_accuracy or eval_loss'
    return wrong


_RESULT_FIELDS = _fields(
    _each(('nonzeros', 'parameters', 'steps'), _is_count)
    | _each(('density', 'seconds'), is_number)
    | _each(('model', 'data', 'method'), _is_text),
    _each(('test_accuracy', 'eval_loss', 'validation_bits_per_byte', 'validation_accuracy'), is_number)
    | _each(('operations_training_against_dense', 'operations_inference_against_dense'), is_number)
    | _each(('exploration_rate', 'steps_per_second'), is_number)
    | {'layers': _are_layers, 'data_fingerprint': _is_text},
)
_WRONG: dict[str, Callable[[dict[str, Any]], str]] = {
    CONFIG: _config,
    DATA: _fields({'fingerprint': _is_text}, {}),
    KERNELS: _kernels,
    MACHINE: _fields(
        {},
        _each(('device', 'kernels', 'jax', 'attention', 'command'), _is_text) | _each(('max_memory_mib', 'resumed_at'), _is_count),
    ),
    RESULT: _result,
    SETTINGS: _config,
    LOTTERY: _config,
    SWEEP: _fields({'runs': _is_texts}, {}),
    TICKETS: _fields({'rounds': lambda rows: isinstance(rows, list)}, {}),
}
