"""Lists of units: against numpy, over densities and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core.granularity import Block, Unstructured
from sparse_jax.kernels import layout as layout_lib
from sparse_jax.kernels import lists
from sparse_jax.kernels.layout import Layout

pytestmark = pytest.mark.core

CASES = [
    ((7, 5), Unstructured()),
    ((40, 33), Unstructured()),
    ((40, 33), Block(4, 8)),
    ((3, 3, 6, 10), Unstructured()),
    ((3, 2, 8, 9), Block(4, 4)),
    ((3, 3, 8, 8), Block(4, 4, whole_kernel=True)),
]
_positions = jax.jit(lists.positions, static_argnums=1)


def layout_of(mask: np.ndarray, granularity, room: int = 0) -> Layout:
    """A layout by input, by numpy."""
    rows, columns = granularity.sides
    pad = [(0, 0)] * (mask.ndim - 2) + [(0, -mask.shape[-2] % rows), (0, -mask.shape[-1] % columns)]
    padded = np.pad(mask, pad)
    blocks = padded.reshape(-1, padded.shape[-2] // rows, rows, padded.shape[-1] // columns, columns).any(axis=(2, 4))
    units = np.moveaxis(blocks, 0, -1)
    flat, per_input = np.flatnonzero(units), units.shape[1] * units.shape[2]
    pointers = np.searchsorted(flat, np.arange(len(units) + 1) * per_input)
    indices = np.pad(flat % per_input, (0, room))
    return Layout(jnp.asarray(indices, jnp.int32), jnp.asarray(pointers, jnp.int32), mask.shape, granularity, by_input=True)


def random_mask(shape, granularity, density: float, seed: int) -> np.ndarray:
    """A mask of whole units."""
    units = np.random.default_rng(seed).random(granularity.unit_shape(shape)) < density
    return np.asarray(granularity.expand(jnp.asarray(units), shape))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([(1, 3), (31, 40), (32, 32), (33, 10), (1000, 300)]), st.floats(0, 1), st.integers(0, 99))
def test_positions_are_those_of_numpy(shape, density, seed):
    size, capacity = shape
    chosen = np.random.default_rng(seed).random(size) < density
    found, count = _positions(jnp.asarray(chosen), capacity)
    expected = np.flatnonzero(chosen)
    assert int(count) == len(expected)
    kept = min(capacity, len(expected))
    np.testing.assert_array_equal(np.asarray(found)[:kept], expected[:kept])


@pytest.mark.parametrize(('shape', 'granularity'), CASES)
@pytest.mark.parametrize('density', (0.0, 0.3, 1.0))
def test_masks_lists_and_values_go_both_ways(shape, granularity, density):
    mask = random_mask(shape, granularity, density, 0)
    expected = layout_of(mask, granularity, room=5)
    units = lists.units_of(jnp.asarray(mask), granularity)
    indices, pointers = lists.lists_of(units, expected.capacity)
    count = int(pointers[-1])
    np.testing.assert_array_equal(pointers, expected.pointers)
    np.testing.assert_array_equal(indices[:count], expected.indices[:count])
    np.testing.assert_array_equal(lists.mask_of(expected), mask)
    weight = jnp.asarray(np.where(mask, np.random.default_rng(1).standard_normal(shape), 0), jnp.float32)
    values = layout_lib.gather(weight, expected)
    np.testing.assert_array_equal(layout_lib.expand(values, expected), weight)
    assert not np.asarray(values)[count:].any(), 'zeros beyond the last unit'
    assert np.asarray(values).reshape(-1).nonzero()[0].size == np.count_nonzero(weight), 'and beyond the edge'


@pytest.mark.parametrize(('shape', 'granularity'), CASES)
@pytest.mark.parametrize('seed', range(3))
def test_sources_are_where_units_were(shape, granularity, seed):
    before = random_mask(shape, granularity, 0.3, seed)
    after = random_mask(shape, granularity, 0.3, seed + 100)
    old = layout_of(before, granularity, room=3)
    units = lists.units_of(jnp.asarray(after), granularity)
    capacity = int(units.sum()) + 2
    new = Layout(*lists.lists_of(units, capacity), shape, granularity, by_input=True)
    source = np.asarray(jax.jit(lists.sources)(old, new, units))
    old_flat, new_flat = (np.asarray(lists.flat_of(layout)[0]) for layout in (old, new))
    place = {int(flat): i for i, flat in enumerate(old_flat[: int(old.pointers[-1])])}
    expected = [place.get(int(flat), -1) if i < int(new.pointers[-1]) else -1 for i, flat in enumerate(new_flat)]
    assert source.tolist() == expected


def test_units_at_each_tap():
    mask = random_mask((3, 3, 8, 8), Block(4, 4, whole_kernel=True), 0.5, 0)
    units = lists.units_of(jnp.asarray(mask), Block(4, 4, whole_kernel=True))
    assert units.shape == (2, 2, 9) and granularity_lib.tap_units(Block(4, 4, True), (3, 3, 8, 8)) == (3, 3, 2, 2)
    assert (np.asarray(units).all(-1) | ~np.asarray(units).any(-1)).all()


@pytest.mark.parametrize(('shape', 'granularity'), CASES)
@pytest.mark.parametrize('density', [0.0, 0.3, 1.0])
def test_units_by_output_are_the_same_units(shape, granularity, density):
    layout = layout_of(random_mask(shape, granularity, density, 0), granularity, room=3)
    found = jax.jit(lists.by_output)(layout)
    *taps, inputs, outputs = layout.units
    each = int(np.prod(taps, dtype=int))
    tap, source, output = (np.asarray(x)[: int(layout.pointers[-1])] for x in layout.places())
    order = np.lexsort((tap, source, output))
    used = len(order)
    np.testing.assert_array_equal(np.asarray(found.numbers)[:used], order)
    np.testing.assert_array_equal(np.asarray(found.indices)[:used], (source * each + tap)[order])
    np.testing.assert_array_equal(found.pointers, np.searchsorted(output[order], np.arange(outputs + 1)))
    assert found.numbers.shape == layout.indices.shape and inputs * each > int(np.asarray(found.indices).max())


@pytest.mark.parametrize(('shape', 'granularity'), CASES)
def test_weights_are_counted_in_blocks_at_the_edge_too(shape, granularity):
    mask = random_mask(shape, granularity, 0.4, 1)
    assert int(layout_lib.weights(layout_of(mask, granularity, room=2))) == mask.sum()
