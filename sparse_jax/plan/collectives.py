"""What devices say to each other in a step: bytes and seconds of each collective, by the usual ring formulas."""

import dataclasses
from typing import NamedTuple

from sparse_jax.plan.hardware import Device


class Mesh(NamedTuple):
    """Devices as data x model; weights on every device, or (`sharded`) divided over the data axis and gathered when used."""

    data: int
    model: int
    sharded: bool = False

    @property
    def devices(self) -> int:
        return self.data * self.model

    @property
    def short(self) -> str:
        """For tables.

        >>> Mesh(8, 1).short, Mesh(4, 2, True).short
        ('8 x 1', '4 x 2 fsdp')
        """
        return f'{self.data} x {self.model}' + (' fsdp' if self.sharded else '')

    def __str__(self) -> str:
        return f'{self.data} data x {self.model} model' + (', fully sharded' if self.sharded else '')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends in a step, and the seconds that they take where nothing hides them."""

    reduce_gradients: float = 0.0
    gather_weights: float = 0.0
    activations: float = 0.0
    seconds_gradients: float = 0.0  # may hide behind the backward pass
    seconds_weights: float = 0.0  # may hide behind the layer before
    seconds_activations: float = 0.0  # hide behind nothing

    @property
    def bytes(self) -> float:
        """All that a device sends."""
        return self.reduce_gradients + self.gather_weights + self.activations

    @property
    def seconds(self) -> float:
        """All that it takes."""
        return self.seconds_gradients + self.seconds_weights + self.seconds_activations


def ring(size: float, devices: int) -> float:
    """Bytes that each device sends when an array of that size is summed over devices: :math:`2 (P - 1) / P` of it.

    >>> ring(1000.0, 4)
    1500.0
    """
    return 2 * (devices - 1) / devices * size


def gather(size: float, devices: int) -> float:
    """Bytes that each device sends when every device is to have the whole of an array that is divided over them: :math:`(P - 1) / P` of it.

    >>> gather(1000.0, 4)
    750.0
    """
    return (devices - 1) / devices * size


def seconds(size: float, devices: int, device: Device, *, whole: bool = True, stride: int = 1) -> float:
    """Time of a sum over devices (``whole``), or of a gather or a sum that stays divided.

    Within a host (of TPUs: a pod) it takes the links. Over several, each host sums its own first, and then each device its part of the result
    over the network: the bytes there are those of the part.

    Args:
      size: bytes of the array.
      devices: over how many it goes.
      device: their kind.
      whole: whether all devices have all of the result.
      stride: every how many devices of the host belong to it: the size of the mesh's inner axis.

    Returns:
      Seconds; infinite where there is no network between hosts.

    Example:
      >>> from sparse_jax.plan import hardware
      >>> h100 = hardware.devices()['H100']
      >>> seconds(1e9, 16, h100) > seconds(1e9, 8, h100)
      True
    """
    if devices <= 1 or not size:
        return 0.0
    inside = max(1, min(devices, device.per_host // stride))
    hosts = -(-devices // inside)
    factor = ring if whole else gather
    links, network = (device.efficiency['links'] * rate for rate in (device.link, device.network))
    time = 0.0
    if inside > 1:
        time += factor(size, inside) / links if links else float('inf')
    if hosts > 1:
        time += factor(size / inside, hosts) / network if network else float('inf')
    return time
