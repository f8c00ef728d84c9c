"""A plan as one self-contained HTML page."""

import datetime
import html
from collections.abc import Sequence

from sparse_jax.plan import computation, convolution, figures, reasons, scaling
from sparse_jax.plan.answers import Answer
from sparse_jax.plan.network import Network
from sparse_jax.plan.words import hours, many, milliseconds, size
from sparse_jax.report import html_page


def page(title: str, answers: Sequence[Answer], chosen: Answer, command: str) -> str:
    """The whole page.

    Args:
      title: what is planned.
      answers: of all kinds of devices.
      chosen: the recommended one.
      command: that made the page.

    Returns:
      HTML with everything inside.
    """
    network = chosen.plan.network
    now = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')
    body = [
        f'<h1>Plan: {html.escape(title)}</h1>',
        f'<p class="soft">Arithmetic, not a measurement. Made on {now} by <code>{html.escape(command)}</code></p>',
    ]
    body.append(f'<p><strong>{html.escape(headline(chosen))}</strong></p>')
    body.append(f'<ul>{"".join(f"<li>{html.escape(text)}</li>" for text in reasons.reasons(chosen, answers))}</ul>')
    body.append(f'<p>{_flags(chosen)}</p>')
    body += [f'<p class="soft">{html.escape(text)}</p>' for text in network.assumed]
    body.append('<h2>Devices</h2>' + html_page.table(COLUMNS, [row(a) for a in answers]))
    body.append(f'<div class="figures">{figures.all_figures(answers, chosen)}</div>')
    body.append('<h2>Memory of each device</h2>' + _memory(answers))
    body.append('<h2>Layers</h2>' + _layers(network))
    if convolutions := _convolutions(network):
        body.append(convolutions)
    if network.is_transformer:
        body.append(_scaling(network))
    body.append(_computation(network))
    body.append(
        '<h2>Sources</h2><ul>'
        + ''.join(f'<li>{html.escape(f"{a.device.title}: {a.device.source}")}</li>' for a in answers)
        + '</ul>'
    )
    return html_page.page(f'Plan: {title}', body)


COLUMNS: tuple[str, ...] = (
    'devices',
    'data x model',
    'ms a step',
    'a second',
    'time',
    'cost',
    'kWh',
    'memory',
    'of peak FLOP/s',
    'limited by',
    'vs dense',
)


def row(answer: Answer) -> list[str]:
    """The cells of one kind of device."""
    plan = answer.plan
    name = f'{plan.devices} x {answer.device.name}' + (f' (of {answer.number})' if plan.devices < answer.number else '')
    memory = f'{size(plan.memory.peak)}' + ('' if plan.fits else ': does not fit')
    if not plan.fits:
        return [name, plan.choice.mesh.short, '', '', '', '', '', memory, '', '', '']
    return [
        name, plan.choice.mesh.short, milliseconds(plan.step.seconds), many(plan.throughput), hours(plan.hours),
        '' if plan.cost is None else f'{plan.cost:,.2f}', '' if plan.energy is None else f'{plan.energy:.3g}', memory, f'{plan.utilization:.0%}',
        answer.limit, f'{answer.speedup:.2f}x' if plan.network.rule is not None else '',
    ]  # fmt: skip


def headline(answer: Answer) -> str:
    """The recommendation, in a sentence."""
    plan = answer.plan
    text = f'{plan.devices} x {answer.device.name}, {plan.choice.mesh}: {plan.throughput:,.0f} {plan.network.unit} a second, {hours(plan.hours)} for {plan.network.steps:,} steps'
    return text + (f', at a cost of {plan.cost:,.2f}.' if plan.cost is not None else '.')


def _flags(answer: Answer) -> str:
    flags = ' '.join(answer.plan.flags())
    return f'Flags for it: <code>{html.escape(flags)}</code>' if flags else 'The config is that already.'


def _memory(answers: Sequence[Answer]) -> str:
    names = ('weights', 'optimizer', 'masks', 'gradients', 'copies', 'activations', 'logits')
    rows = [
        [f'{a.plan.devices} x {a.device.name}', *(size(getattr(a.plan.memory, name)) for name in names), size(a.plan.memory.peak), size(a.device.memory)]
        for a in answers
    ]  # fmt: skip
    return html_page.table(('devices', *names, 'at the peak', 'there is'), rows)


