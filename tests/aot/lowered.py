"""Training steps with block patterns, as programs for a platform that is not here."""

import os

import jax
import pytest

from configs import cifar10_vgg_d, lm_tiny
from sparse_jax.aot import compile_only, lowering

_BLOCK = {'cuda': 'block:64x64', 'tpu': 'block:128x128'}


def needs_compiler(platform: str) -> pytest.MarkDecorator:
    """Skips where a platform's compiler is not installed; under make test-gpu-aot and test-tpu-aot (AOT is set) that is an error."""
    reason = compile_only.unavailable(platform)
    if reason and os.environ.get('AOT'):
        raise RuntimeError(f'nothing can be compiled for a {platform.upper()}: {reason}')
    return pytest.mark.skipif(bool(reason), reason=f'{reason}: make test-{platform}-aot')


def transformer_on_four_devices(platform: str) -> lowering.Lowered:
    config = lm_tiny.get_config()
    config.model.dtype, config.model.features, config.model.hidden, config.model.depth = 'bfloat16', 512, 1024, 2
    config.sparsity.granularity, config.sparsity.density = _BLOCK[platform], 0.3
    config.mesh.data, config.mesh.model, config.mesh.layout = 2, 2, 'model'
    return lowering.lower(config, platform)


def vgg_on_two_devices(platform: str) -> lowering.Lowered:
    config = cifar10_vgg_d.get_config('offline')
    config.model.dtype = 'bfloat16'
    config.sparsity.granularity, config.mesh.data = _BLOCK[platform], 2
    config.sparsity.dense = 'conv1_1/*,out/*' if platform == 'cuda' else 'conv1_*,conv2_1/*,out/*'
    return lowering.lower(config, platform)


def compact_transformer_on_two_devices(platform: str) -> lowering.Lowered:
    config = lm_tiny.get_config()
    config.model.dtype, config.model.features, config.model.hidden, config.model.depth = 'bfloat16', 512, 1024, 2
    config.sparsity.granularity, config.sparsity.density, config.sparsity.storage = _BLOCK[platform], 0.3, 'compact'
    config.mesh.data = 2
    return lowering.lower(config, platform)


steps = {'transformer on four devices': transformer_on_four_devices, 'vgg on two devices': vgg_on_two_devices}
compact_steps = {'compact transformer on two devices': compact_transformer_on_two_devices}  # on a GPU


def check_compiled(lowered: lowering.Lowered) -> None:
    """Gradients are summed over the parts of a batch; a mask update gathers no weight and no mask, on this platform's compiler too."""
    assert lowered.memory is not None and lowered.memory['temporary'] > 0 and lowered.collectives is not None
    assert sum(c.bytes for c in lowered.collectives if c.kind == 'all-reduce') > 4 * lowered.largest_layer
    assert not [c for c in lowered.collectives if c.kind == 'all-gather']
    assert jax.default_backend() == 'cpu'
