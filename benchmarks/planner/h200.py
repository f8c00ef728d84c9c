"""What was measured on an H200: kernels, each predicted from the others' times, and a Transformer's step."""

from typing import Any

from sparse_jax import config as config_lib
from sparse_jax.kernels.gpu import shipped
from sparse_jax.plan import hardware, network, step_time
from sparse_jax.plan.collectives import Mesh
from sparse_jax.plan.step_time import Choice

_DEVICE = 'NVIDIA H200'
_Rows = list[tuple[str, float, float, bool, str]]


def kernels(*, interpolated: bool) -> _Rows:
    """Microseconds of measured products, and what the others' times say of it.

    Args:
      interpolated: those of which at least two other densities were measured; else those for which another size or block must do.
    """
    found: _Rows = []
    rows = shipped.rows(_DEVICE)
    for row in rows:
        others = [other for other in rows if other is not row]
        alike = [o for o in others if (o.kernel, o.weights, o.block) == (row.kernel, row.weights, row.block)]
        if (len(alike) >= 2) != interpolated or row.kernel == 'scores':
            continue
        layer: dict[str, Any] = dict(weights=row.weights, is_matrix=row.is_matrix, block=row.block, density=row.density)
        seconds = shipped.seconds(_DEVICE, row.kernel, row.operations, **layer, known=others)
        if seconds is not None:
            kind = 'product' if row.is_matrix else 'convolution'
            name = f'{row.kernel.replace("_", " ")} of a {kind}, {row.weights / 1e6:.1f}M weights, blocks of {row.block}, {row.density:.0%}'
            found.append((name, 1e6 * row.seconds, 1e6 * seconds, False, ''))
    return found


def steps() -> _Rows:
    """Milliseconds of a step of 4 layers x 2048, as launch.py of that time ran it: attention by XLA, kept activations stacked by a loop."""
    found: _Rows = []
    for name, method, measured, fitted in (('dense', 'dense', 42.5, False), ('64-blocks at 10%', 'sparse_momentum', 39.1, False)):
        config = config_lib.Config()
        config.model = config_lib.Model(name='transformer', dtype='bfloat16', depth=4, features=2048, heads=16)
        config.data.name, config.data.length, config.data.batch_size = 'stdlib', 512, 16
        config.optimizer.name, config.optimizer.clip_norm = 'adamw', 1.0
        config.sparsity.method, config.sparsity.density, config.sparsity.granularity = method, 0.1, 'block:64x64'
        config.sparsity.update_every, config.sparsity.dense_gradient_window, config.train.steps = 100, 0, 1000
        planned = network.of_config(config)
        device = hardware.devices()['H200']
        step = step_time.step(planned, device, Choice(Mesh(1, 1), fused_attention=False))
        # what a loop over layers keeps is copied into stacked arrays and back
        copies = 4 * 2 * planned.counts.kept * config.data.batch_size / (device.efficiency['bandwidth'] * device.bandwidth)
        found.append(
            (
                f'Transformer, 4 layers x 2048, 16 x 512 bytes, {name}',
                measured,
                1e3 * (step.seconds - step.masks + copies),
                fitted,
                '',
            )
        )
    return found
