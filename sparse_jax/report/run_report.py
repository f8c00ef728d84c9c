"""The report on one finished run: tables, and report.png, a picture of how it learned and where its weights went."""

import pathlib
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sparse_jax.report import collect
from sparse_jax.runtime import records
from sparse_jax.train import kernel_choice
from sparse_jax.train.console import named_table
from sparse_jax.train.result import INPUT_COUNTS, REPORT, headline


def show(folder: pathlib.Path) -> None:
    """Prints a finished run's tables, and draws ``report.png`` where there is none yet.

    Args:
      folder: the run's workdir.

    Raises:
      ValueError: if it has no result.
    """
    path = folder / records.RESULT
    if not path.exists():
        raise ValueError(f'--workdir={folder} has no result: train first, with --mode=train.')
    result = {key: value for key, value in records.read(path).items() if value is not None}
    if not (folder / REPORT).exists():
        _draw_run(folder, result)
    machine = collect.machine_of(folder)
    if machine.get('kernels', 'auto') == 'auto':
        kernel_choice.print_table(folder)
    print_table(result, machine.get('attention'))
    newest = max((int(path.name) for path in (folder / 'checkpoints').glob('[0-9]*') if path.name.isdecimal()), default=None)
    where = {'result': records.RESULT, 'report': REPORT} | ({} if newest is None else {'checkpoint': f'checkpoints/{newest}'})
    print('\n'.join(f'{name + ":":<11} {folder / path}' for name, path in where.items()))


def _draw_run(folder: pathlib.Path, result: dict[str, Any]) -> None:
    sparse_size = sum(size for _, size in result.get('layers', {}).values())
    title = f'{result["model"]}, {result["method"]}: {headline(result)} with {result["nonzeros"]:,} of {sparse_size:,} weights'
    dense = None if result['method'] == 'dense' else collect.dense_twin(folder)
    draw(
        folder / REPORT,
        collect.rows_of(folder),
        title=textwrap.fill(title, 110),
        input_counts=_input_counts(folder),
        dense=[] if dense is None else dense.rows,
    )


def _input_counts(folder: pathlib.Path) -> np.ndarray | None:
    """What the run left of its input's weights; None where that is not there, or cannot be read."""
    try:
        counts = np.load(folder / INPUT_COUNTS)
    except (OSError, ValueError, EOFError):
        return None
    return counts if counts.ndim == 2 and counts.size and counts.dtype.kind in 'iuf' else None


def _bytes(count: float) -> str:
    return f'{count / 1024:.0f} KiB' if count < 1024**2 else f'{count / 1024**2:.1f} MiB'


def print_table(result: dict[str, Any], attention: str | None = None) -> None:
    """Prints a run's result: sizes, accuracy and time.

    Args:
      result: content of ``result.json``.
      attention: what computed it, in a Transformer.
    """
    console = Console()
    layers = result.get('layers', {})
    total = sum(size for _, size in layers.values())
    table = named_table(
        f'{result["model"]}, {result["method"]}',
        ('layer', 'weights', 'nonzeros', 'density'),
        [(name, f'{size:,}', f'{nonzeros:,}', f'{nonzeros / size:.2%}') for name, (nonzeros, size) in layers.items()],
        width=console.width,
        total=('all of these', f'{total:,}', f'{result["nonzeros"]:,}', f'{result["density"]:.2%}'),
    )
    console.print(table)

    dense = 4 * result['parameters']
    sparse = 4 * (result['parameters'] - total + result['nonzeros']) + total / 8
    facts = Table(show_header=False)
    facts.add_column()
    facts.add_column(justify='right')
    quality = _TEXT_QUALITY if 'eval_loss' in result else _QUALITY
    _add_rows(facts, result, quality)
    facts.add_row('parameters', f'{result["parameters"]:,}')
    facts.add_row('size dense, float32', _bytes(dense))
    facts.add_row('size sparse, float32 values + 1-bit mask', _bytes(sparse))
    _add_rows(facts, result, _COST)
    facts.add_row('steps', f'{result["steps"]:,}')
    if attention:
        facts.add_row('attention by', attention)
    facts.add_row('training time', f'{result["seconds"]:.1f} s ({result["steps"] / max(result["seconds"], 1e-9):.3g} steps/s)')
    console.print(facts)


# A row's name, the key of its number, and how that is written.
_QUALITY = (('test accuracy', 'test_accuracy', '.2%'),)
_TEXT_QUALITY = (
    ('validation loss, nats a token', 'eval_loss', '.4f'),
    ('validation, bits a byte', 'validation_bits_per_byte', '.4f'),
    ('validation accuracy of the next token', 'validation_accuracy', '.2%'),
)
_COST = (
    ('multiply-adds of inference, against dense', 'operations_inference_against_dense', '.1%'),
    ('multiply-adds of training, against dense', 'operations_training_against_dense', '.1%'),
    ('weights that have ever existed', 'exploration_rate', '.1%'),
)


def _add_rows(table: Table, result: dict[str, Any], rows: Sequence[tuple[str, str, str]]) -> None:
    """Those numbers that the result has."""
    for name, key, form in rows:
        if key in result:
            table.add_row(name, format(result[key], form))


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[Any]]:
    chosen = [row for row in rows if key in row]
    return [row['step'] for row in chosen], [row[key] for row in chosen]


_NAMED = 8  # layers that get a colour and a name each


def _short(name: str) -> str:
    return name.removeprefix('layers/').replace('/kernel', '')


