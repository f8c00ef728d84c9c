"""The report as one self-contained HTML page: tables, and figures as inline SVG whose colours follow the reader's light or dark theme."""

import datetime
import html
import os
import pathlib
import urllib.parse
from collections.abc import Sequence

from sparse_jax.report import aggregate, figures
from sparse_jax.report.collect import Problem, Run, relative
from sparse_jax.train.result import REPORT

# Of the figures' series, on light and on dark paper.
_LIGHT = ['#1f6fb4', '#c8501e', '#2b8a3e', '#8d4bb8', '#b5830f', '#0b8a94', '#b8336a', '#5c636b']
_DARK = ['#6cb2f2', '#ff9a6b', '#6fd087', '#cfa0f2', '#e8c25c', '#5fd4dd', '#f28ab5', '#aeb6bf']

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
a { color: inherit }
"""


def page(tables: Sequence[aggregate.Table], problems: Sequence[Problem], folder: pathlib.Path) -> str:
    """The whole page.

    Args:
      tables: from :func:`sparse_jax.report.aggregate.tables`.
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
        body += _section(table, number, folder)
    if where := aggregate.sources(tables):
        body.append(
            f'<h2>Published numbers</h2><p>By whole trainings with the settings of their sources:</p><ul>{"".join(f"<li>{html.escape(source)}</li>" for source in where)}</ul>'
        )
    if problems:
        items = ''.join(
            f'<li><code>{html.escape(relative(p.folder, folder))}</code>: {html.escape(p.reason)}</li>' for p in problems
        )
        body.append(f'<h2 id="problems">Not in the tables</h2><ul class="problems">{items}</ul>')
    title = f'Sparse training: {html.escape(folder.resolve().name)}'
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html><html lang="en"><head>{head}<title>{title}</title><style>{style}</style></head><body>{"".join(body)}</body></html>\n'


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


class _Html(str):
    """What a cell holds, escaped already."""


def _link(run: Run, folder: pathlib.Path) -> _Html:
    """The folder of a run, with a link to its own report where that is there."""
    name = html.escape(relative(run.folder, folder))
    if not (run.folder / REPORT).is_file():
        return _Html(name)
    return _Html(f'<a href="{urllib.parse.quote(os.fsencode(os.path.relpath(run.folder / REPORT, folder)))}">{name}</a>')


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], starts: Sequence[bool] = ()) -> str:
    marks = [*starts, *[False] * (len(rows) - len(starts))]
    shown = lambda cell: cell if isinstance(cell, _Html) else html.escape(str(cell))
    row = lambda cells, kind: ''.join(f'<{kind}>{shown(cell)}</{kind}>' for cell in cells)
    lines = ''.join(f'<tr{" class=first" if mark else ""}>{row(cells, "td")}</tr>' for cells, mark in zip(rows, marks, strict=True))
    return f'<div class="scroll"><table><thead><tr>{row(heads, "th")}</tr></thead><tbody>{lines}</tbody></table></div>'


def _section(table: aggregate.Table, number: int, folder: pathlib.Path) -> list[str]:
    groups = table.groups
    starts = [i > 0 and group.label != groups[i - 1].label for i, group in enumerate(groups)]
    parts = [f'<h2>{html.escape(table.model)} on {html.escape(table.data)}</h2>']
    parts.append(_html_table(aggregate.columns(table), [aggregate.cells(table, group) for group in groups], starts))
    parts.append(
        '<p class="soft">Mean over seeds, its standard error, and its 95% interval by Student’s t. Each run is compared with the dense one of its seed '
        'and settings; speeds leave compilation out. Operations are multiply-adds that the method needs, against the dense network’s.</p>'
    )
    parts.append(f'<div class="figures">{figures.overview(table, number)}</div>')
    parts += figures.densities(table, number)
    parts.append('<h3>Speed and cost of each run</h3>' + _cost(table, folder))
    return parts


def _cost(table: aggregate.Table, folder: pathlib.Path) -> str:
    rows = []
    for group in table.groups:
        for run in group.runs:
            machine, result = run.machine, run.result
            memory = machine.get('max_memory_mib')
            rows.append([
                f'{group.label}, {100 * group.density:.3g}%', run.config['seed'], f'{result[table.metric]:.4f}', f'{result["steps"]:,}',
                f'{result["seconds"]:.1f}', f'{result["steps"] / max(result["seconds"], 1e-9):.3g}', f'{memory:,}' if memory else '',
                machine.get('device', ''), machine.get('jax', ''), machine.get('resumed_at', ''), _link(run, folder), machine.get('command', ''),
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
        'folder',
        'command',
    ]
    return f'<details><summary>{_count(len(rows), "run")}</summary>{_html_table(heads, rows)}</details>'
