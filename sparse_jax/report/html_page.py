"""What the HTML pages share: one self-contained file, whose colours follow the reader's light or dark theme."""

import html
from collections.abc import Sequence

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


class Html(str):
    """What a cell holds, escaped already."""


def page(title: str, body: Sequence[str]) -> str:
    """A whole page.

    Args:
      title: as plain text.
      body: HTML.
    """
    series = lambda colours: ' '.join(f'--series-{i}: {colour};' for i, colour in enumerate(colours))
    style = _STYLE.replace('SERIES_LIGHT', series(_LIGHT)).replace('SERIES_DARK', series(_DARK))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html><html lang="en"><head>{head}<title>{html.escape(title)}</title><style>{style}</style></head><body>{"".join(body)}</body></html>\n'


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], starts: Sequence[bool] = ()) -> str:
    """A table that scrolls sideways; `starts` marks rows that begin a group."""
    marks = [*starts, *[False] * (len(rows) - len(starts))]
    shown = lambda cell: cell if isinstance(cell, Html) else html.escape(str(cell))
    row = lambda cells, kind: ''.join(f'<{kind}>{shown(cell)}</{kind}>' for cell in cells)
    lines = ''.join(f'<tr{" class=first" if mark else ""}>{row(cells, "td")}</tr>' for cells, mark in zip(rows, marks, strict=True))
    return f'<div class="scroll"><table><thead><tr>{row(heads, "th")}</tr></thead><tbody>{lines}</tbody></table></div>'
