"""Times of measured devices: read as they stand, and interpolated between."""

import json
import types

import jax
import pytest

from sparse_jax.core import granularity
from sparse_jax.kernels import measure, reference
from sparse_jax.kernels.gpu import clock, shipped
from sparse_jax.kernels.gpu import config as config_lib

H200 = 'NVIDIA H200'
WEIGHT = 'weight_gradient', (1, 1, 4096, 4096), (64, 64), 'bfloat16'


@pytest.mark.parametrize('row', [row for row in shipped.rows(H200) if row.kernel != 'scores'])
def test_a_measured_product_takes_what_was_measured(row):
    found = shipped.seconds(
        H200, row.kernel, row.operations, weights=row.weights, is_matrix=row.is_matrix, block=row.block, density=row.density
    )
    assert found == pytest.approx(row.seconds, rel=0.02)


def test_between_measured_products():
    def time(density, side=4096):
        shape = dict(weights=side**2, is_matrix=True, block=64)
        return shipped.seconds(H200, 'forward', 2 * 8192 * side**2, **shape, density=density)

    assert time(0.05) < time(0.07) < time(0.1) < time(0.3) < time(0.5)
    assert time(0.1, 2048) == pytest.approx(39e-6)  # as many weights as 1024 to 4096
    assert 39e-6 < time(0.1, 3072) < 76e-6
    best = max(row.rate for row in shipped.rows(H200) if row.kernel == 'forward' and row.block == 64)
    assert 2 * 8192 * 8192**2 * 0.5 / time(0.5, 8192) <= best * 1.001


def test_what_was_not_measured():
    assert shipped.rows('NVIDIA H100 80GB HBM3') == ()
    assert shipped.seconds(H200, 'forward', 1e12, weights=10**6, is_matrix=True, block=16, density=0.1) is None


def test_times_of_other_kernels_are_told_and_not_read(tmp_path, monkeypatch, caplog):
    content = json.loads(shipped.file_of(H200).read_text()) | {'kernels': shipped.VERSION + 1}
    monkeypatch.setattr(shipped, '_FOLDER', tmp_path)
    shipped.file_of(H200).write_text(json.dumps(content))
    for cached in (shipped.rows, shipped._content):
        cached.cache_clear()
    try:
        assert shipped.rows(H200) == () and shipped.tiles(H200, *WEIGHT) is None
    finally:
        for cached in (shipped.rows, shipped._content):
            cached.cache_clear()


def test_tiles_that_were_measured_are_taken_where_they_divide_the_images(monkeypatch):
    monkeypatch.setattr(config_lib.device, 'is_absent', lambda: False)
    monkeypatch.setattr(config_lib, 'measured', dict)
    monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(device_kind=H200)])
    kernel, w, block, dtype = WEIGHT
    best = config_lib.Config(64, 64, 4, 4)
    assert best.fits(kernel, block)
    assert [config_lib.choose(kernel, (n, 1, 1, 4096), w, block, dtype) == best for n in (8192, 640, 100)] == [True, True, False]
    assert config_lib.choose(kernel, (100, 1, 1, 4096), w, block, dtype) == config_lib.rule(kernel, block, 100)
    assert config_lib.choose('forward', (8192, 1, 1, 4096), w, block, dtype) == config_lib.rule('forward', block, 8192)


def test_a_layer_is_chosen_by_what_was_measured():
    geometry, block = reference.Geometry(), granularity.get('block:64x64')
    call = measure.Call('fc', (8192, 1, 1, 4096), (1, 1, 4096, 4096), geometry, block, 'bfloat16')
    sparse, window = (measure.shipped_seconds(H200, call, 0.1, dense) for dense in (False, True))
    assert sparse == pytest.approx({'dense': (304 + 306 + 330) * 1e-6, 'gpu': (76 + 76 + 78) * 1e-6}, rel=0.02)
    assert window['gpu'] == pytest.approx((76 + 76 + 330) * 1e-6, rel=0.02)
    assert measure.shipped_seconds(H200, call._replace(granularity=granularity.get('block:16x16')), 0.1, False) == {}
    assert measure.shipped_seconds('another', call, 0.1, False) == {}


def test_without_a_gpu_there_are_no_times_of_its_clock_and_the_hosts_counts(monkeypatch):
    assert clock.device_seconds(jax.jit(lambda x: x + 1), jax.numpy.ones(3)) is None
    monkeypatch.setattr(measure.target, 'platform', lambda: 'gpu')
    monkeypatch.setattr(measure, 'candidates', lambda call: ('dense', 'reference'))
    call = measure.Call('fc', (8, 1, 1, 32), (1, 1, 32, 32), reference.Geometry(), granularity.get('block:16x16'), 'float32')
    assert all(seconds > 0 for seconds in measure.measure(call, 0.5, rounds=3).values())
