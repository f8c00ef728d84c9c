"""Devices as data, algorithms of convolution, the scale of computation, and the published law."""

import json
import math

import numpy as np
import pytest

from sparse_jax.plan import computation, convolution, hardware, scaling
from tests.plan.networks import planned


def test_every_device_is_whole_and_names_its_source():
    devices = hardware.devices()
    wanted = {
        'A100',
        'A100-40',
        'H100',
        'H200',
        'B200',
        'L4',
        'L40S',
        'RTX3090',
        'RTX4090',
        'RTX5090',
        'MI300X',
        'v5e',
        'v5p',
        'v6e',
        'cpu',
    }
    assert set(devices) == wanted
    for device in devices.values():
        assert device.peak and min(device.peak.values()) > 0 and device.memory > 0 and device.bandwidth > 0, device.name
        assert len(device.source) > 20, device.name
        assert all(0 <= device.efficiency[name] <= 1.2 for name in ('products', 'convolutions', 'bandwidth', 'links', 'overlap'))


def test_a_file_of_ones_own_adds_devices_and_corrects_known_ones(tmp_path):
    path = tmp_path / 'mine.json'
    path.write_text(json.dumps({
        'H100': {'price': 2.5},
        'X1': {'kind': 'gpu', 'dense_tflops': {'bfloat16': 100}, 'memory_gb': 10, 'bandwidth_gb_s': 500},
    }))  # fmt: skip
    devices = hardware.devices(path, {'x1': 0.5})
    assert devices['H100'].price == 2.5 and devices['H100'].bandwidth == hardware.devices()['H100'].bandwidth
    with pytest.raises(ValueError, match='--devices=2xX1: X1 has no link_gb_s'):
        hardware.parse('2xX1', devices)
    path.write_text(json.dumps({'H100': {'efficiency': {'products': 0.7}, 'aliases': ['mine']}}))
    corrected = hardware.devices(path)['H100']
    assert corrected.efficiency['products'] == 0.7 and corrected.efficiency['convolutions'] == 0.34, (
        'what is not named keeps its value'
    )
    assert hardware.find('Mine', hardware.devices(path)).name == 'H100'
    assert devices['X1'].operations('bfloat16') == 1e14 and devices['X1'].price == 0.5


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{', 'cannot be read'),
        ('[]', 'must hold an object of devices by name'),
        ('{"X": {"kind": "gpu"}}', 'X lacks dense_tflops, memory_gb, bandwidth_gb_s'),
        ('{"H100": {"bandwith_gb_s": 1}}', "the figure of H100='bandwith_gb_s' does not exist. Did you mean 'bandwidth_gb_s'"),
        ('{"H100": {"memory_gb": "40"}}', "memory_gb of H100 is '40': must be a number above 0"),
        ('{"H100": {"bandwidth_gb_s": 0}}', 'bandwidth_gb_s of H100 is 0: must be a number above 0'),
        ('{"H100": {"link_gb_s": null}}', 'link_gb_s of H100 is None: must be a number, at least 0'),
        ('{"H100": {"dense_tflops": 5}}', 'dense_tflops of H100 is 5: must be numbers by name'),
        ('{"H100": {"dense_tflops": {"bfloat16": "100"}}}', 'dense_tflops of H100 is .*: must be numbers by name'),
        ('{"cpu": {"sparse": {"products": [[1]]}}}', 'sparse of cpu must have pairs'),
        ('{"X": {"kind": "gpus", "dense_tflops": {}, "memory_gb": 1, "bandwidth_gb_s": 1}}', "the kind of X='gpus' does not exist"),
    ],
)
def test_wrong_files_of_hardware(tmp_path, content, message):
    path = tmp_path / 'mine.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=f'--hardware.*{message}'):
        hardware.devices(path)


def test_devices_are_found_by_any_spelling_and_near_names_are_told():
    known = hardware.devices()
    assert [(n, d.name) for n, d in hardware.parse('8xh100, 4 x TPU-v5e, a100-80gb', known)] == [
        (8, 'H100'),
        (4, 'v5e'),
        (1, 'A100'),
    ]
    for text, message in (
        ('8xH10', "'H10' does not exist. Did you mean 'H100'"),
        ('', 'is empty'),
        ('0xH100', 'must be at least one'),
    ):
        with pytest.raises(ValueError, match=message):
            hardware.parse(text, known)


def test_algorithms_of_convolution_against_sums_by_hand():
    layer = convolution.Layer(8, 8, 4, 6, (3, 3))
    multiply_adds = 2 * 64 * 9 * 4 * 6
    costs = {cost.algorithm: cost for cost in convolution.algorithms(layer, 2, 0.25)}
    assert costs['direct'].operations == costs['im2col'].operations == multiply_adds
    assert costs['sparse direct, 25%'].operations == multiply_adds / 4
    assert costs['im2col'].bytes - costs['direct'].bytes == 2 * 4 * 2 * 64 * 9 * 4, 'patches are written and read'
    products = 16 * 2 * 16 * 4 * 6  # 16 for 2x2 outputs
    assert products < costs['Winograd'].operations < multiply_adds
    assert costs['Winograd'].operations - products == (32 * 32 * 4 + 24 * 32 * 6 + 28 * 4 * 6) / 2
    strided = {c.algorithm: c for c in convolution.algorithms(convolution.Layer(8, 8, 4, 6, (3, 3), 2), 2)}
    assert math.isinf(strided['Winograd'].operations) and strided['Winograd'].note


def test_the_published_law_by_its_table_and_its_range():
    expected = {1: 3.311, 0.5: 3.347, 0.25: 3.438, 0.125: 3.574, 0.0625: 3.756}
    for density, loss in expected.items():
        assert scaling.loss(80e6 * density, density, 1.3e9) == pytest.approx(loss, abs=2e-3)
    for active, density, tokens, message in ((8e6, 0.01, 1e9, 'densities'), (5e9, 1, 1e9, 'networks'), (8e7, 1, 0, 'tokens')):
        with pytest.raises(ValueError, match=message):
            scaling.loss(active, density, tokens)


def test_the_scale_of_a_training():
    network = planned('lenet300')
    counts, config = network.counts, network.config
    dense = 2 * (counts.forward + counts.backward) * config.data.batch_size * network.steps
    assert computation.of_training(network) < 0.5 * dense
    assert computation.of_training(planned('lenet300', sparsity__method='dense')) == dense
    assert computation.brain() == pytest.approx(1.075e21, rel=1e-4)
    assert computation.brain(neurons=2 * 86e9) == pytest.approx(2 * computation.brain())
    rows = computation.compare(1e18)
    assert np.all(np.diff([row.times for row in rows]) <= 0) and all(
        row.amount.low <= row.amount.operations <= row.amount.high for row in rows
    )
    with pytest.raises(ValueError, match='operations=0: must be above 0'):
        computation.compare(0)
