"""Throughputs of trainings that others published, and what the planner predicts for them."""

from typing import NamedTuple

from sparse_jax import config as config_lib
from sparse_jax.plan import hardware, network, step_time
from sparse_jax.plan.collectives import Mesh
from sparse_jax.plan.network import Network
from sparse_jax.plan.step_time import Choice

_FOUNDRY = 'mosaicml/llm-foundry, scripts/train/benchmarking/README.md'
_NVIDIA = 'NVIDIA DeepLearningExamples, PyTorch resnet50v1.5 README, 21.03'
_MAXTEXT = 'MaxText, configs/{}/README.md'


class Row(NamedTuple):
    """A measured training."""

    name: str
    unit: str  # images/s in all, tokens/s a device, or TFLOP/s a device
    measured: float
    device: str
    network: Network
    choice: Choice
    is_fitted: bool  # whether the device's efficiencies were chosen by it
    source: str

    @property
    def predicted(self) -> float:
        """In the row's unit."""
        seconds = step_time.step(self.network, hardware.devices()[self.device], self.choice).seconds
        batch, devices = self.network.config.data.batch_size, self.choice.mesh.devices
        if self.unit == 'images/s':
            return batch / seconds
        if self.unit == 'tokens/s a device':
            return batch * self.network.length / seconds / devices
        counts = self.network.counts
        return 2e-12 * (counts.forward + counts.backward) * batch / seconds / devices


def _transformer(
    depth: int, features: int, heads: int, hidden: int, length: int, vocabulary: int, batch: int, **settings
) -> Network:
    config = config_lib.Config()
    config.sparsity.method, config.sparsity.dense = 'dense', '*'  # the largest have more weights than a sparse leaf can have
    config.model = config_lib.Model(
        name='transformer', dtype='bfloat16', depth=depth, features=features, heads=heads, hidden=hidden, **settings
    )
    config.data.name, config.data.dir, config.data.length, config.data.batch_size = 'text', 'text', length, batch
    config.optimizer.name, config.optimizer.clip_norm, config.optimizer.schedule = 'adamw', 1.0, 'cosine'
    config.train.steps = 1000
    return network.of_config(config, vocabulary)


def _resnet(batch: int, dtype: str) -> Network:
    from sparse_jax.configs import imagenet_resnet50

    config = imagenet_resnet50.get_config()
    config.sparsity.method, config.data.batch_size, config.model.dtype = 'dense', batch, dtype
    return network.of_config(config)


def rows() -> list[Row]:
    """All of them; those that efficiencies were fitted on say so."""
    found = []
    for dtype, kind, one, eight, fitted in (
        ('bfloat16', 'mixed precision', 2470, 16_621, True),
        ('float32', 'TF32', 938, 7248, False),
    ):
        for devices, measured in ((1, one), (8, eight)):
            name, made = f'ResNet-50 v1.5, {kind}, {devices} x A100-80', _resnet(256 * devices, dtype)
            found.append(Row(name, 'images/s', measured, 'A100', made, Choice(Mesh(devices, 1)), fitted and devices == 1, _NVIDIA))
    gpt = {
        'GPT 356M': ((24, 1024, 16, 2731), (('A100', 58_782, True), ('A100-40', 55_995, False))),
        'GPT 1.3B': ((24, 2048, 16, 5461), (('H100', 45_455, True), ('A100', 20_513, False))),
        'GPT 6.7B': ((32, 4096, 32, 10_923), (('H100', 10_643, False), ('A100', 4641, False))),
    }
    for name, (sizes, measurements) in gpt.items():
        made = _transformer(*sizes, 2048, 50_368, 64)
        for device, measured, fitted in measurements:
            title = f'{name}, length 2048, 8 x {device}, fully sharded'
            found.append(Row(title, 'tokens/s a device', measured, device, made, Choice(Mesh(8, 1, True)), fitted, _FOUNDRY))
    for devices, measured in ((8, 492), (128, 375)):
        made = _transformer(32, 4096, 32, 11_008, 4096, 32_000, 4 * devices, tied=False)
        title = f'Llama2-7B, 4 x 4096 a device, {devices} x H100, fully sharded'
        choice = Choice(Mesh(devices, 1, True), remat=False)
        found.append(Row(title, 'TFLOP/s a device', measured, 'H100', made, choice, False, _MAXTEXT.format('a3/llama_2_7b')))
    # Its 16B network has heads of twice the features: here the hidden layer has their parameters.
    for name, sizes, device, chips, batch, model, remat, measured, fitted in (
        ('16B', (32, 4096, 32, 34_133), 'v5e', 256, 6, 1, True, 120, True),
        ('32B', (32, 8192, 64, 28_672), 'v5e', 256, 4, 1, True, 132, False),
        ('32B', (32, 8192, 64, 28_672), 'v5p', 64, 7, 4, False, 328, True),
    ):
        made = _transformer(*sizes, 2048, 32_000, batch * chips, tied=False)
        title = f'{name}, {batch} x 2048 a chip, {chips} x {device}'
        choice = Choice(Mesh(chips // model, model, True), remat=remat, fused_attention=True)
        found.append(Row(title, 'TFLOP/s a device', measured, device, made, choice, fitted, _MAXTEXT.format(device)))
    return found
