"""How long a sparse product takes, and where none is faster than a dense one: by what was measured, and nothing else."""

import math
from typing import Any

import numpy as np

from sparse_jax.kernels.gpu import shipped
from sparse_jax.plan.counts import Product
from sparse_jax.plan.hardware import Device

_MEASURED = 'NVIDIA H200'  # whose ratios of sparse to dense stand in for those of other Hopper devices
_BYTES = 4


def kernels_for(device: Device, block: int) -> str:
    """Which kernels multiply sparse weights there, or why masked weights are multiplied as dense ones: a sentence.

    >>> from sparse_jax.plan import hardware
    >>> kernels_for(hardware.devices()['A100'], 64)
    'Sparse products run as dense ones on A100: block kernels need a Hopper GPU.'
    """
    if device.kind == 'cpu' and device.sparse:
        return f'Sparse products run on C++ kernels on {device.name}.'
    dense = f'Sparse products run as dense ones on {device.name}: '
    if device.kind == 'cpu':
        return dense + 'nothing was measured (python -m sparse_jax.plan.calibrate FILE, and --hardware=FILE).'
    if device.kind == 'tpu':
        return dense + 'the kernels for TPUs have not been measured.'
    if not device.has_blocks:
        return dense + 'block kernels need a Hopper GPU.'
    if not block:
        return (
            dense
            + 'its kernels multiply by blocks (sparsity.granularity=block:64x64), and no kernel for single weights is faster than cuBLAS.'
        )
    known = ', '.join(str(n) for n in sorted({row.block for row in shipped.rows(_MEASURED)}))
    if block not in {row.block for row in shipped.rows(_MEASURED)}:
        return dense + f'blocks of side {block} were not measured; {known} were.'
    ratios = '' if device.name == 'H200' else ', with the ratios to dense products that were measured on an H200'
    return f'Sparse products run on block kernels on {device.name}{ratios}.'


def seconds(
    product: Product, kernel: str, examples: float, device: Device, *, density: float, block: int, dense: tuple[float, float]
) -> tuple[float, float]:
    """Seconds of one pass: of its arithmetic, and of its traffic; those of the dense product where that is faster.

    Args:
      product: with a weight.
      kernel: 'forward', 'input_gradient' or 'weight_gradient'.
      examples: of a step, on this device.
      device: a device.
      density: of the weight, below 1.
      block: the blocks' smaller side; 0: single weights.
      dense: what :func:`~sparse_jax.plan.step_time.dense_seconds` says of the pass.

    Returns:
      Seconds that arithmetic and traffic take, of which the larger counts.
    """
    mine = dense
    if device.kind == 'cpu' and device.sparse:
        mine = _on_cpu(product, examples, device, density)
    elif device.kind == 'gpu' and device.has_blocks and block:
        ratio = _ratio(product, kernel, examples, density, block)
        mine = dense if ratio is None else (dense[0] * ratio, dense[1])
    return min(mine, dense, key=max)


def _on_cpu(product: Product, examples: float, device: Device, density: float) -> tuple[float, float]:
    """On the C++ kernels: a part of the peak on existing weights, each of which is read with its place."""
    pairs = device.sparse['convolutions' if product.kind == 'convolution' else 'products']
    reached = float(np.interp(math.log(density), [math.log(d) for d, _ in pairs], [part for _, part in pairs]))
    bytes_ = _BYTES * ((product.read + product.written) * examples + 2 * density * product.weights)
    arithmetic = 2 * product.operations * examples * density / (device.operations('float32') * reached)
    return arithmetic, bytes_ / (device.efficiency['bandwidth'] * device.bandwidth)


def _ratio(product: Product, kernel: str, examples: float, density: float, block: int) -> float | None:
    """Time of a sparse product over a dense one's, interpolated in what was measured; None where nothing was."""
    operations = 2.0 * product.operations * examples
    layer: dict[str, Any] = dict(weights=product.inputs * product.outputs, is_matrix=product.kind == 'matrix')
    sparse = shipped.seconds(_MEASURED, kernel, operations, block=block, density=density, **layer)
    dense = shipped.dense_seconds(_MEASURED, kernel, operations, **layer)
    return None if sparse is None or dense is None else sparse / dense
