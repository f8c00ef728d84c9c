"""What people ask before they train: which devices, which parallelism, which density, and what limits the step; each with its reason."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sparse_jax.plan import memory as memory_lib
from sparse_jax.plan import search, sparse_time
from sparse_jax.plan.collectives import Mesh, ring
from sparse_jax.plan.hardware import Device
from sparse_jax.plan.network import Network
from sparse_jax.plan.search import Plan

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
BLOCK = 64  # the side that is tried where a network has no blocks and only blocks have kernels
_PAYS = 0.97  # of the dense step's time: below that sparsity pays
# What moves a limit, where it is the largest.
_MOVES = {
    'units for products': 'a device with more tensor cores or a higher peak, or a lower density where sparse kernels run',
    'memory bandwidth': 'a device with more bandwidth, bfloat16, compact storage, or fewer passes between the products',
    'links': 'faster links, fewer devices, or a larger batch',
    'launches': 'a larger batch for each device, or fewer devices',
}


class SparsePoint(NamedTuple):
    """What a density comes to, on the same devices and mesh."""

    density: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """All that is said of one kind of device."""

    number: int  # of devices that there are
    plan: Plan
    dense_seconds: float  # of the dense network's step, on the same mesh
    by_density: tuple[SparsePoint, ...]
    by_number: tuple[Plan, ...]  # the best plan of 1, 2, 4, ... devices
    data_parallel: Plan | None  # the best plan without model parallelism
    model_parallel: Plan | None  # the best plan with it
    kernels: str  # which multiply sparse weights
    blocks: tuple[SparsePoint, ...]  # by density, where only blocks have kernels and the network has none: with blocks

    @property
    def device(self) -> Device:
        """The kind."""
        return self.plan.device

    @property
    def speedup(self) -> float:
        """Of the sparse step over the dense one."""
        return self.dense_seconds / self.plan.step.seconds

    @property
    def pays_below(self) -> float | None:
        """The highest density at which a step is clearly faster than the dense one; None: at none."""
        faster = [point.density for point in self.by_density if point.seconds < _PAYS * self.dense_seconds]
        return max(faster, default=None)

    @property
    def limit(self) -> str:
        """What limits the largest share of the step."""
        shares = self.plan.step.limits()
        return max(shares, key=lambda name: shares[name])


def answer(network: Network, device: Device, number: int) -> Answer:
    """What is to be said of a network on devices of a kind.

    Args:
      network: what is trained.
      device: a kind of device.
      number: how many there are at most.

    Returns:
      The best plan, and what it is compared with.
    """
    plan = search.best(network, device, number)
    is_sparse = network.rule is not None

    def at(density: float, of: Network = network) -> float:
        return search.evaluate(of, device, plan.choice, density).step.seconds

    blocks = network.with_blocks(BLOCK) if device.has_blocks and device.kind == 'gpu' and not network.block else None
    numbers = sorted({*(2**i for i in range(int(math.log2(number)) + 1)), number})
    return Answer(
        number=number,
        plan=plan,
        dense_seconds=at(1.0),
        by_density=tuple(SparsePoint(density, at(density)) for density in _possible(network)) if is_sparse else (),
        by_number=tuple(search.best(network, device, n) for n in numbers),
        data_parallel=search.best_of(network, device, number, lambda mesh: mesh.model == 1),
        model_parallel=search.best_of(network, device, number, lambda mesh: mesh.model > 1),
        kernels=sparse_time.kernels_for(device, network.block) if is_sparse else '',
        blocks=tuple(SparsePoint(density, at(density, blocks)) for density in _possible(blocks)) if blocks else (),
    )


def _possible(network: Network) -> list[float]:
    """The densities at which every layer keeps a weight."""
    found = []
    for density in DENSITIES:
        try:
            network.densities(density)
        except ValueError:
            continue
        found.append(density)
    return found


def recommended(answers: Sequence[Answer], deadline: float | None = None) -> Answer:
    """The best of several kinds of devices.

    Without a deadline it is the cheapest of the best plans of all devices that are there, where all have prices, else the fastest. With one
    it is the cheapest plan that meets it, also on fewer devices; without prices the fastest.

    Args:
      answers: of all kinds of devices.
      deadline: hours; None: there is none.

    Returns:
      One of the answers, or one on fewer devices.

    Raises:
      ValueError: where the network fits nowhere, or no devices meet the deadline.
    """
    fitting = [a for a in answers if a.plan.fits]
    if not fitting:
        raise ValueError(_why_nowhere(answers))
    in_time = [a for a in fitting if deadline is None or a.plan.hours <= deadline]
    if not in_time:
        fastest = min(fitting, key=lambda a: a.plan.hours)
        raise ValueError(
            f'--deadline={deadline:g}: no devices train it in so many hours; the fastest, {fastest.plan.devices} x {fastest.device.name}, '
            f'take {hours(fastest.plan.hours)}.'
        )
    if any(a.plan.cost is None for a in in_time):
        return min(in_time, key=lambda a: a.plan.hours)
    if deadline is None:
        return min(in_time, key=lambda a: (a.plan.cost or 0.0, a.plan.hours))
    options = [
        (plan.cost or 0.0, plan.hours, a, plan) for a in in_time for plan in a.by_number if plan.fits and plan.hours <= deadline
    ]
    cost, _, best, plan = min(options, key=lambda option: option[:2])
    if plan.devices == best.plan.devices or cost >= (best.plan.cost or 0.0):
        return best
    return answer(plan.network, plan.device, plan.devices)


def _why_nowhere(answers: Sequence[Answer]) -> str:
    """Why no devices have room, and what would make it fit."""
    nearest = min(answers, key=lambda a: a.plan.memory.peak / memory_lib.usable(a.device))
    plan = nearest.plan
    largest = max(
        ('activations', plan.memory.activations + plan.memory.logits),
        ('weights and optimizer', plan.memory.state),
        key=lambda x: x[1],
    )
    smaller_batch = 'a smaller data.batch_size or data.length'
    would = smaller_batch if largest[0] == 'activations' else "more devices, which divide it, or sparsity.storage='compact'"
    return (
        f'config.model: the network fits on none of these devices: with {plan.devices} x {nearest.device.name} it needs '
        f'{size(plan.memory.peak)} of the {size(memory_lib.usable(nearest.device))} of each, most of it {largest[0]}; '
        f'it would take {would}.'
    )


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
        if answer.speedup >= 1 / _PAYS:
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
        if answer.blocks and (point := min(answer.blocks, key=nearest)).seconds < _PAYS * answer.dense_seconds:
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
        return f'How sure: efficiencies of {device.name} were fitted on {device.fitted_on}; other published trainings are within 30% (docs/planning.md).'
    return f'How sure: nothing of {device.name} was measured: its sheet and the usual efficiency of its kind, within a factor of 1.5 to 2.'


def hours(value: float) -> str:
    """A time for people.

    >>> hours(0.01), hours(1.26), hours(100)
    ('36 s', '1.3 h', '4.2 days')
    """
    if value < 1 / 60:
        return f'{3600 * value:.2g} s'
    if value < 1:
        return f'{60 * value:.2g} min'
    return f'{value:.2g} h' if value < 48 else f'{value / 24:.2g} days'


def many(value: float) -> str:
    """A large number for people.

    >>> many(26971.3), many(1814759)
    ('26,971', '1.81M')
    """
    return f'{value:,.0f}' if value < 1e6 else f'{value / 1e6:.2f}M'


def milliseconds(seconds: float) -> str:
    """A step's time for people, in milliseconds.

    >>> milliseconds(0.0012345), milliseconds(2.5217)
    ('1.23', '2,522')
    """
    return f'{1e3 * seconds:.3g}' if seconds < 0.1 else f'{1e3 * seconds:,.0f}'


def size(value: float) -> str:
    """Bytes for people.

    >>> size(2.5e9), size(3e6), size(51_100)
    ('2.5 GB', '3 MB', '51.1 kB')
    """
    unit, name = next(((u, n) for u, n in ((1e9, 'GB'), (1e6, 'MB')) if value >= u), (1e3, 'kB'))
    return f'{value / unit:.3g} {name}'


class Crossover(NamedTuple):
    """Bytes that one layer sends in a step, by batch and parallelism."""

    batch: int
    data: float
    shared_masks: float
    model: float


def crossover(inputs: int, outputs: int, density: float, devices: int, batches: Sequence[int], width: int = 2) -> list[Crossover]:
    """Where model parallelism sends less than data parallelism: a batch below the inputs; with masks that all know, below density x inputs.

    Data parallelism sums gradients, inputs x outputs of them, or the density's part; model parallelism stacks or adds outputs, batch x
    outputs of them, forward and backward.

    Args:
      inputs: of the layer's weight.
      outputs: of the layer's weight.
      density: of the weight.
      devices: over which it is trained.
      batches: examples of a step, over all devices.
      width: bytes of a number.

    Returns:
      A row for each batch.

    Example:
      >>> [row.data < row.model for row in crossover(1000, 1000, 0.1, 4, (500, 2000))]
      [False, True]
    """
    rows = []
    for batch in batches:
        weights = ring(width * inputs * outputs, devices)
        rows.append(Crossover(batch, weights, density * weights, ring(width * batch * outputs, devices)))
    return rows


def as_json(answers: Sequence[Answer], chosen: Answer) -> Mapping:
    """All numbers, for programs."""
    return {'recommended': _json_of(chosen), 'devices': [_json_of(a) for a in answers]}


def _json_of(answer: Answer) -> dict:
    plan = answer.plan
    mesh: Mesh = plan.choice.mesh
    return {
        'device': answer.device.name,
        'devices': answer.number,
        'used': plan.devices,
        'mesh': {'data': mesh.data, 'model': mesh.model, 'fully_sharded': mesh.sharded},
        'accumulate': plan.choice.accumulate,
        'remat': plan.choice.remat,
        'fits': plan.fits,
        'seconds_a_step': plan.step.seconds,
        'parts_of_a_step': plan.step.parts(),
        'limits': plan.step.limits(),
        'hidden_communication': plan.step.hidden,
        'bytes_sent': plan.step.sent.bytes,
        'throughput': plan.throughput,
        'unit': f'{plan.network.unit}/s',
        'hours': plan.hours,
        'cost': plan.cost,
        'kilowatt_hours': plan.energy,
        'utilization': plan.utilization,
        'memory': dataclasses.asdict(plan.memory) | {'peak': plan.memory.peak},
        'dense_seconds_a_step': answer.dense_seconds,
        'pays_below_density': answer.pays_below,
        'by_density': [point._asdict() for point in answer.by_density],
        'by_number': [{'devices': p.devices, 'seconds_a_step': p.step.seconds, 'cost': p.cost} for p in answer.by_number],
        'flags': plan.flags(),
        'source': answer.device.source,
    }
