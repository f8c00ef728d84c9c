"""What a training step holds on each device: the state, as its shapes say, and activations by formula."""

import dataclasses

from sparse_jax.plan.hardware import Device
from sparse_jax.plan.network import Network
from sparse_jax.plan.step_time import BYTES, Choice

_USABLE = 0.92  # of a device's memory: the rest is the runtime's


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, where they are most."""

    weights: float
    optimizer: float
    masks: float  # or lists, and what mask updates need
    gradients: float
    copies: float  # of weights in the type that products compute in
    activations: float
    logits: float

    @property
    def state(self) -> float:
        """What is there between steps."""
        return self.weights + self.optimizer + self.masks

    @property
    def peak(self) -> float:
        """The most in a step."""
        return self.state + self.gradients + self.copies + self.activations + self.logits

    def fits(self, device: Device) -> bool:
        """Whether a device has room for it."""
        return self.peak <= usable(device)


def usable(device: Device) -> float:
    """Bytes of a device that a program can have."""
    return _USABLE * device.memory


def memory(network: Network, device: Device, choice: Choice) -> Memory:
    """What a training step holds.

    Args:
      network: what is trained.
      device: a kind of device.
      choice: mesh, accumulation, and what is computed twice.

    Returns:
      Its parts.
    """
    mesh, counts, state = choice.mesh, network.counts, network.state
    parts = mesh.model * (mesh.data if mesh.sharded else 1)
    width = BYTES[network.config.model.dtype]
    examples = network.config.data.batch_size / mesh.data / choice.accumulate
    kept = counts.carried + counts.kept / max(1, network.config.model.depth) if choice.remat and counts.carried else counts.kept
    if choice.keeps_scores(device):
        kept += counts.kept_scores
    return Memory(
        weights=(state['weights'] + state['averages']) / parts,
        optimizer=state['optimizer'] / parts,
        masks=(state['masks or lists'] + state['scores']) / parts,
        gradients=state['gradients'] / parts * (2 if choice.accumulate > 1 else 1),
        copies=width / 4 * state['weights'] / mesh.model if width < 4 and not mesh.sharded else 0.0,
        activations=width * kept * examples / mesh.model,
        logits=8 * counts.logits * examples / mesh.model,  # float32, and their gradient
    )
