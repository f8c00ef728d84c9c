"""What a finished run shows: a table, and a picture of how it learned and where its weights went."""

import pathlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


def _bytes(count: float) -> str:
    return f'{count / 1024:.0f} KiB' if count < 1024**2 else f'{count / 1024**2:.1f} MiB'


def headline(result: dict[str, Any]) -> str:
    """A run's result in a few words.

    >>> headline({'test_accuracy': 0.934}), headline({'eval_loss': 1.5, 'validation_bits_per_byte': 2.164})
    ('93.40% test accuracy', 'validation loss 1.500 nats a token, 2.164 bits a byte')
    """
    if 'eval_loss' in result:
        return f'validation loss {result["eval_loss"]:.3f} nats a token, {result["validation_bits_per_byte"]:.3f} bits a byte'
    return f'{result["test_accuracy"]:.2%} test accuracy'


def print_table(result: dict[str, Any]) -> None:
    """Prints a run's result: sizes, accuracy and time.

    Args:
      result: content of ``result.json``.
    """
    console = Console()
    table = Table(title=f'{result["model"]}, {result["method"]}')
    for column in ('layer', 'weights', 'nonzeros', 'density'):
        table.add_column(column, justify='left' if column == 'layer' else 'right')
    for name, (nonzeros, size) in result['layers'].items():
        table.add_row(name, f'{size:,}', f'{nonzeros:,}', f'{nonzeros / size:.2%}')
    table.add_section()
    total = sum(size for _, size in result['layers'].values())
    table.add_row('all of these', f'{total:,}', f'{result["nonzeros"]:,}', f'{result["density"]:.2%}')
    console.print(table)

    dense = 4 * result['parameters']
    sparse = 4 * (result['parameters'] - total + result['nonzeros']) + total / 8
    facts = Table(show_header=False)
    facts.add_column()
    facts.add_column(justify='right')
    if 'eval_loss' in result:
        facts.add_row('validation loss, nats a token', f'{result["eval_loss"]:.4f}')
        facts.add_row('validation, bits a byte', f'{result["validation_bits_per_byte"]:.4f}')
        facts.add_row('validation accuracy of the next token', f'{result["validation_accuracy"]:.2%}')
    else:
        facts.add_row('test accuracy', f'{result["test_accuracy"]:.2%}')
    facts.add_row('parameters', f'{result["parameters"]:,}')
    facts.add_row('size dense, float32', _bytes(dense))
    facts.add_row('size sparse, float32 values + 1-bit mask', _bytes(sparse))
    for part in ('inference', 'training'):
        facts.add_row(f'multiply-adds of {part}, against dense', f'{result[f"operations_{part}_against_dense"]:.1%}')
    if 'exploration_rate' in result:
        facts.add_row('weights that have ever existed', f'{result["exploration_rate"]:.1%}')
    facts.add_row('steps', f'{result["steps"]:,}')
    facts.add_row('training time', f'{result["seconds"]:.1f} s ({result["steps_per_second"]:.3g} steps/s)')
    console.print(facts)


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[Any]]:
    chosen = [row for row in rows if key in row]
    return [row['step'] for row in chosen], [row[key] for row in chosen]


_NAMED = 8  # layers that get a colour and a name each


def _short(name: str) -> str:
    return name.removeprefix('layers/').replace('/kernel', '')


def draw(path: pathlib.Path, rows: list[dict[str, Any]], *, title: str, input_counts: np.ndarray | None) -> None:
    """Saves a run's picture: loss, accuracy, each layer's density over time, and the weights that each input pixel kept.

    Args:
      path: PNG file to write.
      rows: the lines of ``metrics.jsonl``.
      title: heading.
      input_counts: number of weights each input pixel kept, [height, width]; None: the weights that moved are drawn instead.
    """
    import matplotlib.cm
    import matplotlib.colors
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    figure = Figure(figsize=(11, 7.5), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    (loss_axes, accuracy_axes), (density_axes, last_axes) = figure.subplots(2, 2)

    few = dict(marker='o', markersize=3) if sum('flips' in row for row in rows) < 25 else {}  # there may be one only
    loss_axes.plot(*_series(rows, 'loss'), label='training', color='tab:blue')
    accuracy_axes.plot(*_series(rows, 'accuracy'), label='training', color='tab:blue')
    for part, color in (('validation', 'tab:green'), ('test', 'tab:orange')):
        if any(f'{part}_loss' in row for row in rows):
            loss_axes.plot(*_series(rows, f'{part}_loss'), label=part, color=color, **few)
            accuracy_axes.plot(*_series(rows, f'{part}_accuracy'), label=part, color=color, **few)
    loss_axes.set(title='loss (cross entropy, nats)', xlabel='step', yscale='log')
    accuracy_axes.set(title='accuracy', xlabel='step')
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if shown := sorted(value for row in rows for key, value in row.items() if key.endswith('accuracy')):
        accuracy_axes.set_ylim(max(0.0, shown[len(shown) // 10] - 0.03), min(shown[-1] + 0.05, 1.005))
    loss_axes.legend()
    accuracy_axes.legend()

    steps, densities = _series(rows, 'density')
    if densities:
        last = max(row['step'] for row in rows)
        names = list(densities[0])
        many = len(names) > _NAMED
        for i, layer in enumerate(names):
            values = [d[layer] for d in densities]
            look = dict(color=matplotlib.colormaps['viridis'](i / (len(names) - 1))) if many else dict(label=layer)
            density_axes.plot([*steps, last], [*values, values[-1]], drawstyle='steps-post', linewidth=1 if many else 1.5, **look)
        density_axes.set_yscale('log')
        if many:
            colours = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, len(names) - 1), 'viridis')
            bar = figure.colorbar(colours, ax=density_axes, ticks=[0, len(names) - 1])
            bar.ax.set_yticklabels([_short(names[0]), _short(names[-1])], fontsize=8)
        else:
            density_axes.legend(loc='best')
    else:
        density_axes.text(0.5, 0.5, 'dense: every weight exists', ha='center', transform=density_axes.transAxes)
    density_axes.set(title='density of each layer', xlabel='step')
    for axes, write in ((density_axes, lambda v, _: f'{100 * v:.3g}%'), (loss_axes, lambda v, _: f'{v:g}')):
        if axes.get_yscale() != 'log':
            continue
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(write))
        axes.yaxis.set_minor_formatter(NullFormatter())

    if input_counts is not None:
        image = last_axes.imshow(input_counts, cmap='viridis')
        last_axes.set(title='weights that each input pixel kept', xticks=[], yticks=[])
        figure.colorbar(image, ax=last_axes)
    else:
        last_axes.plot(*_series(rows, 'flips'), color='tab:purple', **few)
        last_axes.set(title='mask positions that an update flipped', xlabel='step')
        last_axes.set_ylim(bottom=0)
    for axes in (loss_axes, accuracy_axes, density_axes):
        axes.grid(alpha=0.3)
    partial = path.with_suffix('.tmp.png')
    figure.savefig(partial, dpi=110)
    partial.replace(path)