def draw(
    path: pathlib.Path,
    rows: list[dict[str, Any]],
    *,
    title: str,
    input_counts: np.ndarray | None,
    dense: Sequence[dict[str, Any]] = (),
) -> None:
    """Saves a run's picture: loss, accuracy, each layer's density over time, and the weights that each input pixel kept.

    Where densities do not move, the pruning is drawn in their place; of a dense run the learning rate and the speed.

    Args:
      path: PNG file to write.
      rows: the lines of ``metrics.jsonl``.
      title: heading.
      input_counts: number of weights each input pixel kept, [height, width]; None: the weights that moved are drawn instead.
      dense: the lines of the dense run that it is to be compared with; empty: none.
    """
    import matplotlib as mpl

    with mpl.rc_context({'text.parse_math': False}):  # names are names, whatever signs they hold
        _draw(path, rows, title, input_counts, dense)


def _draw(
    path: pathlib.Path, rows: list[dict[str, Any]], title: str, input_counts: np.ndarray | None, dense: Sequence[dict[str, Any]]
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    (loss_axes, accuracy_axes), (third, last) = figure.subplots(2, 2)
    markers = dict(marker='o', markersize=3) if sum('flips' in row for row in rows) < 25 else {}  # there may be one point only
    _draw_learning(loss_axes, accuracy_axes, rows, markers, dense)
    _log_ticks(loss_axes, lambda v, _: f'{v:g}')
    densities = [row['density'] for row in rows if isinstance(row.get('density'), dict) and row['density']]
    moves = any(density != densities[0] for density in densities)
    if moves:
        _draw_densities(figure, third, rows)
        _log_ticks(third, lambda v, _: f'{100 * v:.3g}%')
    else:
        _draw_numbers(
            third,
            rows,
            *(('prune_rate', 'prune rate') if _series(rows, 'prune_rate')[0] else ('learning_rate', 'learning rate')),
            markers,
        )
    if input_counts is not None:
        image = last.imshow(input_counts, cmap='viridis')
        last.set(title='weights that each input pixel kept', xticks=[], yticks=[])
        figure.colorbar(image, ax=last)
    else:
        _draw_numbers(
            last,
            rows,
            *(
                ('flips', 'mask positions that an update flipped')
                if _series(rows, 'flips')[0]
                else ('steps_per_second', 'steps a second')
            ),
            markers,
        )
    for axes in (loss_axes, accuracy_axes, third) if input_counts is not None else (loss_axes, accuracy_axes, third, last):
        axes.grid(alpha=0.3)
    with records.replacing(path, '.tmp.png') as partial:
        figure.savefig(partial, dpi=110)


def _draw_numbers(axes, rows: list[dict[str, Any]], key: str, title: str, markers: dict[str, Any]) -> None:
    axes.plot(*_series(rows, key), color='tab:purple', **markers)
    axes.set(title=title, xlabel='step')
    axes.set_ylim(bottom=0)


def _draw_learning(
    loss_axes, accuracy_axes, rows: list[dict[str, Any]], markers: dict[str, Any], dense: Sequence[dict[str, Any]]
) -> None:
    """Loss and accuracy over time, in training and on the other parts of the data; a dense run's as dashes."""
    from matplotlib.ticker import PercentFormatter

    both = {'loss': loss_axes, 'accuracy': accuracy_axes}
    for name, axes in both.items():
        axes.plot(*_series(rows, name), label='training', color='tab:blue')
        for part, color in (('validation', 'tab:green'), ('test', 'tab:orange')):
            for lines, look in ((rows, markers), (dense, dict(linestyle='--', linewidth=1))):
                steps, values = _series(list(lines), f'{part}_{name}')
                if steps:
                    axes.plot(steps, values, label=part if lines is rows else f'{part}, dense', color=color, **look)
        axes.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0), fontsize=9)
    loss_axes.set(title='loss (cross entropy, nats)', xlabel='step', yscale='log')
    accuracy_axes.set(title='accuracy', xlabel='step')
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if accuracies := sorted(value for row in rows for key, value in row.items() if key.endswith('accuracy')):
        accuracy_axes.set_ylim(max(0.0, accuracies[len(accuracies) // 10] - 0.03), min(accuracies[-1] + 0.05, 1.005))


def _draw_densities(figure, axes, rows: list[dict[str, Any]]) -> None:
    """Density of each layer over time; many layers get a colour scale in place of names."""
    import matplotlib.cm
    import matplotlib.colors

    axes.set(title='density of each layer', xlabel='step')
    steps, densities = _series([row for row in rows if isinstance(row.get('density'), dict)], 'density')
    if not densities or not densities[0]:
        axes.text(0.5, 0.5, 'dense: every weight exists', ha='center', transform=axes.transAxes)
        return
    last = max(row['step'] for row in rows)
    names = list(densities[0])
    many = len(names) > _NAMED
    for i, layer in enumerate(names):
        values = [d.get(layer, np.nan) for d in densities]
        look = dict(color=matplotlib.colormaps['viridis'](i / (len(names) - 1))) if many else dict(label=layer)
        axes.plot([*steps, last], [*values, values[-1]], drawstyle='steps-post', linewidth=1 if many else 1.5, **look)
    axes.set_yscale('log')
    if many:
        colours = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, len(names) - 1), 'viridis')
        bar = figure.colorbar(colours, ax=axes, ticks=[0, len(names) - 1])
        bar.ax.set_yticklabels([_short(names[0]), _short(names[-1])], fontsize=8)
    else:
        axes.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _log_ticks(axes, write: Callable[[float, int], str]) -> None:
    """Ticks at 1, 2 and 5 of each decade of a logarithmic scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axes.get_yscale() != 'log':
        return
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(write))
    axes.yaxis.set_minor_formatter(NullFormatter())
