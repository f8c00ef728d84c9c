"""One mask update against the numpy oracle, bit for bit, given u and m as the inner optimizer returned them."""

import contextlib
import functools
import io
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_jax as sj
from sparse_jax.core import allocation, grouping, numerics
from tests.core import oracle

pytestmark = pytest.mark.core

RATES = (0.0, 0.005, 0.1, 0.3, 0.5, 0.77, 1.0)
TREES = {
    'one': [(7, 5)],
    'single weights': [(1, 1), (4, 4), (1, 1)],
    'lenet': [(20, 12), (12, 8), (8, 3)],
    'conv': [(3, 3, 2, 4), (2, 2), (4, 10)],
    'long': [(40, 40), (1, 3)],
}
# Each is a compilation: (tree, dtype, redistribute, one CPU device).
CASES = [
    *((tree, 'float32', True, tree in ('conv', 'long')) for tree in TREES),
    ('lenet', 'bfloat16', True, False),
    ('conv', 'float16', True, False),
    ('lenet', 'float32', False, True),
    ('lenet', 'float32', True, True),
    ('single weights', 'bfloat16', True, True),
]
STYLES = ('normal', 'ties', 'zero momentum', 'non-finite', 'tiny', 'full layer', 'zero weights')


class Given(NamedTuple):
    trace: Any


def _given_momentum() -> optax.GradientTransformationExtraArgs:
    """An inner optimizer that returns the updates and the momentum that it is given."""

    def update(updates, state, params=None, *, momentum):
        return updates, Given(momentum)

    return optax.GradientTransformationExtraArgs(lambda params: Given(jax.tree.map(jnp.zeros_like, params)), update)


@functools.cache
def _jitted(redistribute: bool, stacked: bool = False, one_cpu_device: bool = False):
    tx = sj.sparsify(
        _given_momentum(),
        density=0.5,
        update_every=1,
        total_steps=1000,
        prune_rate=lambda t: jnp.array(RATES, jnp.float32)[t - 1],
        redistribute=sj.criteria.mean_momentum if redistribute else None,
        stacked=(lambda path, leaf: True) if stacked else None,
    )
    jitted = jax.jit(lambda u, s, p, m: tx.update(u, s, p, momentum=m))

    def step(*args):  # group by group and in chunks, or all in one loop: by what there is when it is traced
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(numerics, 'one_cpu_device', lambda: one_cpu_device)
            patch.setattr(grouping, 'GROUP_WEIGHTS', 64)
            patch.setattr(grouping, 'MOST_GROUPS', 64)
            return jitted(*args)

    return tx, step


def _draw(rng: np.random.Generator, shape, dtype, style: str):
    """p, u, m and mask of one layer; every mask has at least one weight."""
    density = rng.choice([0.05, 0.3, 0.5, 0.9])
    mask = rng.random(shape) < density
    mask.flat[rng.integers(mask.size)] = True
    p, u, m = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    if style == 'ties':
        p, u, m = np.round(p), np.zeros_like(p), np.round(m)
    elif style == 'zero momentum':
        m[...] = rng.choice([0.0, -0.0])
    elif style == 'non-finite':
        for x in (u, m):
            x[rng.random(shape) < 0.3] = rng.choice([np.nan, np.inf, -np.inf])
    elif style == 'tiny':
        m *= rng.choice([1e-30, 1e-38, 1e-44])
    elif style == 'full layer':
        mask[...] = True
    elif style == 'zero weights':
        p[...], u[...] = 0.0, rng.choice([0.0, -0.0], size=shape)
    p[~mask] = 0.0
    return {'p': p.astype(dtype), 'u': u.astype(dtype), 'm': m.astype(dtype), 'mask': mask}


def _run(layers, rate_index: int, redistribute: bool, stacked: bool = False, one_cpu_device: bool = False):
    _, step = _jitted(redistribute, stacked, one_cpu_device)
    name = [f'w{i}' for i in range(len(layers))]
    p, u, m, masks = (
        {n: jnp.asarray(layer[key]) for n, layer in zip(name, layers, strict=True)} for key in ('p', 'u', 'm', 'mask')
    )
    state = sj.set_masks(_initial_state(redistribute, stacked, tuple((x.shape, str(x.dtype)) for x in p.values())), masks)
    updates, state = step(u, state._replace(count=jnp.int32(rate_index)), p, m)
    return [(np.asarray(state.masks[n]), np.asarray(updates[n])) for n in name], state.stats


