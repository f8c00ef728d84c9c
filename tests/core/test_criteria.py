"""Each criterion and each distribution against numpy."""

import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_jax as sj
from sparse_jax.core import allocation, selection
from sparse_jax.core.distributions import Layer

pytestmark = pytest.mark.core


def _info(seed=0, shape=(12, 7), **changes):
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = jnp.asarray(rng.random(shape) < 0.4)
    info = sj.criteria.LeafInfo(draw(), mask, draw(), draw(), jax.random.key(seed), jnp.int32(9))
    return info._replace(ever_active=mask | jnp.asarray(rng.random(shape) < 0.3), accumulated_gradient=draw(), **changes)


FORMULAS = {
    'magnitude': lambda i: np.abs(i.weight),
    'magnitude_times_momentum': lambda i: np.abs(np.asarray(i.weight) * np.asarray(i.momentum)),
    'taylor': lambda i: np.abs(np.asarray(i.weight) * np.asarray(i.gradient)),
    'momentum': lambda i: np.abs(i.momentum),
    'gradient': lambda i: np.abs(i.gradient),
    'mean_momentum': lambda i: np.abs(np.float64(i.momentum))[np.asarray(i.mask)].mean(),
    'mean_magnitude': lambda i: np.abs(np.float64(i.weight))[np.asarray(i.mask)].mean(),
    'mean_gradient': lambda i: np.abs(np.float64(i.gradient))[np.asarray(i.mask)].mean(),
    'nonzeros': lambda i: np.asarray(i.mask).sum() - 9,
}


@pytest.mark.parametrize('name', FORMULAS)
def test_formulas(name):
    info = _info()
    np.testing.assert_allclose(jax.jit(getattr(sj.criteria, name))(info), FORMULAS[name](info), rtol=1e-6)


def test_accumulated_gradient():
    info = _info()
    np.testing.assert_array_equal(sj.criteria.accumulated_gradient(5)(info), np.abs(info.accumulated_gradient))


def test_random_is_uniform_differs_by_key_and_is_one_value_a_block():
    scores = np.asarray(sj.criteria.random(_info(shape=(300, 300))))
    assert abs(scores.mean() - 0.5) < 0.01 and scores.min() >= 0 and scores.max() < 1
    assert (np.asarray(sj.criteria.random(_info(1, (300, 300)))) != scores).mean() > 0.99
    blocks = np.asarray(sj.criteria.random(_info(shape=(8, 8), granularity=sj.granularity.Block(4, 4))))
    assert len(np.unique(blocks)) == 4 and (blocks[:4, :4] == blocks[0, 0]).all()


def test_random_never_active_takes_those_first():
    info = _info(shape=(40, 40))
    scores, fired = np.asarray(sj.criteria.random_never_active(info)), np.asarray(info.ever_active)
    assert scores[~fired].min() >= 1.0 > scores[fired].max()


def test_criteria_work_in_float64():
    with jax.enable_x64(True):
        for criterion in (*sj.criteria.PRUNE.values(), *sj.criteria.GROW.values()):
            tx = sj.sparsify(optax.sgd(0.1, 0.9), density=0.3, update_every=1, total_steps=9,
                             **{'prune' if criterion in sj.criteria.PRUNE.values() else 'grow': criterion})  # fmt: skip
            params = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)))}
            state = jax.eval_shape(lambda p, tx=tx: tx.update(p, tx.init(p), p)[1], params)
            assert state.masks['w'].shape == (8, 8)


def test_momentum_by_neuron_gives_each_neuron_its_part():
    info = _info(shape=(200, 5), amount=jnp.int32(60))
    m = np.abs(np.float64(info.momentum)) * np.array([1, 2, 3, 4, 0.1])
    info = info._replace(momentum=jnp.asarray(m, jnp.float32))
    scores = np.asarray(sj.criteria.momentum_by_neuron(info))
    missing = ~np.asarray(info.mask)
    grown = selection.select_largest(jnp.asarray(scores), 60, jnp.asarray(missing))
    part = 60 * m.mean(0) / m.mean(0).sum()
    counts = np.asarray(grown).sum(0)
    assert counts.sum() == 60 and (np.abs(counts - part) <= 4).all()
    for j in range(5):  # the largest of the neuron
        chosen = np.asarray(grown)[:, j]
        assert m[chosen, j].min(initial=np.inf) >= m[missing[:, j] & ~chosen, j].max(initial=0)


