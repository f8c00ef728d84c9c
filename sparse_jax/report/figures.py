"""The report's figures as inline SVG: accuracy against density and operations, while training, and each layer's density over time."""

import html
from collections.abc import Callable, Sequence

import numpy as np

from sparse_jax.report import aggregate, svg


def overview(table: aggregate.Table, number: int) -> str:
    """The table's three figures with their captions, as HTML; those that there is nothing for are left out."""
    captions = (
        ('density', _by_density, 'Bars are 95% intervals; the band is the dense network’s.'),
        ('operations', _by_operations, 'Each point is a density, as in the figure beside it.'),
        ('training', _over_time, 'Evaluations while training, mean over seeds, at each method’s middle density.'),
    )
    drawn = ''
    for name, draw, caption in captions:
        if drawing := svg.figure(lambda axes, draw=draw: draw(axes, table), f'{number}-{name}', (5.4, 3.7)):
            drawn += f'<figure>{drawing}<figcaption>{caption}</figcaption></figure>'
    return drawn


def _scale(table: aggregate.Table) -> tuple[float, str]:
    return (100, 'test accuracy %') if table.metric == 'test_accuracy' else (1, 'validation loss, nats a token')


def _curves(table: aggregate.Table) -> dict[str, list[aggregate.Group]]:
    """The sparse groups of each method, by falling density."""
    curves: dict[str, list[aggregate.Group]] = {}
    for group in table.groups:
        if group.method != 'dense':
            curves.setdefault(group.label, []).append(group)
    return curves


def _series(axes, table: aggregate.Table, horizontal: Callable[[aggregate.Group], float]) -> None:
    scale = _scale(table)[0]
    curves = _curves(table)
    for i, (label, groups) in enumerate(curves.items()):
        aside = 1.015 ** (i - (len(curves) - 1) / 2)  # so that bars at one density do not hide each other
        stats = [aggregate.interval(scale * group.values(table.metric)) for group in groups]
        half = np.nan_to_num([s.high - s.mean for s in stats])
        x, y = [aside * horizontal(group) for group in groups], [s.mean for s in stats]
        colour = svg.SERIES[i % len(svg.SERIES)]
        axes.errorbar(x, y, half, color=colour, marker='o', markersize=4, linewidth=1.5, capsize=2, elinewidth=1, label=label)


def _dense_band(axes, table: aggregate.Table) -> None:
    scale = _scale(table)[0]
    for i, group in enumerate(g for g in table.groups if g.method == 'dense'):
        mean = aggregate.interval(scale * group.values(table.metric))
        axes.axhline(mean.mean, color=svg.INK, linewidth=1, linestyle=svg.DASHES[i % len(svg.DASHES)], label=group.label)
        if not np.isnan(mean.error):
            axes.axhspan(mean.low, mean.high, color=svg.INK, alpha=0.1, linewidth=0)


def least_shown(values: Sequence[float]) -> float:
    """Where an axis of these values begins, so that one that lies far below the others does not flatten them; -inf: no such value.

    A value is far off where it is below the lower quartile by more than three times the distance of the quartiles, and by more than that
    of the others' ends.

    >>> least_shown([90.0, 91.0, 92.0, 93.0, 10.0]), least_shown([90.0, 91.0, 92.0, 88.0])
    (90.0, -inf)
    """
    low, high = np.quantile(values, [0.25, 0.75])
    near = [value for value in values if value >= low - 3 * (high - low)]
    far = [value for value in values if value < min(near) - (max(near) - min(near))] if near else []
    return min(near) if far and len(values) > 3 else float('-inf')


