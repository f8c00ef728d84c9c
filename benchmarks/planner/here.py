"""Training steps on this machine's processor, measured, and what the planner predicts for them from the machine's calibration."""

import time
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.steps import train_step, twins
from sparse_jax.plan import network, step_time
from sparse_jax.plan.collectives import Mesh
from sparse_jax.plan.hardware import Device
from sparse_jax.plan.step_time import Choice

BATCHES = {'lenet5': 128, 'vgg_d': 64, 'wrn_16_8': 32, 'lm_tiny': 16, 'alexnet_s': 64, 'wrn_28_2': 32}
DENSITIES = (1.0, 0.1, 0.05)
# By these rows the machine's efficiencies were chosen, the others are held out.
FITTED = {('lenet5', 1.0), ('vgg_d', 1.0), ('vgg_d', 0.05), ('lm_tiny', 0.05)}
_DATA = {'lenet5': 'mnist_offline', 'lm_tiny': 'stdlib'}


class Row(NamedTuple):
    """A step of a network at a density."""

    name: str
    density: float
    measured: float  # seconds
    predicted: float

    @property
    def is_fitted(self) -> bool:
        """Whether efficiencies were chosen by it."""
        return (self.name, self.density) in FITTED


def planned(name: str, density: float) -> network.Network:
    """The network of a row."""
    method = 'dense' if density == 1 else 'sparse_momentum'
    config = train_step.config(name, method, density, BATCHES[name])
    config.data.name = _DATA.get(name, 'digits32')
    if name == 'lm_tiny':
        config.data.length = twins.LENGTH
    return network.of_config(config)


def predicted(name: str, density: float, device: Device) -> float:
    """Seconds of a step without mask updates, as the planner says."""
    step = step_time.step(planned(name, density), device, Choice(Mesh(1, 1)))
    return step.seconds - step.masks


def measured(name: str, density: float, rounds: int = 9) -> float:
    """Seconds of an average step without mask updates: the median of the ordinary ones and of those in the window, by their share."""
    batch, params = twins.batch(name, BATCHES[name]), twins.parameters(name)
    ours = train_step.Ours(name, 'dense' if density == 1 else 'sparse_momentum', density, batch, params)
    medians = {}
    for dense in (True, False) if density < 1 else (True,):
        ours(dense)
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            ours(dense)
            times.append(time.perf_counter() - begin)
        medians[dense] = float(np.median(times))
    jax.clear_caches()
    return ours.dense_share * medians[True] + (1 - ours.dense_share) * medians[False] if density < 1 else medians[True]


def rows(device: Device) -> list[Row]:
    """All of them, measured now."""
    cases = [(name, density) for name in BATCHES for density in DENSITIES]
    return [Row(name, density, measured(name, density), predicted(name, density, device)) for name, density in cases]