@functools.cache
def _initial_state(redistribute, stacked, shapes):
    tx, _ = _jitted(redistribute, stacked)
    params = {f'w{i}': jnp.zeros(shape, dtype) for i, (shape, dtype) in enumerate(shapes)}
    return tx.init(params)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(f'uint{8 * x.dtype.itemsize}')


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**31),
    case=st.sampled_from(CASES),
    styles=st.lists(st.sampled_from(STYLES), min_size=3, max_size=3),
    rate=st.sampled_from(range(len(RATES))),
)
def test_update_equals_the_oracle_bit_for_bit(seed, case, styles, rate):
    tree, dtype, redistribute, one_cpu_device = case
    rng = np.random.default_rng(seed)
    layers = [_draw(rng, shape, jnp.dtype(dtype), style) for shape, style in zip(TREES[tree], styles, strict=False)]
    got, stats = _run(layers, rate, redistribute, one_cpu_device=one_cpu_device)
    want, pruned, target = oracle.update(layers, RATES[rate], redistribute)
    assert stats.pruned.tolist() == pruned
    assert stats.grown.tolist() == target
    flipped = [int((new != layer['mask']).sum()) for (new, _), layer in zip(want, layers, strict=True)]
    assert stats.flipped.tolist() == flipped
    assert sum(int(mask.sum()) for mask, _ in got) == sum(int(layer['mask'].sum()) for layer in layers)
    for (mask, delta), (want_mask, want_delta), layer in zip(got, want, layers, strict=True):
        np.testing.assert_array_equal(mask, want_mask)
        on_old_nan = np.isnan(want_delta.astype(np.float32))  # the bits of a NaN are nobody's promise
        np.testing.assert_array_equal(np.isnan(delta.astype(np.float32)), on_old_nan)
        np.testing.assert_array_equal(_bits(delta)[~on_old_nan], _bits(want_delta)[~on_old_nan])
        after = layer['p'] + delta
        assert not after[~mask].any(), 'a weight off the mask is not zero'
        assert not after[mask & ~layer['mask']].any(), 'a new weight does not start at zero'


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), style=st.sampled_from(STYLES), rate=st.sampled_from(range(len(RATES))))
def test_stacked_leaf_is_updated_as_its_layers(seed, style, rate):
    rng = np.random.default_rng(seed)
    stacks = [[_draw(rng, (6, 4), np.float32, style) for _ in range(3)], [_draw(rng, (5,), np.float32, 'normal') for _ in range(2)]]
    got, stats = _run([{k: np.stack([x[k] for x in stack]) for k in stack[0]} for stack in stacks], rate, True, stacked=True)
    want, pruned, _ = oracle.update([layer for stack in stacks for layer in stack], RATES[rate])
    assert stats.pruned.tolist() == pruned
    np.testing.assert_array_equal(np.concatenate([m.ravel() for m, _ in got]), np.concatenate([m.ravel() for m, _ in want]))


@settings(max_examples=100)
@given(seed=st.integers(0, 2**31), tree=st.sampled_from(['lenet', 'conv', 'long']), rate=st.sampled_from([0.1, 0.3, 0.5, 0.9]))
def test_targets_are_within_one_of_plain_float64_arithmetic(seed, tree, rate):
    rng = np.random.default_rng(seed)
    layers = [_draw(rng, shape, np.float32, 'normal') for shape in TREES[tree]]
    for layer in layers:
        layer['m'] *= np.float32(10.0 ** rng.uniform(-6, 0))
    _, stats = _run(layers, RATES.index(rate) if rate in RATES else 4, True)
    pruned = np.asarray(stats.pruned)
    shares = np.array([np.abs(layer['m'].astype(np.float64))[layer['mask']].mean() for layer in layers])
    room = np.array([(~layer['mask']).sum() for layer in layers]) + pruned
    base = np.minimum(room, pruned.sum() * shares / shares.sum())
    low, high = 0.0, float(room.max())
    for _ in range(200):  # the level that spreads what is left equally
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(room, base + middle).sum() <= pruned.sum() else (low, middle)
    np.testing.assert_array_less(np.abs(np.asarray(stats.grown) - np.minimum(room, base + low)), 1 + 1e-6)


