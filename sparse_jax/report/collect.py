"""Runs read back from their workdirs, for reports: what is finished, and what is broken, not finished or not begun."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sparse_jax import config as config_lib
from sparse_jax.runtime import records


class Run(NamedTuple):
    """One finished run."""

    folder: pathlib.Path
    config: dict[str, Any]  # flat
    result: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl; empty where it cannot be read
    machine: dict[str, Any]  # run.json; empty where it cannot be read


class Problem(NamedTuple):
    """A workdir that is not in the tables, and why."""

    folder: pathlib.Path
    reason: str


def printable(text: str) -> str:
    """A text in which what no page can show, such as half a character of a path that is not UTF-8, is written as an escape."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def relative(path: pathlib.Path, folder: pathlib.Path) -> str:
    """A path as seen from a folder, if it is in it, as text that can be printed."""
    return printable(str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path))


def collect(sources: Sequence[pathlib.Path]) -> tuple[list[Run], list[Problem]]:
    """Reads every workdir in some folders, at any depth.

    Args:
      sources: where to look.

    Returns:
      Finished runs, and the others with the reason why they are not among them; a run that repeats another one's settings and seed
      is among these.

    Raises:
      ValueError: if there is no workdir at all.
    """
    runs, problems, seen = [], [], {}
    for path in _workdirs(sources):
        run = _read(path)
        if isinstance(run, Run):
            key = json.dumps([settings_of(run), run.config['seed']], sort_keys=True)
            if key in seen:
                run = Problem(path, f'has the settings and the seed of {printable(str(seen[key]))}')
            else:
                seen[key] = path
        (runs if isinstance(run, Run) else problems).append(run)
    if not runs and not problems:
        where = ', '.join(map(str, sources))
        raise ValueError(f'{where} holds no run: give the folder of a run, of a sweep, or of several.')
    return runs, problems


_NEIGHBOURS = 200  # folders beside a run's that are looked at


def dense_twin(folder: pathlib.Path) -> Run | None:
    """The finished dense run of the same settings and seed in a folder beside a run's; None: there is none."""
    run = _read(folder)
    if not isinstance(run, Run):
        return None
    try:
        beside = sorted(folder.resolve().parent.iterdir())[:_NEIGHBOURS]
    except OSError:
        return None
    for path in beside:
        if not (path / records.CONFIG).is_file():
            continue
        other = _read(path)
        if not isinstance(other, Run) or other.result['method'] != 'dense':
            continue
        if other.config['seed'] == run.config['seed'] and base_of(other) == base_of(run):
            return other
    return None


def _workdirs(sources: Sequence[pathlib.Path]) -> Iterator[pathlib.Path]:
    seen = set()
    for source in sources:
        for path, folders, files in os.walk(source):
            here = [pathlib.Path(path)] if records.CONFIG in (*folders, *files) else []
            if here:
                folders.clear()
            elif records.SWEEP in files:  # those of its runs that have not begun
                here = [pathlib.Path(path) / name for name in _planned(pathlib.Path(path)) if name not in folders]
            for folder in here:
                if folder.resolve() not in seen:
                    seen.add(folder.resolve())
                    yield folder
            folders[:] = sorted(name for name in folders if name not in ('checkpoints', 'tensorboard', 'logs'))


def _planned(folder: pathlib.Path) -> list[str]:
    try:
        return records.read(folder / records.SWEEP)['runs']
    except records.UnreadableError:
        return []


def rows_of(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a workdir's metrics.jsonl, as far as they can be read."""
    return [row.values for row in records.read_rows(folder / records.METRICS)[0]]


def machine_of(folder: pathlib.Path) -> dict[str, Any]:
    """The content of run.json; empty where it cannot be read."""
    try:
        return records.read(folder / records.MACHINE)
    except records.UnreadableError:
        return {}


def _read(folder: pathlib.Path) -> Run | Problem:
    if not folder.exists():
        return Problem(folder, 'not begun')
    name = records.CONFIG
    try:
        config = config_lib.identity(config_lib.Config()) | records.read(folder / name)  # settings that did not exist yet
        if wrong := [key for key, is_right in _NEEDED.items() if not is_right(config[key])]:
            return Problem(folder, f'{name} is broken, or made by another version: it has no usable {", ".join(wrong)}')
        rows, name = rows_of(folder), records.RESULT
        if not os.path.lexists(folder / name):
            last = rows[-1]['step'] if rows else 0
            return Problem(folder, f'not finished: its last metrics are of step {last}')
        result = records.read(folder / name)
    except records.UnreadableError as error:
        return Problem(folder, f'{name} {error.reason}')
    result = {key: value for key, value in result.items() if value is not None}
    return Run(folder, {key: _shown(value) for key, value in config.items()}, result, rows, machine_of(folder))


_NEEDED: dict[str, Callable[[Any], bool]] = {
    'seed': lambda value: type(value) is int,
    'sparsity.density': lambda value: records.is_number(value) and 0 < value <= 1,
}


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def settings_of(run: Run) -> dict[str, Any]:
    """What distinguishes a group, in effective values; a dense run has no sparsity to differ in."""
    is_dense = run.result['method'] == 'dense'
    left_out = (
        'seed',
        'data.eval_batch_size',
        'train.eval_every',
        'train.epochs',  # by the steps that they came to
        *(k for k in run.config if is_dense and k.startswith('sparsity.')),
    )
    settings = {k: v for k, v in run.config.items() if k not in left_out}
    effective = {'train.steps': run.result['steps'], 'method': run.result['method']}
    return settings | effective | {'text': run.result.get('data_fingerprint', '')}


def base_of(run: Run) -> dict[str, Any]:
    """What a run shares with its dense twin."""
    return {name: value for name, value in settings_of(run).items() if name != 'method' and not name.startswith('sparsity.')}


# Values that stand for something else, in words.
_METHODS = "the method's"
_WORDS: dict[str, dict[Any, str]] = {
    'model.dropout': {-1.0: "the model's"}, 'model.hidden': {0: '8/3 of the width'}, 'data.tokenizer': {'': 'bytes'},
    'optimizer.decay_every': {0: 'never'}, 'sparsity.prune': {'': _METHODS}, 'sparsity.grow': {'': _METHODS},
    'sparsity.redistribute': {'': _METHODS}, 'sparsity.distribution': {'': _METHODS}, 'sparsity.prune_rate': {0.0: _METHODS},
    'sparsity.stop_step': {0: _METHODS}, 'sparsity.update_every': {0: 'an epoch'}, 'sparsity.dense': {'': "the model's"},
    'sparsity.dense_gradient_window': {None: 'all steps'},
}  # fmt: skip


def in_words(name: str, value: Any) -> str:
    """A setting as a label shows it.

    >>> in_words('train.steps', 4000), in_words('sparsity.update_every', 0)
    ('steps=4000', 'update_every=an epoch')
    """
    return f'{name.rpartition(".")[2]}={_WORDS.get(name, {}).get(value, value)}'
