"""Times of the kernels on devices that were measured, which come with the package: for shapes nobody has measured, by interpolation.

Each file of ``measured/`` is of one kind of device: its name, the version of the kernels, rows of device times, as
``python -m benchmarks.gpu`` writes them, and tile sizes that took less time than the rule's. A product of another shape is taken to
take a time that is interpolated between the rows of the same kernel and block: for an operation of the dense product it grows with the
density from what has to be read and written anyway, and it is longer for fewer weights.
"""

import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from sparse_jax.core import errors

VERSION = 1  # of the kernels: times of another one are not read
_FOLDER = pathlib.Path(__file__).parent / 'measured'


class Row(NamedTuple):
    """One measured product."""

    kernel: str
    operations: float  # of the dense product
    weights: int
    is_matrix: bool  # else a convolution
    block: int  # the smaller side
    density: float
    seconds: float
    dense_seconds: float

    @property
    def rate(self) -> float:
        """Operations a second on existing units."""
        return self.operations * self.density / self.seconds


def file_of(device: str) -> pathlib.Path:
    """Where the rows of a kind of device are.

    >>> file_of('NVIDIA H200').name
    'nvidia_h200.json'
    """
    return _FOLDER / (device.lower().replace(' ', '_') + '.json')


@functools.cache
def rows(device: str) -> tuple[Row, ...]:
    """What was measured on a kind of device; nothing for one that was not, and for times of another version of the kernels, which is said.

    Args:
      device: as jax names its kind, such as 'NVIDIA H200'.
    """
    content = _content(device)
    faster = {_key(fields): fields['microseconds'] for fields in content['tiles']}
    return tuple(_row(fields | {'microseconds': faster.get(_key(fields), fields['microseconds'])}) for fields in content['rows'])


def tiles(device: str, kernel: str, w: tuple[int, ...], block: tuple[int, int], dtype: str) -> dict[str, int] | None:
    """The tile sizes that were measured to be the best for a weight, as fields of :class:`~sparse_jax.kernels.gpu.config.Config`.

    >>> tiles('NVIDIA H200', 'weight_gradient', (1, 1, 4096, 4096), (64, 64), 'bfloat16')
    {'block_m': 64, 'block_k': 64, 'num_stages': 4, 'units_per_program': 4}
    """
    wanted = kernel, [*w], [*block], dtype
    found = [row for row in _content(device)['tiles'] if (row['kernel'], row['w'], row['block'], row['dtype']) == wanted]
    return {name: found[0][name] for name in ('block_m', 'block_k', 'num_stages', 'units_per_program')} if found else None


@functools.cache
def _content(device: str) -> dict[str, Any]:
    path, nothing = file_of(device), {'rows': [], 'tiles': []}
    if not path.exists():
        return nothing
    content = json.loads(path.read_text())
    if content['kernels'] != VERSION or content['device'] != device:
        errors.say_once(
            f'sparse_jax: {path.name} has times of version {content["kernels"]} of the kernels on {content["device"]}, not of version '
            f'{VERSION} on {device}: they are not read. Measure anew with python -m benchmarks.gpu.'
        )
        return nothing
    return content


def _key(fields: dict[str, Any]) -> tuple:
    """Which product was measured; better tiles were looked for at a tenth of the units."""
    return fields['kernel'], *fields['x'], *fields['w'], *fields['block'], fields.get('density', 0.1)


def _row(fields: dict[str, Any]) -> Row:
    x, w = fields['x'], fields['w']
    operations = 2.0 * math.prod(x[:3]) * math.prod(w)
    seconds = 1e-6 * fields['microseconds'], 1e-6 * fields['dense_microseconds']
    return Row(fields['kernel'], operations, math.prod(w), w[0] == w[1] == 1, min(fields['block']), fields['density'], *seconds)


def seconds(
    device: str,
    kernel: str,
    operations: float,
    *,
    weights: int,
    is_matrix: bool,
    block: int,
    density: float,
    known: Sequence[Row] | None = None,
) -> float | None:
    """The time of a sparse product, as interpolated; never at a higher rate than any that was measured.

    Args:
      device: kind of device.
      kernel: 'forward', 'input_gradient' or 'weight_gradient'.
      operations: of the dense product: two for each weight and pixel.
      weights: existing or not.
      is_matrix: whether it is a matrix product, else a convolution.
      block: the block's smaller side.
      density: of the weight.
      known: the rows to interpolate between; None: all that were measured on the device.

    Returns:
      Seconds; None where nothing of that kernel and block was measured.

    Example:
      >>> found = seconds('NVIDIA H200', 'forward', 2 * 8192 * 4096**2, weights=4096**2, is_matrix=True, block=64, density=0.1)
      >>> round(1e6 * found)
      76
    """
    known = [row for row in (rows(device) if known is None else known) if row.kernel == kernel and row.block == block]
    known = [row for row in known if row.is_matrix == is_matrix] or known
    if not known:
        return None
    largest = max(row.weights for row in known)
    times = [(row.density, row.seconds / row.operations) for row in known if row.weights == largest]
    time = _affine(times, density)
    for row in [row for row in known if row.weights < largest][
        :1
    ]:  # how much slower a smaller product is, where both were measured
        loss = math.log(row.seconds / row.operations / _affine(times, row.density))
        part = math.log(largest / weights) / math.log(largest / row.weights)
        time *= math.exp(loss * min(max(part, 0.0), 1.0))
    return operations * max(time, density / max(row.rate for row in known))


def dense_seconds(device: str, kernel: str, operations: float, *, weights: int, is_matrix: bool) -> float | None:
    """The time of the dense product, at the rate of the measured one that is nearest by weights; arguments as of :func:`seconds`."""
    known = [row for row in rows(device) if row.kernel == kernel and row.is_matrix == is_matrix]
    if not known:
        return None
    nearest = min(known, key=lambda row: (abs(math.log(row.weights / weights)), row.density))
    return operations / nearest.operations * nearest.dense_seconds


def _affine(points: Sequence[tuple[float, float]], density: float) -> float:
    """A time at a density: what is read and written whatever the density, and a part that grows with it; by the nearest two that were measured."""
    points = sorted(points)
    if len(points) == 1:
        return points[0][1] * density / points[0][0]
    upper = min(max(sum(d < density for d, _ in points), 1), len(points) - 1)
    (low, fast), (high, slow) = points[upper - 1 : upper + 1]
    time = fast + (slow - fast) * (density - low) / (high - low)
    return max(time, 0.5 * points[0][1]) if density < low else max(time, slow) if density > high else time