def test_weight_pruned_and_regrown_keeps_its_value():
    layer = {
        'p': np.array([[0.1, 5.0, 0.0, 0.0]], np.float32),
        'u': np.full((1, 4), 0.01, np.float32),
        'm': np.array([[9.0, 1.0, 2.0, 0.5]], np.float32),
        'mask': np.array([[True, True, False, False]]),
    }
    [(mask, delta)], stats = _run([layer], RATES.index(0.5), True)
    assert mask.tolist() == [[True, True, False, False]]
    assert delta[0, 0] == np.float32(0.01), 'pruned as the smallest, regrown for its momentum: it must move on from its value'
    assert int(stats.pruned[0]) == int(stats.grown[0]) == 1 and int(stats.flipped[0]) == 0


def test_momentum_of_missing_weights_decides_growth():
    """Masking the momentum (or the gradient) would leave nothing to choose by."""
    params = {'w': jnp.array([[4.0, 1.0, 0.0, 0.0, 0.0]])}
    tx = sj.sparse_momentum(1e-3, density=0.4, update_every=2, total_steps=100)
    state = sj.set_masks(tx.init(params), {'w': params['w'] != 0})
    for _ in range(2):
        updates, state = tx.update({'w': jnp.array([[0.1, 0.1, 0.1, 5.0, 0.1]])}, state, params)
        params = optax.apply_updates(params, updates)
    assert sj.get_masks(state)['w'].tolist() == [[True, False, False, True, False]]


@pytest.mark.parametrize('criterion, expected', [(sj.criteria.gradient, 2), (sj.criteria.momentum, 4)])
def test_growth_follows_the_criterion(criterion, expected):
    tx = sj.sparsify(
        _given_momentum(), density=0.5, update_every=1, total_steps=10, grow=criterion, redistribute=None, prune_rate=lambda t: 0.5
    )
    params = {'w': jnp.array([[3.0, 1.0, 0.0, 0.0, 0.0]])}
    state = sj.set_masks(tx.init(params), {'w': params['w'] != 0})
    _, state = tx.update(
        {'w': jnp.array([[0.0, 0.0, 9.0, 0.0, 0.0]])}, state, params, momentum={'w': jnp.array([[0, 0, 0, 0, 7.0]])}
    )
    assert np.flatnonzero(sj.get_masks(state)['w'][0]).tolist() == [0, expected]


def test_random_growth_is_uniform_and_a_function_of_the_seed():
    tx = sj.sparsify(optax.sgd(0.0), density=0.1, update_every=1, total_steps=10, grow=sj.criteria.random, redistribute=None)
    params = {'w': jnp.ones((40, 50))}
    state = tx.init(params)
    params = sj.apply_masks(params, state.masks)
    step = jax.jit(lambda key: tx.update(params, state._replace(rng_key=key), params)[1].masks['w'] & ~state.masks['w'])

    def grown(seed):
        return np.asarray(step(jax.random.key(seed)))

    first, again, other = grown(0), grown(0), grown(1)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    columns = sum(grown(seed) for seed in range(20)).sum(axis=0)  # about 1900 draws in 50 columns: 38 each, standard deviation 6
    assert columns.min() > 10 and columns.max() < 75


def test_updates_happen_at_their_steps_only():
    tx = sj.sparse_momentum(0.1, density=0.3, update_every=3, total_steps=20, start_step=3, stop_step=15)
    params = {'w': jax.random.normal(jax.random.key(0), (10, 10))}
    state = tx.init(params)
    params = sj.apply_masks(params, sj.get_masks(state))
    step = jax.jit(tx.update)
    changed = []
    for t in range(1, 20):
        before = state.masks['w']
        updates, state = step({'w': jax.random.normal(jax.random.key(t), (10, 10))}, state, params)
        params = optax.apply_updates(params, updates)
        changed += [t] if (state.masks['w'] != before).any() else []
    assert changed == [6, 9, 12]


