"""Why a plan is as it is, in sentences."""

import math
from collections.abc import Sequence

from sparse_jax.plan.answers import BLOCK, PAYS, Answer
from sparse_jax.plan.hardware import Device
from sparse_jax.plan.words import milliseconds, size

# What moves a limit, where it is the largest.
_MOVES = {
    'units for products': 'a device with more tensor cores or a higher peak, or a lower density where sparse kernels run',
    'memory bandwidth': 'a device with more bandwidth, bfloat16, compact storage, or fewer passes between the products',
    'links': 'faster links, fewer devices, or a larger batch',
    'launches': 'a larger batch for each device, or fewer devices',
}


def reasons(answer: Answer, others: Sequence[Answer] = ()) -> list[str]:
    """Why, in sentences."""
    plan, network = answer.plan, answer.plan.network
    shares = plan.step.limits()
    sentences = [_of_mesh(answer)]
    sentences.append(
        f'{shares[answer.limit]:.0%} of the step is limited by {answer.limit}; what would move it: {_MOVES[answer.limit]}.'
    )
    if plan.devices > 1 and plan.step.sent.bytes:
        sent = plan.step.hidden + plan.step.communication
        hides = f'{plan.step.hidden / sent:.0%} of it behind other work' if sent else 'nothing'
        sentences.append(
            f'Each device sends {size(plan.step.sent.bytes)} a step, which takes {milliseconds(sent)} ms; it hides {hides}.'
        )
    if network.is_transformer and plan.choice.keeps_scores(answer.device):
        sentences.append(
            f'Attention runs as XLA makes it on {answer.device.name}: its scores are written and kept for the backward pass.'
        )
    if network.rule is not None:
        sentences.append(answer.kernels)
        if answer.speedup >= 1 / PAYS:
            below = '' if answer.pays_below is None else f'; it pays below a density of about {answer.pays_below:g}'
            sentences.append(
                f'At a density of {network.density:.3g} a step is {answer.speedup:.2f}x as fast as the dense one{below}.'
            )
        elif answer.pays_below is not None:
            sentences.append(
                f'At a density of {network.density:.3g} a step is no faster than the dense one: it pays below about {answer.pays_below:g}.'
            )
        else:
            sentences.append('A sparse step is no faster than a dense one here, at any density.')
        nearest = lambda point: abs(math.log(point.density / network.density))
        if answer.blocks and (point := min(answer.blocks, key=nearest)).seconds < PAYS * answer.dense_seconds:
            sentences.append(
                f'With sparsity.granularity=block:{BLOCK}x{BLOCK} it would be {answer.dense_seconds / point.seconds:.2f}x as fast as the dense one at '
                f'a density of {point.density:g}; what that does to the accuracy is to be tried.'
            )
    cheaper = [a for a in others if a is not answer and a.plan.fits]
    for other in cheaper:
        sentences.append(
            f'{other.plan.devices} x {other.device.name} take {other.plan.hours / plan.hours:.2g}x as long'
            + (f' and cost {other.plan.cost / plan.cost:.2g}x' if other.plan.cost and plan.cost else '')
            + f': there {other.limit} limits most.'
        )
    sentences.append(certainty(answer.device))
    return sentences


def _of_mesh(answer: Answer) -> str:
    """Why it is this mesh."""
    plan, mesh = answer.plan, answer.plan.choice.mesh
    if answer.number == 1:
        return 'There is one device.'
    if plan.devices < answer.number:
        return (
            f'{plan.devices} of {answer.number} devices are as fast as all: a mesh must divide the batch of '
            f'{plan.network.config.data.batch_size} and the layers, and more devices would wait for each other or have too little to do.'
        )
    data, model = answer.data_parallel, answer.model_parallel
    hides = ', which hide behind the backward pass' if answer.device.efficiency['overlap'] else ''
    if mesh.model == 1 and model is not None:
        versus = (
            f'{model.step.seconds / plan.step.seconds:.2g}x as long as this with {model.choice.mesh}'
            if model.fits
            else 'more memory than there is'
        )
        text = f'Data parallelism: it sends gradients{hides}; model parallelism sends activations and takes {versus}.'
    elif mesh.model > 1 and data is not None:
        versus = f'{data.step.seconds / plan.step.seconds:.2g}x as long' if data.fits else 'more memory than there is'
        text = f'Model parallelism beside data parallelism: alone the latter takes {versus}.'
    else:
        text = 'Data parallelism: layers are not divided.'
    if mesh.sharded:
        text += ' Weights and optimizer are divided over the data axis, as they would not fit whole or take longer.'
    return text


def certainty(device: Device) -> str:
    """How sure the prediction is."""
    if device.kind == 'cpu':
        return (
            f'How sure: {device.name} is known by {device.fitted_on}; steps of most networks are within 25% (docs/planning.md).'
            if device.fitted_on
            else f'How sure: nothing of {device.name} was measured.'
        )
    if device.fitted_on:
        return f'How sure: efficiencies of {device.name} were fitted on {device.fitted_on}; most other published trainings are within 30% (docs/planning.md).'
    return f'How sure: nothing of {device.name} was measured: its sheet and the usual efficiency of its kind, within a factor of 1.5 to 2.'
