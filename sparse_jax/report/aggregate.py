"""Many runs as one table: grouped over seeds, with means and intervals, beside published numbers."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from sparse_jax.core import methods
from sparse_jax.report import published
from sparse_jax.report.collect import Run, base_of, in_words, settings_of


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


_METHODS = ['dense', *methods.NAMES]


def _order(group: Group) -> tuple:
    """Dense first, then the methods as README lists them, from the densest on."""
    rank = _METHODS.index(group.method) if group.method in _METHODS else len(_METHODS)
    return rank, group.method, group.settings, -group.density


def tables(runs: Sequence[Run]) -> list[Table]:
    """Groups runs by model and data, and in these by everything but the seed."""
    by_table: dict[tuple[str, str, str], dict[str, list[Run]]] = {}
    for run in runs:
        metric = 'eval_loss' if 'eval_loss' in run.result else 'test_accuracy'
        groups = by_table.setdefault((run.result['model'], run.result['data'], metric), {})
        groups.setdefault(json.dumps(settings_of(run), sort_keys=True), []).append(run)
    by_name = []
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
            settings = ', '.join(in_words(name, identity[name]) for name in varying if name in identity)
            density = 1.0 if identity['method'] == 'dense' else float(identity['sparsity.density'])
            rows.append(Group(identity['method'], density, settings, sorted(same, key=lambda run: run.config['seed'])))
        by_name.append(Table(model, data, metric, sorted(rows, key=_order)))
    return by_name


def pairs(table: Table, group: Group) -> list[tuple[Run, Run]]:
    """Each run of a sparse group beside the dense one of its settings and seed; empty where there is none."""
    if group.method == 'dense':
        return []
    dense = {
        (json.dumps(base_of(run), sort_keys=True), run.config['seed']): run
        for g in table.groups
        if g.method == 'dense'
        for run in g.runs
    }
    keys = [(json.dumps(base_of(run), sort_keys=True), run.config['seed']) for run in group.runs]
    return [(run, dense[key]) for run, key in zip(group.runs, keys, strict=True) if key in dense]


def speed(run: Run) -> float | None:
    """Steps a second without compilation: the median over the run's log, whose first lines contain it. None: too few lines."""
    logged = [row['steps_per_second'] for row in run.rows if isinstance(row.get('steps_per_second'), float | int)]
    return float(np.median(logged[1:])) if len(logged) > 2 else None


def _against_dense(table: Table, group: Group, scale: float, digits: int) -> list[str]:
    """The paired difference with its interval, and the speed as a multiple; empty where there is no dense twin."""
    paired = pairs(table, group)
    if not paired:
        return ['', '']
    difference = interval(np.array([scale * (run.result[table.metric] - twin.result[table.metric]) for run, twin in paired]))
    text = f'{difference.mean:+.{digits}f}'
    if not np.isnan(difference.error):
        text += f' ({difference.low:+.{digits}f} to {difference.high:+.{digits}f})'
    speeds = [(speed(run), speed(twin)) for run, twin in paired]
    ratios = [ours / theirs for ours, theirs in speeds if ours and theirs]
    return [text, f'{np.mean(ratios):.2f}x' if ratios else '']


def columns(table: Table) -> list[str]:
    """Headings of a table's rows."""
    metric = 'test accuracy %' if table.metric == 'test_accuracy' else 'validation loss, nats'
    last = ['bits a byte'] if table.metric == 'eval_loss' else ['published %'] if sources([table]) else []
    return [
        'method', 'density', 'nonzeros', 'runs', metric, 'standard error', '95% interval', *_paired_columns(table), *last,
        'operations of training', 'of inference', 'steps/s', 'seconds a run',
    ]  # fmt: skip


def _paired_columns(table: Table) -> list[str]:
    unit = 'points' if table.metric == 'test_accuracy' else 'nats'
    return [f'minus dense, {unit} (95% interval)', 'speed of dense'] if any(pairs(table, group) for group in table.groups) else []


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
        is_complete = all('validation_bits_per_byte' in run.result for run in group.runs)
        beside = [f'{group.values("validation_bits_per_byte").mean():.4f}' if is_complete else '']
    cost = lambda part: (
        f'{100 * group.values(f"operations_{part}_against_dense").mean():.1f}%'
        if all(f'operations_{part}_against_dense' in run.result for run in group.runs)
        else ''
    )
    has_error = not np.isnan(mean.error)
    speeds = [value for value in map(speed, group.runs) if value]
    return [
        group.label,
        f'{group.density:.3g}' if group.density < 0.001 else f'{100 * group.density:.3g}%',
        f'{nonzeros[0]:,}' if len(nonzeros) == 1 else f'{nonzeros[0]:,} to {nonzeros[-1]:,}',
        str(len(group.runs)),
        f'{mean.mean:.{digits}f}',
        f'{mean.error:.{digits}f}' if has_error else '',
        f'{mean.low:.{digits}f} to {mean.high:.{digits}f}' if has_error else '',
        *(_against_dense(table, group, scale, digits) if _paired_columns(table) else ()),
        *beside,
        cost('training'),
        cost('inference'),
        f'{np.mean(speeds):.3g}' if speeds else '',
        f'{group.values("seconds").mean():.1f}',
    ]


def sources(tables: Sequence[Table]) -> list[str]:
    """Where the published numbers of the tables come from."""
    names = {}
    for table in tables:
        for group in table.groups:
            if table.metric == 'test_accuracy':
                names |= dict.fromkeys(n.source for n in published.find(table.model, table.data, group.method, group.density))
    return list(names)
