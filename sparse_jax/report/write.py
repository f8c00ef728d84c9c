"""The report on many runs as files: report.html, one page with everything in it, and report.md."""

import pathlib
from collections.abc import Sequence

from sparse_jax.report import aggregate
from sparse_jax.report.collect import Problem, collect, relative
from sparse_jax.report.page import page
from sparse_jax.runtime import workdir


def write_report(folder: pathlib.Path, sources: Sequence[pathlib.Path] = ()) -> dict[str, pathlib.Path]:
    """Writes ``report.html`` and ``report.md``, and prints the tables.

    Args:
      folder: to write to: a run's workdir, a sweep's, or any folder that holds some; with `sources` any folder, made if need be.
      sources: folders with the runs, in place of `folder`.

    Returns:
      The two files, by ``html`` and ``md``.

    Raises:
      ValueError: if there is no run, or the folder cannot be written.
    """
    workdir.check_name(folder)
    for flag, source in [('--runs', source) for source in sources] or [('--workdir', folder)]:
        if not source.is_dir():
            raise ValueError(f'{flag}={source} is not a folder: give the folder of a run, of a sweep, or of several.')
    runs, problems = collect(sources or [folder])
    tables = aggregate.tables(runs)
    texts = {'html': page(tables, problems, folder), 'md': markdown(tables, problems, folder)}
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


def markdown(tables: Sequence[aggregate.Table], problems: Sequence[Problem], folder: pathlib.Path) -> str:
    """All tables as Markdown, and what is not in them."""
    lines = []
    for table in tables:
        heads = aggregate.columns(table)
        lines += [f'**{table.model} on {table.data}**', '', '| ' + ' | '.join(heads) + ' |']
        lines += ['|---|' + '---:|' * (len(heads) - 1)]
        lines += ['| ' + ' | '.join(aggregate.cells(table, group)) + ' |' for group in table.groups] + ['']
    if where := aggregate.sources(tables):
        lines += [f'Published, by whole trainings with the settings of: {"; ".join(where)}.', '']
    if problems:
        lines += ['Not in the tables:', '']
        lines += [f'- `{relative(problem.folder, folder)}`: {problem.reason}' for problem in problems] + ['']
    return '\n'.join(lines)
