"""What people ask before they train: which devices, which parallelism, which density, and what limits the step."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from sparse_jax.plan import memory as memory_lib
from sparse_jax.plan import search, sparse_time
from sparse_jax.plan.collectives import ring
from sparse_jax.plan.hardware import Device
from sparse_jax.plan.network import Network
from sparse_jax.plan.search import Plan
from sparse_jax.plan.words import hours, size

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
BLOCK = 64  # the side that is tried where a network has no blocks and only blocks have kernels
PAYS = 0.97  # of the dense step's time: below that sparsity pays


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
        faster = [point.density for point in self.by_density if point.seconds < PAYS * self.dense_seconds]
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