def _layers(network: Network) -> str:
    """Multiply-adds of each weight, dense and at its density."""
    densities, rows = network.densities(), []
    for name, shape in network.counts.leaves.items():
        products = [p for p in network.counts.products if p.name == name]
        if products:
            operations = sum(p.operations for p in products)
            backward = sum(p.operations * (1 + p.needs_input_gradient) for p in products)
            density = densities.get(name, 1.0)
            rows.append([
                name, 'x'.join(map(str, shape)), f'{density:.2%}', f'{1e-6 * operations:,.4g}', f'{1e-6 * operations * density:,.4g}',
                f'{1e-6 * backward:,.4g}', f'{sum(p.written for p in products):,}',
            ])  # fmt: skip
    heads = ('weight', 'shape', 'density', 'forward, dense', 'forward', 'backward, dense', 'activations')
    note = '<p class="soft">Millions of multiply-adds, and elements written, for one example.</p>'
    return f'<details><summary>{len(rows)} weights</summary>{html_page.table(heads, rows)}{note}</details>'


def _convolutions(network: Network) -> str:
    """Which algorithm has the fewest operations for each convolution."""
    densities, batch, rows = network.densities(), network.config.data.batch_size, []
    for product in network.counts.products:
        if product.geometry:
            height, width, inputs, *taps, outputs, stride, high, wide = product.geometry
            layer = convolution.Layer(height, width, inputs, outputs, (taps[0], taps[1]), stride, (high, wide))
            costs = convolution.algorithms(layer, batch, densities.get(product.name, 1.0))
            cells = {cost.algorithm.partition(',')[0]: f'{1e-9 * cost.operations:.3g}' if not cost.note else '' for cost in costs}
            columns = ('direct', 'im2col', 'FFT', 'Winograd', 'sparse direct')
            rows.append(
                [
                    product.name,
                    f'{height}x{width}x{inputs}',
                    'x'.join(map(str, (*taps, inputs, outputs))),
                    *(cells.get(c, '') for c in columns),
                    costs[0].algorithm,
                ]
            )
    if not rows:
        return ''
    heads = ('convolution', 'image', 'kernel', 'direct', 'im2col', 'FFT', 'Winograd', 'sparse direct', 'fewest')
    note = f'<p class="soft">Billions of multiply-adds of a batch of {batch}, forward, by formula; transforms are counted in halves of an operation.</p>'
    return f'<h2>Algorithms of convolution</h2><details><summary>{len(rows)} convolutions</summary>{html_page.table(heads, rows)}{note}</details>'


def _scaling(network: Network) -> str:
    """What a published law says of the loss at several densities."""
    config = network.config
    tokens = float(config.data.batch_size * network.length * network.steps)
    choices = scaling.choices(network.counts.parameters, tokens)
    head = '<h2>Loss by density</h2>'
    if not choices:
        low, high = scaling.PARAMETERS
        return (
            head
            + f'<p class="soft">The published law holds for {low:.2g} to {high:.3g} parameters; this network has {network.counts.parameters:.3g}.</p>'
        )
    rows = [[f'{c.density:g}', f'{c.active:,.0f}', f'{c.loss:.3f}'] for c in choices]
    note = (
        f'By the law of <a href="https://arxiv.org/abs/2606.01155">When Data Is Scarce</a> for {tokens:.3g} tokens, each seen once: nats a token on C4 with its '
        'vocabulary, for comparing densities and not for this text.'
    )
    return head + html_page.table(('density', 'parameters that exist', 'predicted loss'), rows) + f'<p class="soft">{note}</p>'


def _computation(network: Network) -> str:
    """The run beside known amounts."""
    operations = computation.of_training(network)
    rows = [
        [c.amount.name, f'{c.amount.operations:.2g}', f'{c.times:.2g}', c.amount.source] for c in computation.compare(operations)
    ]
    text = (
        f'The products of the whole training take {operations:.2g} operations at this density. Amounts of others are counted in nearly the same way. '
        'Of brains, estimates differ by eight orders of magnitude: they compare amounts of arithmetic, and say nothing of what either can do.'
    )
    return f'<h2>The scale of it</h2><p>{text}</p>' + html_page.table(('amount', 'operations', 'this training is', 'source'), rows)
