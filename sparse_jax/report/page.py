"""The report as one self-contained HTML page: tables, and figures as inline SVG whose colours follow the reader's light or dark theme."""

import datetime
import html
import os
import pathlib
import urllib.parse
from collections.abc import Sequence

from sparse_jax.report import aggregate, figures, html_page
from sparse_jax.report.collect import Problem, Run, relative
from sparse_jax.report.html_page import Html
from sparse_jax.train.result import REPORT


def page(tables: Sequence[aggregate.Table], problems: Sequence[Problem], folder: pathlib.Path) -> str:
    """The whole page.

    Args:
      tables: from :func:`sparse_jax.report.aggregate.tables`.
      problems: workdirs that are not in them.
      folder: that the report is of.

    Returns:
      HTML with everything inside.
    """
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
    return html_page.page(f'Sparse training: {folder.resolve().name}', body)


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


def _link(run: Run, folder: pathlib.Path) -> Html:
    """The folder of a run, with a link to its own report where that is there."""
    name = html.escape(relative(run.folder, folder))
    if not (run.folder / REPORT).is_file():
        return Html(name)
    return Html(f'<a href="{urllib.parse.quote(os.fsencode(os.path.relpath(run.folder / REPORT, folder)))}">{name}</a>')


def _section(table: aggregate.Table, number: int, folder: pathlib.Path) -> list[str]:
    groups = table.groups
    starts = [i > 0 and group.label != groups[i - 1].label for i, group in enumerate(groups)]
    parts = [f'<h2>{html.escape(table.model)} on {html.escape(table.data)}</h2>']
    parts.append(html_page.table(aggregate.columns(table), [aggregate.cells(table, group) for group in groups], starts))
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
    return f'<details><summary>{_count(len(rows), "run")}</summary>{html_page.table(heads, rows)}</details>'