_multiply_divide = jax.jit(allocation.multiply_divide)


@settings(max_examples=200)
@given(
    amount=st.integers(0, 2**44), w=st.lists(st.integers(0, 2**20), min_size=3, max_size=3).filter(any), extra=st.integers(0, 2**30)
)
def test_multiply_divide_is_exact_beyond_32_bits(amount, w, extra):
    total = sum(w) + extra
    pair = jnp.uint32(amount >> 16), jnp.uint32(amount & 0xFFFF)
    quotient, remainder = _multiply_divide(pair, jnp.array(w, jnp.uint32), jnp.uint32(total))
    assert quotient.tolist() == [min(amount * x // total, 2**31 - 1) for x in w]
    fits = [amount * x // total < 2**31 for x in w]
    assert [r for r, ok in zip(remainder.tolist(), fits, strict=True) if ok] == [
        amount * x % total for x, ok in zip(w, fits, strict=True) if ok
    ]


@jax.jit
def _targets(pruned, shares, room):
    return allocation.growth_targets(allocation.total(pruned), pruned, allocation.weights(shares), room)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**31))
def test_targets_of_totals_beyond_32_bits_add_up(seed):
    """A 7B model's counts, made up: sums over the layers exceed 2^31 and stay exact."""
    rng = np.random.default_rng(seed)
    pruned = rng.integers(0, 2**30, 12)
    room = np.minimum(pruned + rng.integers(0, 2**30, 12), 2**31 - 1)
    shares = np.float32(rng.uniform(size=12) ** 3)
    got = _targets(jnp.array(pruned, jnp.int32), jnp.array(shares), jnp.array(room, jnp.int32))
    w = oracle.weights(list(shares))
    assert sum(got.tolist()) == int(pruned.sum())
    assert all(0 <= g <= c for g, c in zip(got.tolist(), room.tolist(), strict=True))
    base = [min(int(c), int(pruned.sum()) * x // sum(w)) for c, x in zip(room, w, strict=True)]
    raised = {g - b for g, b, c in zip(got.tolist(), base, room.tolist(), strict=True) if g < c}
    assert max(raised, default=0) - min(raised, default=0) <= 1, 'layers with room are raised equally, but for the last few'


def test_mean_momentum_of_a_large_layer_is_exact():
    """More than 2^20 elements: the limbs narrow; a float32 sum of this layer would be off by thousands."""
    size = 2**21 + 5
    m = np.full(size, 1.0, np.float32)
    m[: size // 2] = np.float32(1 + 2**-20)
    info = sj.criteria.LeafInfo(None, jnp.ones(size, bool), None, jnp.asarray(m), None)
    assert float(jax.jit(sj.criteria.mean_momentum)(info)) == pytest.approx(m.astype(np.float64).mean(), rel=1.2e-7)


@pytest.mark.slow
def test_a_process_with_one_device_moves_the_same_weights():
    """Really one device: group by group and in chunks there, all in one loop in this process."""
    program = """
import hashlib, jax, jax.numpy as jnp, numpy as np, optax, sparse_jax as sj
params = {'a': jax.random.normal(jax.random.key(0), (70, 90)), 'b': jax.random.normal(jax.random.key(1), (3, 3, 8, 9))}
tx = sj.sparsify(optax.identity(), density=0.2, update_every=1, total_steps=9, prune_rate=lambda t: 0.4)
state = tx.init(params)
grads = jax.tree.map(lambda p: jnp.round(4 * jnp.roll(p, 7)), params)
_, state = jax.jit(tx.update)(grads, state, sj.apply_masks(params, state.masks))
print(hashlib.sha256(b''.join(np.packbits(m).tobytes() for m in jax.tree.leaves(state.masks))).hexdigest(), jax.device_count())
"""
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=environment, check=True)
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(program, {})
    there, count = done.stdout.split()
    assert (there, int(count)) == (here.getvalue().split()[0], 1) and jax.device_count() == 8
