"""The figures of a plan as inline SVG."""

import functools
from collections.abc import Sequence

from sparse_jax.plan import computation, step_time
from sparse_jax.plan.answers import BLOCK, Answer
from sparse_jax.report import svg

_WIDE = (5.4, 3.7)


def all_figures(answers: Sequence[Answer], chosen: Answer) -> str:
    """All figures with their captions, as HTML; those that there is nothing for are left out."""
    rows = (
        ('density', functools.partial(_by_density, answers=answers), _WIDE, 'A step against the density of its sparse layers; dashed: the dense network.'),
        (
            'devices', functools.partial(_by_number, answers=answers), _WIDE,
            'A step against the number of devices, each at its best mesh; the share of it in which nothing hides communication stands at the points.',
        ),
        ('limits', functools.partial(_limits, answers=answers), _WIDE, 'What limits the step, by the share of its time.'),
        (
            'roofline', functools.partial(_roofline, answer=chosen), _WIDE,
            f'Forward products of {chosen.device.name}: those under the slope are limited by its bandwidth, those under the flat line by its arithmetic.',
        ),
        ('cost', functools.partial(_cost, answers=answers), _WIDE, 'The whole training: time against cost.'),
        (
            'scale', functools.partial(_scale, chosen=chosen), (5.4, 4.4),
            'The computation of the training beside known amounts; bars are ranges of what is said of them.',
        ),
    )  # fmt: skip
    drawn = ''
    for name, draw, size, caption in rows:
        if drawing := svg.figure(draw, f'plan-{name}', size):
            drawn += f'<figure>{drawing}<figcaption>{caption}</figcaption></figure>'
    return drawn


def _name(answer: Answer) -> str:
    return f'{answer.number} x {answer.device.name}'


def _colour(i: int) -> str:
    return svg.SERIES[i % len(svg.SERIES)]


def _by_density(axes, answers: Sequence[Answer]) -> bool:
    """Milliseconds of a step by density."""
    drawn = False
    for i, answer in enumerate(answers):
        if answer.by_density and answer.plan.fits:
            densities, seconds = zip(*answer.by_density, strict=True)
            axes.plot(densities, [1e3 * s for s in seconds], 'o-', ms=4, color=_colour(i), label=_name(answer))
            axes.axhline(1e3 * answer.dense_seconds, color=_colour(i), lw=1, ls=svg.DASHES[0])
            if answer.blocks:
                label = f'{_name(answer)}, blocks of {BLOCK}'
                densities, seconds = zip(*answer.blocks, strict=True)
                axes.plot(densities, [1e3 * s for s in seconds], 's:', ms=3, color=_colour(i), label=label)
            drawn = True
    axes.set(xscale='log', xlabel='density', ylabel='ms a step', title='Where sparsity pays')
    axes.set_ylim(bottom=0)
    svg.percent_axis(axes.xaxis)
    svg.legend(axes)
    return drawn


def _by_number(axes, answers: Sequence[Answer]) -> bool:
    """Milliseconds of a step by devices, with the share of communication."""
    drawn = False
    for i, answer in enumerate(answers):
        plans = [plan for plan in answer.by_number if plan.fits]
        if len(plans) < 2:
            continue
        axes.plot(
            [p.devices for p in plans], [1e3 * p.step.seconds for p in plans], 'o-', ms=4, color=_colour(i), label=_name(answer)
        )
        for plan in plans[1:]:
            share = plan.step.communication / plan.step.seconds
            if share >= 0.005:
                at = plan.devices, 1e3 * plan.step.seconds
                axes.annotate(f'{share:.0%}', at, textcoords='offset points', xytext=(3, 4), fontsize=8)
        drawn = True
    axes.set(xscale='log', yscale='log', xlabel='devices', ylabel='ms a step', title='More devices')
    svg.plain_axis(axes.xaxis, base=2)
    svg.plain_axis(axes.yaxis, base=10)
    svg.legend(axes)
    return drawn


