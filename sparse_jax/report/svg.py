"""A matplotlib figure as inline SVG, whose colours are variables that the page sets for a light or a dark theme."""

import io
import re
import textwrap
from collections.abc import Callable
from typing import Any

# Colours that matplotlib writes stand for CSS variables, which the page sets for either theme.
INK, GRID = '#010203', '#040506'
SERIES = [f'#0a0b{i:02x}' for i in range(16, 24)]
DASHES: list[Any] = [(0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))]  # of dense networks
_VARIABLES = {INK: 'var(--ink)', GRID: 'var(--grid)'} | {c: f'var(--series-{i})' for i, c in enumerate(SERIES)}


def figure(draw: Callable[[Any], bool], salt: str, size: tuple[float, float]) -> str:
    """An inline SVG of what `draw` draws on axes; empty where it draws nothing."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        'svg.fonttype': 'none', 'svg.hashsalt': salt, 'font.size': 10, 'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': INK,
        'xtick.color': INK, 'ytick.color': INK, 'axes.titlecolor': INK, 'grid.color': GRID, 'axes.spines.top': False,
        'axes.spines.right': False, 'text.parse_math': False, 'axes.grid': True, 'axes.axisbelow': True, 'legend.frameon': False, 'axes.titlesize': 10,
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


def legend(axes) -> None:
    """Below the axes, in as many columns as the figure is wide enough for; a label that is longer than a line takes several."""
    handles, labels = axes.get_legend_handles_labels()
    width = int(15 * axes.figure.get_figwidth())  # letters
    labels = [textwrap.fill(label, int(0.75 * width)) for label in labels]
    longest = max((len(line) for label in labels for line in label.split('\n')), default=0)
    columns = max(1, min(4, width // (longest + 7)))
    axes.figure.legend(handles, labels, loc='outside lower center', ncols=columns, fontsize=9)


def plain_axis(axis, base: int) -> None:
    """Numbers as people write them on a logarithmic axis, at powers of the base, and between these where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=base, subs=(1.0,) if base == 2 else (1.0, 2.0, 5.0), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}' if 1 <= value < 1e6 else f'{value:g}'))
    axis.set_minor_formatter(NullFormatter())


def percent_axis(axis) -> None:
    """Shares as percents on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{100 * value:g}%'))
    axis.set_minor_formatter(NullFormatter())


def power_axis(axis) -> None:
    """Powers of ten on a logarithmic axis over many of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:.0e}'.replace('e+', 'e')))
    axis.set_minor_formatter(NullFormatter())