def _mark_outliers(axes) -> None:
    """Cuts the axis above values that lie far below the others, and says at its edge what they are."""
    points = [(x, y) for line in axes.get_lines() if line.get_marker() == 'o' for x, y in zip(*line.get_data(), strict=True)]
    bottom = least_shown([y for _, y in points]) if points else float('-inf')
    if not np.isfinite(bottom):
        return
    highest = max(float(np.max(line.get_ydata())) for line in axes.get_lines())
    top = highest + 0.3 * max(highest - bottom, 1e-9)
    edge = bottom - 0.12 * (top - bottom)
    axes.set_ylim(edge, top)
    for x, y in points:
        if y < bottom:
            axes.annotate(
                f'{y:.3g}',
                (x, edge),
                xytext=(0, 12),
                textcoords='offset points',
                ha='center',
                fontsize=8,
                color=svg.INK,
                arrowprops={'arrowstyle': '->', 'color': svg.INK},
            )


def _keep_below_100(axes, table: aggregate.Table) -> None:
    _mark_outliers(axes)
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


def _by_density(axes, table: aggregate.Table) -> bool:
    densities = [group.density for groups in _curves(table).values() for group in groups]
    if not densities:
        return False
    _dense_band(axes, table)
    _series(axes, table, lambda group: group.density)
    _percent_axis(axes, densities)
    _keep_below_100(axes, table)
    metric = _scale(table)[1]
    axes.set(xlabel='density', ylabel=metric, title=f'{metric.rstrip(" %").partition(",")[0]} against density')
    svg.legend(axes)
    return True


def _by_operations(axes, table: aggregate.Table) -> bool:
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


def _over_time(axes, table: aggregate.Table) -> bool:
    """One curve a method: dense, and each method's group of the middle density."""
    scale, metric = _scale(table)
    kind = 'accuracy' if table.metric == 'test_accuracy' else 'loss'
    chosen = [
        (group, svg.INK, svg.DASHES[i % len(svg.DASHES)]) for i, group in enumerate(g for g in table.groups if g.method == 'dense')
    ]
    for i, groups in enumerate(_curves(table).values()):
        chosen.append((groups[len(groups) // 2], svg.SERIES[i % len(svg.SERIES)], '-'))
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
        svg.legend(axes)
    return drawn


_NAMED = 8  # layers that get a colour and a name each


def densities(table: aggregate.Table, number: int) -> list[str]:
    """Density of each layer over time, a fold for each method, as parts of HTML."""
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
            if drawing := svg.figure(draw, f'{number}-{i}-{j}', (4.2, 3.1)):
                figures += f'<figure>{drawing}</figure>'
        if figures:
            seed = groups[0].runs[0].config['seed']
            is_open = '' if parts else ' open'
            parts.append(
                f'<details{is_open}><summary>{html.escape(label)}, seed {seed}</summary><div class="figures small">{figures}</div></details>'
            )
    return ['<h3>Density of each layer over time</h3>', *parts] if parts else []


def _layer_densities(axes, group: aggregate.Group, low: float) -> bool:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    run = group.runs[0]
    rows = [(row['step'], row['density']) for row in run.rows if isinstance(row.get('density'), dict) and row['density']]
    if not rows:
        return False
    steps = [step for step, _ in rows] + [run.result['steps']]
    names = list(rows[0][1])
    for k, name in enumerate(names):
        values = [density.get(name, np.nan) for _, density in rows]
        label = name.removesuffix('/kernel')
        if len(names) <= _NAMED:
            look = dict(color=svg.SERIES[k % len(svg.SERIES)], label=label)
        else:  # from the first layer, faint, to the last
            label = {0: f'{label} (faint) to', len(names) - 1: label}.get(k)
            look = dict(color=svg.SERIES[0], alpha=0.25 + 0.75 * k / (len(names) - 1), label=label)
        axes.plot(steps, [*values, values[-1]], drawstyle='steps-post', linewidth=1.3, **look)
    axes.set(title=f'density {100 * group.density:.3g}%', xlabel='step', yscale='log', ylim=(0.8 * low, 1.25))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{100 * v:.3g}%'))
    axes.yaxis.set_minor_formatter(NullFormatter())
    svg.legend(axes)
    return True
