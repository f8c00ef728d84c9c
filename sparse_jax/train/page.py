"""The report as one self-contained HTML page: tables, and figures as inline SVG whose colours follow the reader's light or dark theme."""

import datetime
import html
import io
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparse_jax.train import summary

# Colours that matplotlib writes stand for CSS variables, which the page sets for either theme.
_INK, _GRID = '#010203', '#040506'
_SERIES = [f'#0a0b{i:02x}' for i in range(16, 24)]
_LIGHT = ['#1f6fb4', '#c8501e', '#2b8a3e', '#8d4bb8', '#b5830f', '#0b8a94', '#b8336a', '#5c636b']
_DARK = ['#6cb2f2', '#ff9a6b', '#6fd087', '#cfa0f2', '#e8c25c', '#5fd4dd', '#f28ab5', '#aeb6bf']
_DASHES: list[Any] = [(0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))]  # of dense networks
_VARIABLES = {_INK: 'var(--ink)', _GRID: 'var(--grid)'} | {c: f'var(--series-{i})' for i, c in enumerate(_SERIES)}

_STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1c2024; --soft: #5b646d; --grid: #d9dde1; --panel: #f3f4f5; SERIES_LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e6e9ec; --soft: #9aa4ad; --grid: #333a41; --panel: #1d2226; SERIES_DARK }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--grid); padding-bottom: .25rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
p, li { max-width: 48rem }
.soft, figcaption { color: var(--soft); font-size: .875rem }
.scroll { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap }
th { font-weight: 600; white-space: normal; vertical-align: bottom; border-bottom: 2px solid var(--ink) }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
tbody tr + tr td { border-top: 1px solid var(--grid) }
tbody tr.first td { border-top: 1px solid var(--soft) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem }
.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); margin-top: .5rem }
.small figure { max-width: 26rem }
figure { margin: 0; min-width: 0 }
figure svg { display: block; width: 100%; height: auto }
figcaption { margin-top: .25rem }
details { background: var(--panel); border-radius: .4rem; padding: .5rem .75rem; margin: .5rem 0 }
details td:first-child, details th:first-child { background: var(--panel) }
summary { cursor: pointer; font-weight: 600 }
.problems li { margin: .2rem 0 }
code { font-size: .875em; overflow-wrap: anywhere }
"""


def page(tables: Sequence[summary.Table], problems: Sequence[summary.Problem], folder: pathlib.Path) -> str:
    """The whole page.

    Args:
      tables: from :func:`sparse_jax.train.summary.tables`.
      problems: workdirs that are not in them.
      folder: that the report is of.

    Returns:
      HTML with everything inside.
    """
    series = lambda colours: ' '.join(f'--series-{i}: {colour};' for i, colour in enumerate(colours))
    style = _STYLE.replace('SERIES_LIGHT', series(_LIGHT)).replace('SERIES_DARK', series(_DARK))
    runs = [run for table in tables for group in table.groups for run in group.runs]
    now = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')
    hours = sum(run.result['seconds'] for run in runs) / 3600
    text = f'{_count(len(runs), "finished run")}, {hours:.2g} hours of training in all. Made on {now}.'
    body = [f'<h1>Sparse training: {html.escape(folder.resolve().name)}</h1>', f'<p class="soft">{text}</p>']
    if problems:
        left_out = _count(len(problems), 'workdir')
        body.append(f'<p><strong>{left_out} not in the tables</strong>: <a href="#problems">see the end of this page</a>.</p>')
    for number, table in enumerate(tables):
        body += _section(table, number)
    if where := summary.sources(tables):
        body.append(
            f'<h2>Published numbers</h2><p>By whole trainings with the settings of their sources:</p><ul>{"".join(f"<li>{html.escape(source)}</li>" for source in where)}</ul>'
        )
    if problems:
        items = ''.join(
            f'<li><code>{html.escape(summary.relative(p.folder, folder))}</code>: {html.escape(p.reason)}</li>' for p in problems
        )
        body.append(f'<h2 id="problems">Not in the tables</h2><ul class="problems">{items}</ul>')
    title = f'Sparse training: {html.escape(folder.resolve().name)}'
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html><html lang="en"><head>{head}<title>{title}</title><style>{style}</style></head><body>{"".join(body)}</body></html>\n'


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], starts: Sequence[bool] = ()) -> str:
    marks = [*starts, *[False] * (len(rows) - len(starts))]
    row = lambda cells, kind: ''.join(f'<{kind}>{html.escape(str(cell))}</{kind}>' for cell in cells)
    lines = ''.join(f'<tr{" class=first" if mark else ""}>{row(cells, "td")}</tr>' for cells, mark in zip(rows, marks, strict=True))
    return f'<div class="scroll"><table><thead><tr>{row(heads, "th")}</tr></thead><tbody>{lines}</tbody></table></div>'


def _section(table: summary.Table, number: int) -> list[str]:
    groups = table.groups
    starts = [i > 0 and group.label != groups[i - 1].label for i, group in enumerate(groups)]
    parts = [f'<h2>{html.escape(table.model)} on {html.escape(table.data)}</h2>']
    parts.append(_html_table(summary.columns(table), [summary.cells(table, group) for group in groups], starts))
    parts.append(
        '<p class="soft">Mean over seeds, its standard error, and its 95% interval by Student’s t. Operations are multiply-adds that the '
        'method needs, against the dense network’s.</p>'
    )
    captions = (
        ('density', _by_density, 'Bars are 95% intervals; the band is the dense network’s.'),
        ('operations', _by_operations, 'Each point is a density, as in the figure beside it.'),
        ('training', _over_time, 'Evaluations while training, mean over seeds, at each method’s middle density.'),
    )
    figures = ''
    for name, draw, caption in captions:
        if svg := _figure(lambda axes, draw=draw: draw(axes, table), f'{number}-{name}', (5.4, 3.7)):
            figures += f'<figure>{svg}<figcaption>{caption}</figcaption></figure>'
    parts.append(f'<div class="figures">{figures}</div>')
    parts += _densities(table, number)
    parts.append('<h3>Speed and cost of each run</h3>' + _cost(table))
    return parts


def _cost(table: summary.Table) -> str:
    rows = []
    for group in table.groups:
        for run in group.runs:
            machine, result = run.machine, run.result
            memory = machine.get('max_memory_mib')
            rows.append([
                f'{group.label}, {100 * group.density:.3g}%', run.config['seed'], f'{result[table.metric]:.4f}', f'{result["steps"]:,}',
                f'{result["seconds"]:.1f}', f'{result["steps"] / max(result["seconds"], 1e-9):.3g}', f'{memory:,}' if memory else '',
                machine.get('device', ''), machine.get('jax', ''), machine.get('resumed_at', ''),
            ])  # fmt: skip
    heads = [
        'run',
        'seed',
        table.metric.replace('_', ' '),
        'steps',
        'seconds',
        'steps/s',
        'memory MiB',
        'device',
        'jax',
        'resumed at',
    ]
    return f'<details><summary>{_count(len(rows), "run")}</summary>{_html_table(heads, rows)}</details>'


def _figure(draw: Callable[[Any], bool], salt: str, size: tuple[float, float]) -> str:
    """An inline SVG of what `draw` draws on axes; empty where it draws nothing."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        'svg.fonttype': 'none', 'svg.hashsalt': salt, 'font.size': 10, 'text.color': _INK, 'axes.labelcolor': _INK, 'axes.edgecolor': _INK,
        'xtick.color': _INK, 'ytick.color': _INK, 'axes.titlecolor': _INK, 'grid.color': _GRID, 'axes.spines.top': False,
        'axes.spines.right': False, 'axes.grid': True, 'axes.axisbelow': True, 'legend.frameon': False, 'axes.titlesize': 10,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout='constrained')
        FigureCanvasSVG(figure)
        if not draw(figure.subplots()):
            return ''
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
    svg = buffer.getvalue()
    svg = svg[svg.index('<svg') :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r'font: (\d+\S*) [^;\"]*', r'font: \1 system-ui, sans-serif', svg)
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r'\1\2\3', svg, count=1
    )


