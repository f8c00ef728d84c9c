"""The best way to train a network on given devices: all meshes, with weights whole or divided, in as few parts and with as little computed twice as fits."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

from sparse_jax.plan import memory as memory_lib
from sparse_jax.plan import step_time
from sparse_jax.plan.collectives import Mesh
from sparse_jax.plan.hardware import Device
from sparse_jax.plan.memory import Memory
from sparse_jax.plan.network import Network
from sparse_jax.plan.step_time import Choice, Step


@dataclasses.dataclass(frozen=True)
class Plan:
    """A network on a number of devices, with what comes of it."""

    network: Network
    device: Device
    choice: Choice
    step: Step
    memory: Memory

    @property
    def fits(self) -> bool:
        """Whether the devices have room."""
        return self.memory.fits(self.device)

    @property
    def devices(self) -> int:
        """How many it uses."""
        return self.choice.mesh.devices

    @property
    def throughput(self) -> float:
        """Images or tokens a second."""
        return self.network.config.data.batch_size * self.network.length / self.step.seconds

    @property
    def hours(self) -> float:
        """Of the whole training, without evaluations."""
        return self.network.steps * self.step.seconds / 3600

    @property
    def cost(self) -> float | None:
        """In the currency of the price; None: there is none."""
        return None if self.device.price is None else self.device.price * self.devices * self.hours

    @property
    def energy(self) -> float | None:
        """Kilowatt-hours of the devices at the power on their sheet; None: it is not published."""
        return None if self.device.watts is None else 1e-3 * self.device.watts * self.devices * self.hours

    @property
    def utilization(self) -> float:
        """Operations of the dense network's products, over what the devices' peak allows in that time."""
        counts, config = self.network.counts, self.network.config
        operations = 2 * (counts.forward + counts.backward) * config.data.batch_size
        return operations / (self.step.seconds * self.devices * self.device.operations(config.model.dtype))

    def flags(self) -> list[str]:
        """Settings of the launcher that train it so, where they differ from the config's."""
        mesh, config = self.choice.mesh, self.network.config
        layout = {(False, False): 'data', (True, False): 'model', (False, True): 'fsdp', (True, True): 'model+fsdp'}
        wanted = {
            'mesh.data': mesh.data,
            'mesh.model': mesh.model,
            'mesh.layout': layout[mesh.model > 1, mesh.sharded],
            'train.accumulate': self.choice.accumulate,
        }
        if self.network.is_transformer and self.choice.remat != (config.model.remat == 'all'):
            wanted['model.remat'] = 'all' if self.choice.remat else 'none'
        if mesh.devices == 1:
            wanted.pop('mesh.data')  # one device is used where there is one
        sections = {name: getattr(getattr(config, name.split('.')[0]), name.split('.')[1]) for name in wanted}
        return [f'--config.{name}={value}' for name, value in wanted.items() if value != sections[name]]


_EQUAL = 0.02  # part of a step's time that makes no difference: the model is coarser


def _effort(choice: Choice) -> tuple[int, ...]:
    """What makes a plan less simple, the worst first."""
    return choice.mesh.model, choice.remat, choice.mesh.sharded, choice.mesh.devices, choice.accumulate


def evaluate(network: Network, device: Device, choice: Choice, density: float | None = None) -> Plan:
    """What comes of a choice."""
    step = step_time.step(network, device, choice, density)
    return Plan(network, device, choice, step, memory_lib.memory(network, device, choice))


def best(network: Network, device: Device, number: int) -> Plan:
    """The fastest plan on at most so many devices that fits; where none does, the one that needs the least memory.

    Args:
      network: what is trained.
      device: a kind of device.
      number: how many there are; fewer are used where that is faster. Of plans that take the same time within 2% it is the simplest.

    Returns:
      The plan; ``fits`` says whether there is room for it.
    """
    plan = best_of(network, device, number, lambda mesh: True)
    assert plan is not None
    return plan


def best_of(network: Network, device: Device, number: int, allowed: Callable[[Mesh], bool]) -> Plan | None:
    """:func:`best` of the meshes that are allowed; None where none is."""
    plans = list(_plans(network, device, number, allowed))
    if not plans:
        return None
    fitting = [plan for plan in plans if plan.fits and math.isfinite(plan.step.seconds)]
    if fitting:
        limit = (1 + _EQUAL) * min(plan.step.seconds for plan in fitting)
        equal = [plan for plan in fitting if plan.step.seconds <= limit]
        return min(equal, key=lambda plan: (_effort(plan.choice), plan.step.seconds))
    return min(plans, key=lambda plan: plan.memory.peak)


@functools.lru_cache(maxsize=1024)
def meshes(batch: int, number: int, *, splits: bool) -> tuple[Mesh, ...]:
    """All meshes of at most so many devices whose data axis divides the batch.

    >>> [str(mesh) for mesh in meshes(4, 2, splits=True)]
    ['1 data x 1 model', '2 data x 1 model', '2 data x 1 model, fully sharded', '1 data x 2 model']
    """
    found = []
    divisors = sorted({d for i in range(1, math.isqrt(batch) + 1) if batch % i == 0 for d in (i, batch // i)})
    for model in (1, 2, 4, 8, 16, 32, 64) if splits else (1,):
        for data in divisors:
            if data * model <= number:
                found += [Mesh(data, model, sharded) for sharded in (False, True) if data > 1 or not sharded]
    return tuple(found)


def divides(network: Network, mesh: Mesh) -> bool:
    """Whether the weights lie over a mesh: sides that do not divide stay whole on every device, so that nothing would be gained.

    Args:
      network: what is trained.
      mesh: data x model.

    Returns:
      Whether nine tenths of its weights divide, and of a Transformer the heads. Compact storage has all weights on every device.
    """
    config = network.config
    if mesh.model == 1 and not mesh.sharded:
        return True
    if config.sparsity.storage == 'compact' or (network.is_transformer and config.model.heads % mesh.model):
        return False
    matrices = [shape for shape in network.counts.leaves.values() if len(shape) >= 2]
    fits = lambda shape: shape[-1] % mesh.model == 0 and (not mesh.sharded or shape[-2] % mesh.data == 0)
    total = sum(math.prod(shape) for shape in matrices)
    return sum(math.prod(shape) for shape in matrices if fits(shape)) >= 0.9 * total


def _plans(network: Network, device: Device, number: int, allowed: Callable[[Mesh], bool]) -> Iterator[Plan]:
    """Of each mesh the plan with the fewest parts of a batch that fits, with and without computing layers twice."""
    batch = network.config.data.batch_size
    for mesh in meshes(batch, number, splits=number > 1):
        if not (allowed(mesh) and divides(network, mesh)):
            continue
        for remat in (False, True) if network.is_transformer else (False,):
            parts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if batch // mesh.data % n == 0]
            for accumulate in parts:
                plan = evaluate(network, device, Choice(mesh, accumulate, remat))
                if plan.fits or accumulate == parts[-1]:
                    yield plan
                    break
