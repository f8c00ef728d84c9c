"""Many runs as one table: collected from their workdirs, grouped over seeds, with means and intervals, beside published numbers."""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from sparse_jax import config as config_lib
from sparse_jax import methods
from sparse_jax.train import published


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


class Group(NamedTuple):
    """Runs that differ in their seeds only."""

    method: str
    density: float  # as the config says it; 1 for dense
    settings: str  # what else distinguishes it from other groups of its table
    runs: list[Run]

    @property
    def label(self) -> str:
        """Its method, and what distinguishes it."""
        return f'{self.method} ({self.settings})' if self.settings else self.method

    def values(self, key: str) -> np.ndarray:
        """A number of ``result.json``, run by run."""
        return np.array([run.result[key] for run in self.runs], float)


class Table(NamedTuple):
    """All groups of one model on one data set."""

    model: str
    data: str
    metric: str  # key of result.json
    groups: list[Group]


class Interval(NamedTuple):
    """A mean over runs, its standard error, and its 95% interval by Student's t; NaN where there is one run."""

    mean: float
    error: float
    low: float
    high: float


def interval(values: np.ndarray) -> Interval:
    """The mean of values, and how well it is known.

    >>> [round(v, 3) for v in interval(np.array([1.0, 2.0, 3.0]))]
    [2.0, 0.577, -0.484, 4.484]
    """
    if len(values) < 2:
        return Interval(float(values.mean()), float('nan'), float('nan'), float('nan'))
    error = float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    mean = float(values.mean())
    return Interval(mean, error, mean - half, mean + half)


def collect(places: Sequence[pathlib.Path]) -> tuple[list[Run], list[Problem]]:
    """Reads every workdir in some folders, at any depth.

    Args:
      places: where to look.

    Returns:
      Finished runs, and the others with the reason why they are not among them; a run that repeats another one's settings and seed
      is among these.

    Raises:
      ValueError: if there is no workdir at all.
    """
    runs, problems, seen = [], [], {}
    for path in _workdirs(places):
        run = _read(path)
        if isinstance(run, Run):
            key = json.dumps([_identity(run), run.config['seed']], sort_keys=True)
            if key in seen:
                run = Problem(path, f'has the settings and the seed of {seen[key]}')
            else:
                seen[key] = path
        (runs if isinstance(run, Run) else problems).append(run)
    if not runs and not problems:
        where = ', '.join(map(str, places))
        raise ValueError(f'{where} holds no run: give the folder of a run, of a sweep, or of several.')
    return runs, problems


def _workdirs(places: Sequence[pathlib.Path]) -> Iterator[pathlib.Path]:
    found = set()
    for place in places:
        for path, folders, files in os.walk(place):
            here = [pathlib.Path(path)] if 'config.json' in files else []
            if here:
                folders.clear()
            elif 'sweep.json' in files:  # those of its runs that have not begun
                here = [pathlib.Path(path) / name for name in _planned(pathlib.Path(path)) if name not in folders]
            for folder in here:
                if folder.resolve() not in found:
                    found.add(folder.resolve())
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


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
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
    rows = _rows(folder / 'metrics.jsonl')
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
    try:
        machine = _load(folder / 'run.json')
    except (OSError, ValueError):
        machine = {}
    return Run(folder, config, result, rows, machine)


def _identity(run: Run) -> dict[str, Any]:
    """What distinguishes a group; a dense run has no sparsity to differ in."""
    is_dense = run.result['method'] == 'dense'
    left_out = (
        'seed',
        'data.eval_batch_size',
        'train.eval_every',
        *(k for k in run.config if is_dense and k.startswith('sparsity.')),
    )
    own = {k: v for k, v in run.config.items() if k not in left_out}
    return own | {'method': run.result['method'], 'text': run.result.get('data_fingerprint', '')}


_KNOWN = ['dense', *methods.NAMES]


def _order(group: Group) -> tuple:
    """Dense first, then the methods as README lists them, from the densest on."""
    place = _KNOWN.index(group.method) if group.method in _KNOWN else len(_KNOWN)
    return place, group.method, group.settings, -group.density


def tables(runs: Sequence[Run]) -> list[Table]:
    """Groups runs by model and data, and in these by everything but the seed."""
    by_table: dict[tuple[str, str, str], dict[str, list[Run]]] = {}
    for run in runs:
        metric = 'eval_loss' if 'eval_loss' in run.result else 'test_accuracy'
        groups = by_table.setdefault((run.result['model'], run.result['data'], metric), {})
        groups.setdefault(json.dumps(_identity(run), sort_keys=True), []).append(run)
    made = []
    for (model, data, metric), groups in sorted(by_table.items()):
        identities = [json.loads(key) for key in groups]
        shown = {'model.name', 'data.name', 'method', 'sparsity.method', 'sparsity.density'}
        missing = object()
        varying = [
            name
            for name in sorted({name for identity in identities for name in identity} - shown)
            if len({json.dumps(i[name]) for i in identities if i.get(name, missing) is not missing}) > 1
        ]
        rows = []
        for identity, same in zip(identities, groups.values(), strict=True):
            settings = ', '.join(f'{name.rpartition(".")[2]}={identity[name]}' for name in varying if name in identity)
            density = 1.0 if identity['method'] == 'dense' else float(identity['sparsity.density'])
            rows.append(Group(identity['method'], density, settings, sorted(same, key=lambda run: run.config['seed'])))
        made.append(Table(model, data, metric, sorted(rows, key=_order)))
    return made