def _limits(axes, answers: Sequence[Answer]) -> bool:
    """Shares of the step, a bar a device."""
    fitting = [a for a in answers if a.plan.fits][::-1]
    if not fitting:
        return False
    left = [0.0] * len(fitting)
    for i, name in enumerate(fitting[0].plan.step.limits()):
        shares = [100 * a.plan.step.limits()[name] for a in fitting]
        axes.barh([_name(a) for a in fitting], shares, left=left, color=_colour(i), label=name, height=0.6)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set(xlabel='% of the step', title='What limits it', xlim=(0, 100))
    axes.grid(visible=False, axis='y')
    svg.legend(axes)
    return True


def _roofline(axes, answer: Answer) -> bool:
    """Operations a second that each product can reach, by operations a byte."""
    plan, device = answer.plan, answer.device
    config = plan.network.config
    examples = config.data.batch_size / plan.devices
    peak, reached = device.operations(config.model.dtype), device.efficiency['bandwidth'] * device.bandwidth
    points = []
    for product in plan.network.counts.products:
        arithmetic, traffic = step_time.dense_seconds(product, examples, device, config.model.dtype, plan.choice.mesh.model)
        operations = 2 * product.operations * examples
        points.append((operations / (traffic * reached), operations / max(arithmetic, traffic), product.name == ''))
    if not points:
        return False
    xs = [0.3 * min(p[0] for p in points), 3 * max([p[0] for p in points] + [peak / reached])]
    axes.plot([xs[0], peak / reached, xs[1]], [1e-12 * reached * xs[0], 1e-12 * peak, 1e-12 * peak], color=svg.INK, lw=1)
    level = 1e-12 * peak * device.efficiency['products']
    axes.plot(
        [max(xs[0], level / (1e-12 * reached)), xs[1]],
        [level, level],
        color=svg.INK,
        lw=1,
        ls=svg.DASHES[1],
        label='what products reach',
    )
    for of_attention, label in ((False, 'with a weight'), (True, 'attention')):
        some = [p for p in points if p[2] == of_attention]
        if some:
            axes.plot(
                [p[0] for p in some], [1e-12 * p[1] for p in some], 'o', ms=4, alpha=0.8, color=_colour(of_attention), label=label
            )
    axes.set(xscale='log', yscale='log', xlabel='operations a byte', ylabel='TFLOP/s', title='Roofline of the products')
    svg.plain_axis(axes.xaxis, base=10)
    svg.plain_axis(axes.yaxis, base=10)
    svg.legend(axes)
    return True


def _cost(axes, answers: Sequence[Answer]) -> bool:
    """Cost by hours, of every number of devices."""
    drawn = False
    for i, answer in enumerate(answers):
        plans = [plan for plan in answer.by_number if plan.fits and plan.cost is not None]
        if plans:
            axes.plot([p.hours for p in plans], [p.cost for p in plans], 'o-', ms=4, color=_colour(i), label=_name(answer))
            for plan in plans:
                axes.annotate(str(plan.devices), (plan.hours, plan.cost), textcoords='offset points', xytext=(3, 4), fontsize=8)
            drawn = True
    axes.set(xscale='log', xlabel='hours', ylabel='cost', title='Cost against time')
    axes.set_ylim(bottom=0)
    svg.plain_axis(axes.xaxis, base=10)
    svg.legend(axes)
    return drawn


def _scale(axes, chosen: Answer) -> bool:
    """The run's operations among known amounts, on a logarithmic axis."""
    network = chosen.plan.network
    rows = computation.amounts()
    mine = computation.of_training(network)
    names = [row.name for row in rows]
    for i, row in enumerate(rows):
        if row.high > row.low:
            axes.plot([row.low, row.high], [i, i], color=_colour(0), lw=5, alpha=0.35, solid_capstyle='butt')
        axes.plot(row.operations, i, 'o', ms=5, color=_colour(0))
    axes.axvline(mine, color=_colour(1), lw=1.5, label=f'this training: {mine:.1e}')
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xscale='log', xlabel='operations', title='The scale of it')
    svg.power_axis(axes.xaxis)
    axes.grid(visible=False, axis='y')
    svg.legend(axes)
    return True