def _legend(axes) -> None:
    """Below the axes, in as many columns as the figure is wide enough for."""
    labels = axes.get_legend_handles_labels()[1]
    room = 15 * axes.figure.get_figwidth() / (max(map(len, labels)) + 7)  # letters
    axes.figure.legend(loc='outside lower center', ncols=max(1, min(4, int(room))), fontsize=9)


def _scale(table: summary.Table) -> tuple[float, str]:
    return (100, 'test accuracy %') if table.metric == 'test_accuracy' else (1, 'validation loss, nats a token')


def _curves(table: summary.Table) -> dict[str, list[summary.Group]]:
    """The sparse groups of each method, by falling density."""
    curves: dict[str, list[summary.Group]] = {}
    for group in table.groups:
        if group.method != 'dense':
            curves.setdefault(group.label, []).append(group)
    return curves


def _series(axes, table: summary.Table, horizontal: Callable[[summary.Group], float]) -> None:
    scale = _scale(table)[0]
    curves = _curves(table)
    for i, (label, groups) in enumerate(curves.items()):
        aside = 1.015 ** (i - (len(curves) - 1) / 2)  # so that bars at one place do not hide each other
        stats = [summary.interval(scale * group.values(table.metric)) for group in groups]
        half = np.nan_to_num([s.high - s.mean for s in stats])
        x, y = [aside * horizontal(group) for group in groups], [s.mean for s in stats]
        colour = _SERIES[i % len(_SERIES)]
        axes.errorbar(x, y, half, color=colour, marker='o', markersize=4, linewidth=1.5, capsize=2, elinewidth=1, label=label)


