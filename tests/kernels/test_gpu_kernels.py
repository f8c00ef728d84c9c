"""The Hopper kernels in Mosaic GPU's interpreter, which simulates copies, barriers and tensor cores and looks for races, against float64.

The interpreter of jax before 0.11 knows no transposed operands, which both gradients have: make test-gpu-aot PYTHON=python3.12.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax import kernels, sharding
from sparse_jax.kernels.gpu import config as config_lib
from tests.kernels.block_cases import NONE, SAME, compact_errors, errors, matrix, rounding, score_error

BF16, F16 = jnp.bfloat16, jnp.float16
gradients = jax.__version_info__ >= (0, 11)
needs_gradients = pytest.mark.skipif(
    not gradients, reason='the interpreter of jax before 0.11: make test-gpu-aot PYTHON=python3.12'
)

# Of a third list nothing is there, and a fourth is full: see kernel_cases.make.
CASES = {
    'whole tiles': (matrix(128, 128, 256), (64, 64), BF16),
    'edges, tokens that fill no tile': (matrix(100, 150, 200), (64, 64), BF16),
    'float16': (matrix(64, 192, 256), (64, 64), F16),
    'small blocks': (matrix(64, 100, 160), (32, 32), BF16),
    'large blocks': (matrix(130, 256, 384), (128, 128), BF16),
    'blocks of other sides': (matrix(64, 128, 160), (64, 32), BF16),
    'nothing at all': (matrix(64, 64, 64, 0.0), (64, 64), BF16),
    'everything': (matrix(64, 192, 64, 1.0), (64, 64), BF16),
    'one token': (matrix(1, 64, 192), (64, 64), BF16),
    '3x3': ((16, 4, 3, 64, 200, (3, 3), (1, 1), SAME, (1, 1), 0.4), (64, 64), BF16),
    '3x3 at a stride': ((20, 5, 4, 64, 96, (3, 3), (2, 2), ((1, 1), (0, 1)), (1, 1), 0.4), (32, 32), BF16),
    '1x1 at a stride': ((16, 4, 4, 64, 192, (1, 1), (2, 2), NONE, (1, 1), 0.5), (64, 64), F16),
    'dilated, wide padding': ((64, 4, 4, 64, 64, (2, 2), (1, 2), ((2, 1), (1, 0)), (2, 1), 0.5), (64, 64), BF16),
}


# Small weights and much to add up: the weight gradient in parts, of the pixels or, where there are few, of the images.
IN_PARTS = {
    'pixels': ((64, 4, 4, 64, 192, (3, 3), (1, 1), SAME, (1, 1), 0.4), (64, 64), BF16, 2),
    'images that fill no tile': (matrix(1100, 64, 192), (64, 64), BF16, 2),
    'small blocks, pixels that do not divide': ((130, 5, 3, 64, 96, (3, 3), (1, 1), SAME, (1, 1), 0.3), (32, 32), F16, 2),
    'nothing at all': (matrix(1100, 64, 192, 0.0), (64, 64), BF16, 2),
}


@pytest.fixture(autouse=True)
def _no_races(capfd):
    yield
    assert 'RACE DETECTED' not in capfd.readouterr().out


@pytest.mark.parametrize('name', CASES)
def test_products_and_both_gradients_equal_float64(name):
    case, block, dtype = CASES[name]
    assert max(errors(case, block, 'gpu', dtype, 3 if gradients else 1)) <= rounding(dtype)


@pytest.mark.parametrize(
    'name',
    (
        'edges, tokens that fill no tile',
        'small blocks',
        'large blocks',
        'blocks of other sides',
        'nothing at all',
        '3x3 at a stride',
        'dilated, wide padding',
    ),
)
def test_products_with_compact_values_equal_float64(name):
    case, block, dtype = CASES[name]
    assert max(compact_errors(case, block, 'gpu', dtype, 3 if gradients else 1)) <= rounding(dtype)


@needs_gradients
@pytest.mark.parametrize('name', ('pixels', 'small blocks, pixels that do not divide'))
def test_gradients_of_compact_values_that_are_summed_in_parts_equal_float64(name):
    case, block, dtype, _ = IN_PARTS[name]
    assert max(compact_errors(case, block, 'gpu', dtype)) <= rounding(dtype)


@needs_gradients
@pytest.mark.parametrize('name', IN_PARTS)
def test_weight_gradients_that_are_summed_in_parts_equal_float64(name, monkeypatch):
    case, block, dtype, parts = IN_PARTS[name]
    calls, rule = [], config_lib.num_splits

    def recorded(images, pixels, units, block):
        calls.append((pixels, rule(images, pixels, units, block)))
        return calls[-1][1]

    monkeypatch.setattr(config_lib, 'num_splits', recorded)
    assert max(errors(case, block, 'gpu', dtype)) <= rounding(dtype)
    assert calls == [(case[1] * case[2], parts)]  # pixels, which are divided where there are enough


@needs_gradients
@pytest.mark.parametrize('name', ('edges, tokens that fill no tile', 'small blocks', 'large blocks', '3x3 at a stride'))
def test_block_scores_equal_float64(name):
    case, block, dtype = CASES[name]
    assert score_error(case, block, 'gpu', dtype) < 1e-6


@pytest.mark.parametrize('counts', ([4, 0, 1], [1, 1, 1], [4, 4, 4]))
@pytest.mark.parametrize('units_per_program', (1, 4))
def test_unbalanced_lists_whatever_a_program_owns(counts, units_per_program):
    """Units of three blocks of outputs, by the longest, shortest and full lists; forward alone takes one at a time."""
    if units_per_program > 1 and not gradients:
        pytest.skip('the interpreter of jax before 0.11: make test-gpu-aot PYTHON=python3.12')
    from sparse_jax.kernels.gpu import operations
    from sparse_jax.kernels.reference import Geometry

    random, size = np.random.default_rng(0), 32
    units = np.stack([random.permutation(4) < count for count in counts], axis=1)
    mask = np.kron(units, np.ones((size, size))).astype(bool)
    x, dy = (jnp.asarray(random.standard_normal((64, 1, 1, n)), BF16) for n in mask.shape)
    w = jnp.asarray(random.standard_normal((1, 1, *mask.shape)) * mask, BF16)
    pattern = kernels.make_pattern(mask, block=(size, size))
    with kernels.lowering_for('gpu', interpret=True):
        if units_per_program == 1:
            actual, desired = operations.forward(x, w, pattern, Geometry()), np.float64(x[:, 0, 0]) @ np.float64(w[0, 0])
        else:
            config = config_lib.Config(block_m=64, num_stages=3, units_per_program=units_per_program)
            actual = operations.weight_gradient(x, dy, pattern, Geometry(), w.shape, config)
            desired = np.float64(x[:, 0, 0]).T @ np.float64(dy[:, 0, 0]) * mask
    assert np.abs(np.float64(actual).reshape(desired.shape) - desired).max() <= rounding(BF16) * np.abs(desired).max()


def test_other_contents_and_a_grown_capacity_are_right_and_compile_once_a_capacity():
    block, shape = (64, 64), (192, 128)
    mask_of = lambda units: np.kron(np.array(units), np.ones(block)).astype(bool)
    few, others = mask_of([[1, 0], [0, 0], [0, 0]]), mask_of([[0, 1], [1, 0], [1, 1]])
    x = jax.random.normal(jax.random.key(0), (64, shape[0]), BF16)
    w = jax.random.normal(jax.random.key(1), shape, BF16)
    make_pattern = functools.partial(kernels.make_pattern, block=block, implementation='gpu')
    first = make_pattern(few)
    with kernels.lowering_for('gpu', interpret=True):
        traced = []

        @jax.jit
        def run(w, pattern):
            traced.append(pattern.capacity)
            return kernels.sparse_dot(x, w, pattern)

        for _ in range(2):  # the interpreter's first call in a process changes jax's context, so that the second traces anew
            run(w * few, first)
        grown = make_pattern(others, at_least=first.capacity + 4)
        traced.clear()
        for mask, pattern, programs in (
            (few, first, 0),
            (others, make_pattern(others, at_least=first.capacity), 0),
            (others, grown, 1),
            (few, make_pattern(few, at_least=grown.capacity), 1),
        ):
            actual, desired = run(w * mask, pattern), np.float64(x) @ (np.float64(w) * mask)
            assert np.abs(np.float64(actual) - desired).max() <= rounding(BF16) * np.abs(desired).max()
            assert len(traced) == programs


@needs_gradients
def test_gradients_inside_a_scan_over_stacked_layers():
    random, block = np.random.default_rng(0), (32, 32)
    masks = np.kron(random.random((2, 2, 4)) < 0.5, np.ones(block)).astype(bool).reshape(2, 64, 128)
    w = jnp.asarray(random.standard_normal(masks.shape) * masks, BF16)
    x = jnp.asarray(random.standard_normal((64, 64)), BF16)
    stacked = kernels.make_patterns({'w': masks}, block=block, stacked=lambda *_: True, implementations={'w': 'gpu'})['w']

    def loss(w):
        return jax.lax.scan(
            lambda total, row: (total + kernels.sparse_dot(x, row[0], row[1]).astype(jnp.float32).sum(), None), 0.0, (w, stacked)
        )[0]

    with kernels.lowering_for('gpu', interpret=True):
        actual = np.asarray(jax.jit(jax.grad(loss))(w), np.float64)
    desired = np.broadcast_to(np.float64(x).sum(0)[:, None], masks.shape) * masks
    assert np.abs(actual - desired).max() <= rounding(BF16) * np.abs(desired).max()


@needs_gradients
@pytest.mark.parametrize('axis', [1, 0], ids=['outputs divided', 'inputs divided'])
def test_the_parts_of_a_layer_divided_over_a_mesh(axis):
    # One part after the other: jax's interpreter has one memory for all devices, whose clocks and barriers mix when two run at once.
    # The division itself is the same for every backend, and tested on meshes in test_sharding, compiled on one in tests/aot/test_gpu.
    random, block = np.random.default_rng(0), (32, 32)
    mask = np.kron(random.random((4, 4)) < 0.5, np.ones(block)).astype(bool)
    w = jnp.asarray(random.standard_normal(mask.shape) * mask, BF16)
    x = jnp.asarray(random.standard_normal((64, 128)), BF16)
    w_sharding = jax.sharding.NamedSharding(
        sharding.make_mesh(1, 2, devices=jax.devices()[:2]),
        jax.sharding.PartitionSpec(*('model' if i == axis else None for i in (0, 1))),
    )
    divided = kernels.make_patterns({'w': mask}, block=block, implementations={'w': 'gpu'}, shardings={'w': w_sharding})['w']
    halves = lambda a, axis: jnp.split(a, 2, axis)
    ys, dws = [], []
    for part, (x_part, w_part) in enumerate(zip(halves(x, 1) if axis == 0 else (x, x), halves(w, axis), strict=True)):
        pattern = divided.split.part(jax.tree.map(lambda a, part=part: jnp.asarray(np.asarray(a)[part : part + 1]), divided))
        with kernels.lowering_for('gpu', interpret=True):
            y, vjp = jax.vjp(lambda w, x=x_part, pattern=pattern: kernels.sparse_dot(x, w, pattern), w_part)
            ys.append(np.float64(y))
            dws.append(np.float64(vjp(jnp.ones_like(y))[0]))
    actual = sum(ys) if axis == 0 else np.concatenate(ys, 1)
    desired = np.float64(x) @ np.float64(w)
    assert np.abs(actual - desired).max() <= 2 * rounding(BF16) * np.abs(desired).max()
    desired = np.broadcast_to(np.float64(x).sum(0)[:, None], mask.shape) * mask
    assert np.abs(np.concatenate(dws, axis) - desired).max() <= rounding(BF16) * np.abs(desired).max()
