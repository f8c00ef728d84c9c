"""Blocks against a brute force over units, and what scores, expands and counts them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_jax as sj
from sparse_jax.core import group_update
from tests.core import oracle

pytestmark = pytest.mark.core

SHAPES = [(8, 8), (10, 7), (3, 3, 6, 9), (2, 5, 8)]
BLOCKS = [sj.granularity.Block(2, 3), sj.granularity.Block(4, 4), sj.granularity.Block(4, 4, True), sj.granularity.Block(1, 5)]


def _units(block, shape):
    """For each unit the index arrays of its weights, by loops."""
    *lead, m, n = shape
    taps = list(np.ndindex(*lead))
    units = []
    for group in [taps] if block.whole_kernel else [[tap] for tap in taps]:
        for i in range(0, m, block.rows):
            for j in range(0, n, block.columns):
                members = [
                    (*tap, r, c)
                    for tap in group
                    for r in range(i, min(i + block.rows, m))
                    for c in range(j, min(j + block.columns, n))
                ]
                units.append(tuple(np.array(members).T))
    return units


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('block', BLOCKS, ids=str)
def test_units_are_what_loops_find(block, shape):
    units = _units(block, shape)
    assert int(np.prod(block.unit_shape(shape))) == len(units)
    rng = np.random.default_rng(0)
    values = rng.normal(size=shape).astype(np.float32)
    flags = rng.normal(size=len(units)) > 0
    mask = np.zeros(shape, bool)
    for unit, flag in zip(units, flags, strict=True):
        mask[unit] = flag
    per_unit = np.asarray(sj.granularity.active(block, jnp.asarray(mask)))
    assert per_unit.ravel().tolist() == flags.tolist()
    np.testing.assert_array_equal(block.expand(jnp.asarray(per_unit), shape), mask)
    scores = np.asarray(jax.jit(lambda x: group_update.unit_scores(block, x))(jnp.asarray(np.abs(values)))).ravel()
    np.testing.assert_allclose(scores, [np.abs(values[unit]).astype(np.float64).mean() for unit in units], rtol=3e-7)
    assert block.edges(shape) == (len({len(unit[0]) for unit in units}) > 1)


def test_scores_that_are_not_finite_count_as_zero_in_the_mean():
    scores = jnp.array([[1.0, jnp.nan], [jnp.inf, 3.0]])
    assert float(group_update.unit_scores(sj.granularity.Block(2, 2), scores)[0, 0]) == 1.0


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), density=st.sampled_from([0.2, 0.5]), rate=st.sampled_from([0, 1]))
def test_an_update_in_blocks_equals_a_brute_force(seed, density, rate):
    """Integers, so that means compare exactly: pruned, shared out and grown in units, ties to the lowest unit."""
    block, shapes = sj.granularity.Block(2, 2), {'a': (8, 6), 'b': (6, 4)}
    rng = np.random.default_rng(seed)
    w = {n: rng.integers(-3, 4, s).astype(np.float32) for n, s in shapes.items()}
    m = {n: rng.integers(-3, 4, s).astype(np.float32) for n, s in shapes.items()}
    units = {n: _units(block, s) for n, s in shapes.items()}
    on = {n: rng.permutation(len(units[n])) < max(2, round(density * len(units[n]))) for n in shapes}
    masks = {n: np.zeros(s, bool) for n, s in shapes.items()}
    for n in shapes:
        for unit, flag in zip(units[n], on[n], strict=True):
            masks[n][unit] = flag
    state = _block_state(density)._replace(count=jnp.int32(rate))
    state = sj.set_masks(state, {n: jnp.asarray(x) for n, x in masks.items()})
    params = {n: jnp.asarray(np.where(masks[n], w[n], 0)) for n in shapes}
    _, state = _block_step()({n: jnp.zeros(s) for n, s in shapes.items()}, state, params, {n: jnp.asarray(x) for n, x in m.items()})

    names, mean = sorted(shapes), lambda x, unit: np.abs(x[unit]).mean()
    shares = oracle.weights([oracle.mean_magnitude(m[n], masks[n]) for n in names])
    nonzeros = [int(on[n].sum()) for n in names]
    pruned = oracle.prune_counts(RATES[rate], nonzeros, [len(units[n]) for n in names], nonzeros, shares)
    room = [len(units[n]) - k + r for n, k, r in zip(names, nonzeros, pruned, strict=True)]
    targets = oracle.targets(pruned, shares, room)
    assert state.stats.pruned.tolist() == pruned and state.stats.grown.tolist() == targets
    for n, r, g in zip(names, pruned, targets, strict=True):
        after = on[n].copy()
        after[sorted(np.flatnonzero(on[n]), key=lambda i: (mean(w[n], units[n][i]), i))[:r]] = False
        grown = sorted(np.flatnonzero(~after), key=lambda i: (-mean(m[n], units[n][i]), i))[:g]
        after[grown] = True
        want = np.zeros(shapes[n], bool)
        for unit, flag in zip(units[n], after, strict=True):
            want[unit] = flag
        np.testing.assert_array_equal(state.masks[n], want)


RATES = (0.3, 0.6)
_CACHE = {}


def _block_tx(density):
    def update(updates, state, params=None, *, momentum):
        return updates, optax.TraceState(momentum)

    given = optax.GradientTransformationExtraArgs(lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)), update)
    schedule = lambda t: jnp.array(RATES, jnp.float32)[t - 1]
    return sj.sparsify(given, density=density, update_every=1, total_steps=9, prune_rate=schedule, granularity='block:2x2')


def _block_state(density):
    if density not in _CACHE:
        _CACHE[density] = _block_tx(density).init({'a': jnp.zeros((8, 6)), 'b': jnp.zeros((6, 4))})
    return _CACHE[density]


def _block_step():
    if 'step' not in _CACHE:
        tx = _block_tx(0.5)
        _CACHE['step'] = jax.jit(lambda g, s, p, m: tx.update(g, s, p, momentum=m))
    return _CACHE['step']


def test_a_unit_with_a_weight_that_is_not_finite_stays_where_it_is():
    params = {'w': jnp.ones((4, 4)).at[0, 0].set(jnp.nan)}
    tx = sj.sparsify(
        optax.sgd(0.0, 0.9), density=0.5, update_every=1, total_steps=9, granularity='block:2x2', prune_rate=lambda t: 1.0
    )
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    state = sj.set_masks(tx.init(params), {'w': jnp.asarray(mask)})
    _, state = tx.update({'w': jnp.zeros((4, 4))}, state, params)
    assert state.masks['w'][:2, :2].all() and int(state.masks['w'].sum()) == 8


def test_flips_are_counted_in_weights():
    tx = sj.sparsify(
        optax.sgd(0.0, 0.9), density=0.5, update_every=1, total_steps=9, granularity='block:4x4', prune_rate=lambda t: 0.9
    )
    params = {'w': jax.random.normal(jax.random.key(0), (10, 18))}
    first = tx.init(params)
    _, state = tx.update({'w': jax.random.normal(jax.random.key(1), (10, 18))}, first, sj.apply_masks(params, first.masks))
    changed = int((state.masks['w'] != first.masks['w']).sum())
    assert state.stats.flipped.tolist() == [changed] and changed > 0
    assert sj.stats.flip_rate(state) == changed / 180


@pytest.mark.parametrize('text', ['block:0x4', 'block:4', 'blocks:4x4', 'block:4x4:kernels'])
def test_texts_that_name_no_block(text):
    with pytest.raises(ValueError, match='granularity'):
        sj.sparsify(optax.sgd(0.1), density=0.5, update_every=1, total_steps=2, granularity=text)


def test_a_block_larger_than_its_leaf():
    tx = sj.sparsify(optax.sgd(0.1), density=0.5, update_every=1, total_steps=2, granularity='block:16x16')
    with pytest.raises(ValueError, match=r'block of 16x16 \(inputs x outputs\) is larger than a leaf of shape \(100, 10\).*dense'):
        tx.init({'fc': jnp.ones((100, 10))})
    dense = sj.sparsify(optax.sgd(0.1), density=0.5, update_every=1, total_steps=2, granularity='block:16x16', dense=['out'])
    masks = dense.init({'fc': jnp.ones((100, 32)), 'out': jnp.ones((32, 10))}).masks
    assert masks['out'].ndim == 0 and masks['fc'].ndim == 2