def _dense_band(axes, table: summary.Table) -> None:
    scale = _scale(table)[0]
    for i, group in enumerate(g for g in table.groups if g.method == 'dense'):
        mean = summary.interval(scale * group.values(table.metric))
        axes.axhline(mean.mean, color=_INK, linewidth=1, linestyle=_DASHES[i % len(_DASHES)], label=group.label)
        if not np.isnan(mean.error):
            axes.axhspan(mean.low, mean.high, color=_INK, alpha=0.1, linewidth=0)


def _keep_below_100(axes, table: summary.Table) -> None:
    if table.metric == 'test_accuracy':
        axes.set_ylim(top=min(axes.get_ylim()[1], 100))


def _percent_axis(axes, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale('log')
    few = 1 < len(set(ticks)) <= 8
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(ticks))) if few else LogLocator(subs=(1, 2, 5)))
    if few:
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{100 * v:.3g}%'))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _by_density(axes, table: summary.Table) -> bool:
    densities = [group.density for groups in _curves(table).values() for group in groups]
    if not densities:
        return False
    _dense_band(axes, table)
    _series(axes, table, lambda group: group.density)
    _percent_axis(axes, densities)
    _keep_below_100(axes, table)
    metric = _scale(table)[1]
    axes.set(xlabel='density', ylabel=metric, title=f'{metric.rstrip(" %").partition(",")[0]} against density')
    _legend(axes)
    return True


def _by_operations(axes, table: summary.Table) -> bool:
    key = 'operations_training_against_dense'
    if not _curves(table) or not all(key in run.result for group in table.groups for run in group.runs):
        return False
    _dense_band(axes, table)
    _series(axes, table, lambda group: float(group.values(key).mean()))
    _percent_axis(axes, ())
    _keep_below_100(axes, table)
    metric = _scale(table)[1]
    axes.set(
        xlabel='multiply-adds of training, against dense',
        ylabel=metric,
        title=f'{metric.rstrip(" %").partition(",")[0]} against operations',
    )
    return True


