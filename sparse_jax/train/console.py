"""What stands on the console: lines above the progress bar, and tables whose rows can be told apart, however long the names in them are."""

import functools
import logging
import time
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table

from sparse_jax.stats.tables import shorten

_LEAST = 20  # letters of a name


@functools.cache
def stderr() -> Console:
    """The console that the progress bar and the log's lines share, so that these stand above that."""
    return Console(stderr=True)


class _Lines(logging.Handler):
    """Lines with the time of day, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f'{time.strftime("%H:%M:%S", time.localtime(record.created))} {record.getMessage()}'
            stderr().print(text, markup=False, highlight=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


def show_log() -> None:
    """The package's log goes to the console, in lines for people, from now on."""
    logger = logging.getLogger('sparse_jax')
    logger.handlers[:] = [_Lines()]
    logger.propagate = False


def named_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int,
    left: Collection[str] = (),
    total: Sequence[str] | None = None,
) -> Table:
    """A table to print. Its first column holds names, which are cut in the middle where the table would be too wide.

    Args:
      title: heading.
      columns: names of the columns.
      rows: cells of each row.
      width: of the console, in letters.
      left: columns whose cells begin at the left, beside the first; those of all others end at the right.
      total: a last row, set apart.

    Returns:
      The table.

    Example:
      >>> from rich.console import Console
      >>> rows = [('encoder/layer_7/attention/query/kernel', '5%')]
      >>> Console(width=40).print(named_table('layers', ('layer', 'density'), rows, width=40))  # doctest: +NORMALIZE_WHITESPACE
                      layers
      ┏━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━┓
      ┃ layer                    ┃ density ┃
      ┡━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━┩
      │ encoder/layer_7/…/kernel │      5% │
      └──────────────────────────┴─────────┘
    """
    every_row = [columns, *rows, *([total] if total else [])]
    others = sum(max(map(len, cells)) for cells in list(zip(*every_row, strict=True))[1:])
    room = max(_LEAST, width - others - 3 * len(columns) - 1)
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify='left' if i == 0 or column in left else 'right', no_wrap=i == 0)
    for name, *cells in rows:
        table.add_row(shorten(name, room), *cells)
    if total:
        table.add_section()
        table.add_row(*total)
    return table