@pytest.mark.parametrize(
    ('setting', 'criterion', 'message'),
    [
        ('prune', lambda: 1, 'prune: must be a function (info: sj.criteria.LeafInfo)'),
        ('grow', lambda a, b: 1, 'grow: must be a function (info: sj.criteria.LeafInfo)'),
        ('prune', None, 'prune=None'),
        ('prune', 'magnitud', "prune='magnitud' does not exist. Did you mean 'magnitude'"),
        ('grow', 'gradients', "grow='gradients' does not exist. Did you mean 'gradient'"),
        ('redistribute', 'momentum', "redistribute='momentum' does not exist. Did you mean 'mean_momentum'"),
    ],
)
def test_criteria_of_the_wrong_signature_or_name(setting, criterion, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sj.sparsify(optax.sgd(0.1), density=0.5, update_every=1, total_steps=9, **{setting: criterion})


@pytest.mark.parametrize(
    ('setting', 'criterion', 'message'),
    [
        (
            'prune',
            lambda info: info.weight[0],
            r"prune: the criterion must return scores of the layer's shape \(4, 4\), but for 'w'",
        ),
        ('grow', lambda info: 1.0, r"grow: the criterion must return scores of the layer's shape \(4, 4\)"),
        ('redistribute', lambda info: info.weight, "redistribute: the criterion must return one number, but for 'w'"),
    ],
)
def test_criteria_of_the_wrong_shape(setting, criterion, message):
    tx = sj.sparsify(optax.sgd(0.1), density=0.5, update_every=1, total_steps=9, **{setting: criterion})
    params = {'w': jnp.ones((4, 4))}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_rules_that_do_not_fit_together():
    arguments = dict(density=0.5, update_every=4, total_steps=40)
    with pytest.raises(ValueError, match='accumulated over 5 steps, but masks are updated every 4'):
        sj.sparsify(optax.sgd(0.1), grow=sj.criteria.accumulated_gradient(5), **arguments)
    with pytest.raises(ValueError, match='rises from 0.1 at step 0 to 0.2 at step 4, but grow=None'):
        sj.sparsify(optax.sgd(0.1), grow=None, **{**arguments, 'density': lambda t: 0.1 if t < 4 else 0.2})
    with pytest.raises(ValueError, match="prune_scope='globl' does not exist. Did you mean 'global'"):
        sj.sparsify(optax.sgd(0.1), prune_scope='globl', **arguments)
    with pytest.raises(ValueError, match="does not go with prune_scope='global'"):
        sj.sparsify(optax.sgd(0.1), prune_scope='global', prune='signed_magnitude', **arguments)
    with pytest.raises(ValueError, match="dense='fc1': must be a sequence"):
        sj.sparsify(optax.sgd(0.1), dense='fc1', **arguments)
    with pytest.raises(ValueError, match="dense: the pattern 'fc3/k' matches no sparse leaf. Did you mean 'fc1/kernel'"):
        sj.sparsify(optax.sgd(0.1), dense=['fc3/k'], **arguments).init({'fc1': {'kernel': jnp.ones((4, 4))}})


LAYER_SETS = {
    'lenet': [(784, 300), (300, 100), (100, 10)],
    'convolutions': [(3, 3, 3, 64), (3, 3, 64, 128), (1, 1, 128, 32), (512, 10)],
    'tiny': [(1, 1), (2, 2), (64, 64), (3, 1)],
}


def _layers(name):
    return [Layer(f'l{i}', shape, math.prod(shape)) for i, shape in enumerate(LAYER_SETS[name])]


@settings(max_examples=150)
@given(
    density=st.floats(0.002, 1.0), name=st.sampled_from(list(LAYER_SETS)), which=st.sampled_from(['uniform', 'erdos_renyi', 'erk'])
)
def test_distributions_meet_the_budget_to_the_unit(density, name, which):
    layers = _layers(name)
    total = round(density * sum(layer.size for layer in layers))
    if total < len(layers):
        with pytest.raises(ValueError, match='every layer needs at least'):
            sj.distributions.get(which)(layers, density)
        return
    counts = sj.distributions.get(which)(layers, density)
    assert sum(counts) == total
    assert all(1 <= n <= layer.size for n, layer in zip(counts, layers, strict=True))


@pytest.mark.parametrize(('which', 'raw'), [
    ('erdos_renyi', lambda s: Fraction(s[-2] + s[-1], s[-2] * s[-1])), ('erk', lambda s: Fraction(sum(s), math.prod(s))),
])  # fmt: skip
@pytest.mark.parametrize('density', [0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize('name', LAYER_SETS)
def test_erdos_renyi_densities_are_proportional_where_not_full(name, density, which, raw):
    """By bisection for the factor: density_l = min(1, factor * raw_l), in fractions."""
    layers = _layers(name)
    total = round(density * sum(layer.size for layer in layers))
    low, high = Fraction(0), Fraction(10**9)
    for _ in range(120):
        middle = (low + high) / 2
        asked = sum(min(Fraction(1), middle * raw(layer.shape)) * layer.size for layer in layers)
        low, high = (middle, high) if asked <= total else (low, middle)
    counts = sj.distributions.get(which)(layers, density)
    exact = [float(min(Fraction(1), low * raw(layer.shape)) * layer.size) for layer in layers]
    assert all(abs(n - e) <= 1 + len(layers) for n, e in zip(counts, exact, strict=True)), (counts, exact)
    assert all(n == layer.size for n, e, layer in zip(counts, exact, layers, strict=True) if e > layer.size - 1e-6)


def test_a_mapping_fixes_some_layers_and_the_others_share_the_rest():
    layers = _layers('lenet')
    counts = sj.distributions.get({'l2': 1.0, 'l1*': 0.1})(layers, 0.05)
    assert counts == [13310 - 3000 - 1000, 3000, 1000]
    with pytest.raises(ValueError, match="the pattern 'l9' matches no sparse leaf. Did you mean 'l2'"):
        sj.distributions.get({'l9': 0.5})(layers, 0.05)
    assert sj.distributions.matching(['w', 'v[1]'], ['w[0]', 'w[1]', 'v[0]', 'v[1]'], 'distribution') == [0, 0, None, 1]
    with pytest.raises(ValueError, match="'l1' never comes into play"):
        sj.distributions.get({'l*': 0.5, 'l1': 0.1})(layers, 0.05)
    with pytest.raises(ValueError, match='fixes every layer, at 0.5 of the units in all, but density=0.05'):
        sj.distributions.get({'l*': 0.5})(layers, 0.05)
    assert sum(sj.distributions.get({'l*': 0.05})(layers, 0.05)) == 13310
    with pytest.raises(ValueError, match='which leaves -'):
        sj.distributions.get({'l0': 0.5})(layers, 0.05)
    with pytest.raises(ValueError, match=r'given the density 2; it must be in \(0, 1\]'):
        sj.distributions.get({'l0': 2})


def _pair(n):
    return jnp.uint32(n >> 16), jnp.uint32(n & 0xFFFF)


def _number(pair):
    return (int(pair[0]) << 16) + int(pair[1])


_ARITHMETIC = jax.jit(lambda a, b: (allocation.add(a, b), allocation.subtract(a, b), allocation.at_most(a, b)))
_FIRST_COME = jax.jit(allocation.first_come)
_DECREASES = jax.jit(lambda a, n, p, f: allocation.decreases(a, n, p, f))


@settings(max_examples=150)
@given(a=st.integers(0, 2**46), b=st.integers(0, 2**46))
def test_amounts_beyond_32_bits_are_exact(a, b):
    added, subtracted, at_most = _ARITHMETIC(_pair(a), _pair(b))
    assert _number(added) == a + b and _number(subtracted) == max(a - b, 0) and bool(at_most) == (a <= b)


@settings(max_examples=60)
@given(amount=st.integers(0, 2**35), takes=st.lists(st.integers(0, 2**31 - 1), min_size=12, max_size=12))
def test_first_come(amount, takes):
    got, left = [], amount
    for take in takes:
        got.append(min(left, take))
        left -= got[-1]
    assert _FIRST_COME(_pair(amount), jnp.array(takes, jnp.int32)).tolist() == got


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), part=st.floats(0, 1.2))
def test_a_falling_density_takes_exactly_what_it_must_from_a_7b_model(seed, part):
    """Made-up counts of 12 layers whose sums exceed 2^31."""
    rng = np.random.default_rng(seed)
    nonzeros = rng.integers(1, 2**30, 12)
    prunable = np.minimum(nonzeros, rng.integers(0, 2**30, 12))
    final = rng.integers(1, 2**30, 12)
    most = np.maximum(np.minimum(prunable, nonzeros - 1), 0)
    amount = int(part * most.sum())
    given = np.array(_DECREASES(_pair(amount), *(jnp.array(x, jnp.int32) for x in (nonzeros, prunable, final))))
    assert (given >= 0).all() and (given <= most).all()
    assert given.sum() == min(amount, most.sum())