def _over_time(axes, table: summary.Table) -> bool:
    """One curve a method: dense, and each method's group of the middle density."""
    scale, metric = _scale(table)
    kind = 'accuracy' if table.metric == 'test_accuracy' else 'loss'
    chosen = [(group, _INK, _DASHES[i % len(_DASHES)]) for i, group in enumerate(g for g in table.groups if g.method == 'dense')]
    for i, groups in enumerate(_curves(table).values()):
        chosen.append((groups[len(groups) // 2], _SERIES[i % len(_SERIES)], '-'))
    drawn = False
    for group, colour, dashes in chosen:
        curves = {}
        for run in group.runs:
            for row in run.rows:
                for part in ('validation', 'test'):
                    if f'{part}_{kind}' in row:
                        curves.setdefault(row['step'], []).append(scale * row[f'{part}_{kind}'])
                        break
        if len(curves) < 2:
            continue
        steps = sorted(curves)
        label = group.label if group.method == 'dense' else f'{group.label}, {100 * group.density:.3g}%'
        axes.plot(steps, [np.mean(curves[step]) for step in steps], color=colour, linestyle=dashes, linewidth=1.5, label=label)
        drawn = True
    if drawn:
        values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
        low, high = np.quantile(values, 0.1 if kind == 'accuracy' else 0), np.quantile(values, 1 if kind == 'accuracy' else 0.9)
        axes.set_ylim(low - 0.1 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9)
        axes.set(xlabel='step', ylabel=metric.replace('test ', ''), title='while training')
        _legend(axes)
    return drawn


_NAMED = 8  # layers that get a colour and a name each


def _densities(table: summary.Table, number: int) -> list[str]:
    """Density of each layer over time, a fold for each method."""
    parts = []
    for i, (label, groups) in enumerate(_curves(table).items()):
        values = [
            v
            for group in groups
            for row in group.runs[0].rows
            if isinstance(row.get('density'), dict)
            for v in row['density'].values()
        ]
        low = min((v for v in values if v > 0), default=1.0)
        figures = ''
        for j, group in enumerate(groups):
            draw = lambda axes, group=group, low=low: _layer_densities(axes, group, low)
            if svg := _figure(draw, f'{number}-{i}-{j}', (4.2, 3.1)):
                figures += f'<figure>{svg}</figure>'
        if figures:
            seed = groups[0].runs[0].config['seed']
            is_open = '' if parts else ' open'
            parts.append(
                f'<details{is_open}><summary>{html.escape(label)}, seed {seed}</summary><div class="figures small">{figures}</div></details>'
            )
    return ['<h3>Density of each layer over time</h3>', *parts] if parts else []


def _layer_densities(axes, group: summary.Group, low: float) -> bool:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    run = group.runs[0]
    rows = [(row['step'], row['density']) for row in run.rows if isinstance(row.get('density'), dict)]
    if not rows:
        return False
    steps = [step for step, _ in rows] + [run.result['steps']]
    names = list(rows[0][1])
    for k, name in enumerate(names):
        values = [density.get(name, np.nan) for _, density in rows]
        label = name.removesuffix('/kernel')
        if len(names) <= _NAMED:
            look = dict(color=_SERIES[k % len(_SERIES)], label=label)
        else:  # from the first layer, faint, to the last
            label = {0: f'{label} (faint) to', len(names) - 1: label}.get(k)
            look = dict(color=_SERIES[0], alpha=0.25 + 0.75 * k / (len(names) - 1), label=label)
        axes.plot(steps, [*values, values[-1]], drawstyle='steps-post', linewidth=1.3, **look)
    axes.set(title=f'density {100 * group.density:.3g}%', xlabel='step', yscale='log', ylim=(0.8 * low, 1.25))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{100 * v:.3g}%'))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
    return True
