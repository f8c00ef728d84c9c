"""Exact selection against numpy on adversarial bits, on one device and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_jax.core import numerics, selection

pytestmark = pytest.mark.core

SHAPE = (16, 24)
SPECIAL = [0.0, -0.0, 1.0, 1.0, 1.0, 2.0, np.inf, np.nan, 1e-45, 3e-42, 1e-38, 3e38]


def _expected(scores: np.ndarray, k: int, where: np.ndarray, sign: int) -> np.ndarray:
    with np.errstate(invalid='ignore'):  # signalling NaNs among random bits
        values = np.abs(scores.astype(np.float64)).ravel()
    values[~np.isfinite(values)] = 0
    eligible = np.flatnonzero(where)
    order = eligible[np.lexsort((eligible, -sign * values[eligible]))]
    mask = np.zeros(values.size, bool)
    mask[order[: max(k, 0)]] = True
    return mask.reshape(scores.shape)


@functools.cache
def _select(largest: bool, one_cpu_device: bool = False):
    """Compiled for one CPU device (all layers in one array of chunks, ending early) or for several (leaves as they are)."""
    function = selection.select_largest if largest else selection.select_smallest
    jitted = jax.jit(lambda scores, k, where: function(scores, k, where))

    def select(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(numerics, 'one_cpu_device', lambda: one_cpu_device)
            return jitted(*args)

    return select if one_cpu_device else jitted


@settings(max_examples=250)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(['float32', 'bfloat16', 'float16']),
    kind=st.sampled_from(['normal', 'special', 'integers', 'equal', 'random bits']),
    k=st.one_of(st.sampled_from([-1, 0, 1, 383, 384, 385]), st.integers(0, 384)),
    portion=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    largest=st.booleans(),
    one_cpu_device=st.booleans(),
)
def test_selection_is_exact(seed, dtype, kind, k, portion, largest, one_cpu_device):
    rng = np.random.default_rng(seed)
    if kind == 'random bits':
        width = jnp.dtype(dtype).itemsize * 8
        scores = rng.integers(0, 2**width, SHAPE, dtype=np.uint64).astype(f'uint{width}').view(jnp.dtype(dtype))
    else:
        with np.errstate(over='ignore'):
            scores = {
                'normal': rng.normal(size=SHAPE),
                'special': rng.choice(SPECIAL, SHAPE),
                'integers': rng.integers(-3, 4, SHAPE),
                'equal': np.full(SHAPE, 0.5),
            }[kind].astype(jnp.dtype(dtype))
    where = rng.random(SHAPE) < portion
    got = _select(largest, one_cpu_device)(jnp.asarray(scores), jnp.int32(k), jnp.asarray(where))
    np.testing.assert_array_equal(got, _expected(scores, k, where, 1 if largest else -1))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('spec', [P('data', 'model'), P(None, 'model'), P(('data', 'model')), P('model', 'data')])
@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_selection_is_exact_where_sharded_and_gathers_nothing(spec, dtype, axis_type):
    mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, spec)
    rng = np.random.default_rng(0)
    scores, where = rng.integers(-9, 10, SHAPE).astype(jnp.dtype(dtype)), rng.random(SHAPE) < 0.8
    with jax.set_mesh(mesh):
        args = jax.device_put(scores, sharding), jnp.int32(100), jax.device_put(where, sharding)
        compiled = _select(True).lower(*args).compile()
        got = compiled(*args)
    assert 'all-gather' not in compiled.as_text()
    np.testing.assert_array_equal(got, _expected(scores, 100, where, 1))


def test_float64_scores_are_compared_in_full():
    with jax.enable_x64(True):
        scores = jnp.array([1.0, 1.0 + 2**-50, 1.0 - 2**-50], jnp.float64)
        got = selection.select_largest(scores, 1, jnp.ones(3, bool))
    assert got.tolist() == [False, True, False]


def test_a_leaf_of_2_to_the_31_elements_is_refused():
    huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match=r'fewer than 2\^31'):
        jax.eval_shape(selection.select_largest, huge, 1, jax.ShapeDtypeStruct(huge.shape, jnp.bool_))


@pytest.mark.parametrize('one_cpu_device', [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_largest_of_25_million_with_ties(one_cpu_device):
    size, k = 25_000_003, 2_500_000
    scores = np.random.default_rng(0).integers(0, 1000, size).astype(np.float32)
    got = np.asarray(_select(True, one_cpu_device)(jnp.asarray(scores), jnp.int32(k), jnp.ones(size, bool)))
    threshold = np.partition(scores, size - k)[size - k]
    ties = np.flatnonzero(scores == threshold)
    assert got.sum() == k and got[scores > threshold].all() and not got[scores < threshold].any()
    assert got[ties[: int(got[ties].sum())]].all(), 'not the ties with the lowest indices'


def test_one_threshold_over_layers_counts_totals_beyond_32_bits():
    """Amounts above all that there is, as of a 7B model, take everything up to each layer's bound."""
    keys = [selection.keys(jnp.arange(6.0)[None], jnp.ones((1, 6), bool)), selection.keys(jnp.ones((2, 3)), jnp.ones((2, 3), bool))]
    most = jnp.array([5, 3, 2], jnp.int32)
    counts = lambda n: selection.joint_counts(keys, (jnp.uint32(n >> 16), jnp.uint32(n & 0xFFFF)), most).tolist()
    assert counts(2**40) == [5, 3, 2]
    assert counts(7) == [5, 2, 0], 'scores 5, 4, 3, 2, then those equal to 1 in the lowest layers first'
    assert counts(3) == [3, 0, 0]
    assert counts(0) == [0, 0, 0]