def columns(table: Table) -> list[str]:
    """Headings of a table's rows."""
    metric = 'test accuracy %' if table.metric == 'test_accuracy' else 'validation loss, nats'
    last = ['bits a byte'] if table.metric == 'eval_loss' else ['published %'] if sources([table]) else []
    return [
        'method', 'density', 'nonzeros', 'runs', metric, 'standard error', '95% interval', *last,
        'operations of training', 'of inference', 'seconds a run',
    ]  # fmt: skip


def cells(table: Table, group: Group) -> list[str]:
    """A group's row, as text."""
    is_accuracy = table.metric == 'test_accuracy'
    scale, digits = (100, 2) if is_accuracy else (1, 4)
    mean = interval(scale * group.values(table.metric))
    nonzeros = sorted({run.result['nonzeros'] for run in group.runs})
    beside = []
    if is_accuracy and sources([table]):
        numbers = published.find(table.model, table.data, group.method, group.density)
        beside = [', '.join(f'{n.accuracy:.2f}' + (f' ({n.of})' if n.of else '') for n in numbers)]
    elif not is_accuracy:
        known = all('validation_bits_per_byte' in run.result for run in group.runs)
        beside = [f'{group.values("validation_bits_per_byte").mean():.4f}' if known else '']
    cost = lambda part: (
        f'{100 * group.values(f"operations_{part}_against_dense").mean():.1f}%'
        if all(f'operations_{part}_against_dense' in run.result for run in group.runs)
        else ''
    )
    known = not np.isnan(mean.error)
    return [
        group.label,
        f'{group.density:.3g}' if group.density < 0.001 else f'{100 * group.density:.3g}%',
        f'{nonzeros[0]:,}' if len(nonzeros) == 1 else f'{nonzeros[0]:,} to {nonzeros[-1]:,}',
        str(len(group.runs)),
        f'{mean.mean:.{digits}f}',
        f'{mean.error:.{digits}f}' if known else '',
        f'{mean.low:.{digits}f} to {mean.high:.{digits}f}' if known else '',
        *beside,
        cost('training'),
        cost('inference'),
        f'{group.values("seconds").mean():.1f}',
    ]


def sources(made: Sequence[Table]) -> list[str]:
    """Where the published numbers of the tables come from."""
    found = {}
    for table in made:
        for group in table.groups:
            if table.metric == 'test_accuracy':
                found |= dict.fromkeys(n.source for n in published.find(table.model, table.data, group.method, group.density))
    return list(found)


def markdown(made: Sequence[Table], problems: Sequence[Problem], folder: pathlib.Path) -> str:
    """All tables as Markdown, and what is not in them."""
    lines = []
    for table in made:
        heads = columns(table)
        lines += [f'**{table.model} on {table.data}**', '', '| ' + ' | '.join(heads) + ' |']
        lines += ['|---|' + '---:|' * (len(heads) - 1)]
        lines += ['| ' + ' | '.join(cells(table, group)) + ' |' for group in table.groups] + ['']
    if where := sources(made):
        lines += [f'Published, by whole trainings with the settings of: {"; ".join(where)}.', '']
    if problems:
        lines += ['Not in the tables:', '']
        lines += [f'- `{relative(problem.folder, folder)}`: {problem.reason}' for problem in problems] + ['']
    return '\n'.join(lines)


def relative(path: pathlib.Path, folder: pathlib.Path) -> str:
    """A path as seen from a folder, if it is in it."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def report(folder: pathlib.Path, places: Sequence[pathlib.Path] = ()) -> dict[str, pathlib.Path]:
    """Writes ``report.html``, one page with everything in it, and ``report.md``, and prints the tables.

    Args:
      folder: to write to: a run's workdir, a sweep's, or any folder that holds some; with `places` any folder, made if need be.
      places: folders with the runs, in place of `folder`.

    Returns:
      The two files.

    Raises:
      ValueError: if there is no run, or the folder cannot be written.
    """
    from sparse_jax.train import page  # matplotlib is needed for the page alone

    for name, place in [('--runs', place) for place in places] or [('--workdir', folder)]:
        if not place.is_dir():
            raise ValueError(f'{name}={place} is not a folder: give the folder of a run, of a sweep, or of several.')
    runs, problems = collect(places or [folder])
    made = tables(runs)
    texts = {'html': page.page(made, problems, folder), 'md': markdown(made, problems, folder)}
    written = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            written[kind] = folder / f'report.{kind}'
            partial = folder / f'report.{kind}.tmp'
            partial.write_text(text)
            partial.replace(written[kind])
    except OSError as error:
        raise ValueError(f'--workdir={folder} cannot be written ({error}): give another folder.') from error
    print(texts['md'])
    print(f'{written["html"]} and {written["md"]} are written.')
    return written
