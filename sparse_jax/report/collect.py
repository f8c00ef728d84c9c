"""Runs read back from their workdirs, for reports: what is finished, and what is broken, not finished or not begun."""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sparse_jax import config as config_lib


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


def relative(path: pathlib.Path, folder: pathlib.Path) -> str:
    """A path as seen from a folder, if it is in it."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


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
                run = Problem(path, f'has the settings and the seed of {seen[key]}')
            else:
                seen[key] = path
        (runs if isinstance(run, Run) else problems).append(run)
    if not runs and not problems:
        where = ', '.join(map(str, sources))
        raise ValueError(f'{where} holds no run: give the folder of a run, of a sweep, or of several.')
    return runs, problems


def _workdirs(sources: Sequence[pathlib.Path]) -> Iterator[pathlib.Path]:
    seen = set()
    for source in sources:
        for path, folders, files in os.walk(source):
            here = [pathlib.Path(path)] if 'config.json' in files else []
            if here:
                folders.clear()
            elif 'sweep.json' in files:  # those of its runs that have not begun
                here = [pathlib.Path(path) / name for name in _planned(pathlib.Path(path)) if name not in folders]
            for folder in here:
                if folder.resolve() not in seen:
                    seen.add(folder.resolve())
                    yield folder
            folders[:] = sorted(name for name in folders if name not in ('checkpoints', 'tensorboard', 'logs'))


def _planned(folder: pathlib.Path) -> list[str]:
    try:
        return [name for name in _load(folder / 'sweep.json')['runs'] if isinstance(name, str)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _load(path: pathlib.Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError('not a JSON object')
    return content


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, as far as they can be read."""
    rows = []
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get('step'), int):
                rows.append({name: value for name, value in row.items() if _is_number(value) or _is_numbers(value)})
    except (OSError, ValueError):
        pass
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_NEEDED = dict.fromkeys(('nonzeros', 'density', 'parameters', 'seconds', 'steps'), _is_number)
_NEEDED |= dict.fromkeys(('model', 'data', 'method'), _is_text)
_NUMBERS = (
    'test_accuracy', 'eval_loss', 'validation_bits_per_byte', 'operations_training_against_dense', 'operations_inference_against_dense',
)  # fmt: skip


def _read(folder: pathlib.Path) -> Run | Problem:
    if not folder.exists():
        return Problem(folder, 'not begun')
    try:
        config = config_lib.identity(config_lib.Config()) | _load(folder / 'config.json')  # settings that did not exist yet
    except (OSError, ValueError) as error:
        return Problem(folder, f'config.json cannot be read ({error})')
    rows = rows_of(folder / 'metrics.jsonl')
    if not (folder / 'result.json').exists():
        last = rows[-1]['step'] if rows else 0
        return Problem(folder, f'not finished: its last metrics are of step {last}')
    try:
        result = _load(folder / 'result.json')
    except (OSError, ValueError) as error:
        return Problem(folder, f'result.json cannot be read ({error})')
    result |= {key: None for key in _NUMBERS if key in result and not _is_number(result[key])}
    result = {key: value for key, value in result.items() if value is not None}
    missing = [key for key, is_right in _NEEDED.items() if not is_right(result.get(key))]
    if 'test_accuracy' not in result and 'eval_loss' not in result:
        missing.append('test_accuracy or eval_loss')
    missing += [key for key in ('seed', 'sparsity.density') if not _is_number(config.get(key))]
    if missing:
        return Problem(folder, f'broken, or made by another version: it has no usable {", ".join(missing)}')
    return Run(folder, config, result, rows, machine_of(folder))


def machine_of(folder: pathlib.Path) -> dict[str, Any]:
    """The content of run.json; empty where it cannot be read."""
    try:
        return _load(folder / 'run.json')
    except (OSError, ValueError):
        return {}


def settings_of(run: Run) -> dict[str, Any]:
    """What distinguishes a group; a dense run has no sparsity to differ in."""
    is_dense = run.result['method'] == 'dense'
    left_out = (
        'seed',
        'data.eval_batch_size',
        'train.eval_every',
        *(k for k in run.config if is_dense and k.startswith('sparsity.')),
    )
    settings = {k: v for k, v in run.config.items() if k not in left_out}
    return settings | {'method': run.result['method'], 'text': run.result.get('data_fingerprint', '')}
