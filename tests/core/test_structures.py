"""n of every m inputs, equal inputs for every output, and outputs that are ablated: by definition at every step, and against numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparse_jax as sj
from sparse_jax.core import allocation
from tests.core import oracle
from tests.core.test_update import Given, _given_momentum

pytestmark = pytest.mark.core

# Inputs divide by 4 throughout; shapes with one output, one tap and one group are among them.
TREES = {
    'matrices': {'a': (16, 10), 'b': (8, 1), 'c': (4, 7)},
    'kernels': {'a': (3, 3, 4, 6), 'b': (1, 1, 8, 5), 'c': (12, 4)},
    'layers in rows': {'a': (2, 8, 6), 'b': (3, 8, 4, 2)},
}
GRANULARITIES = ('n_of_m:2:4', 'n_of_m:1:4', 'fan_in', 'ablation')
TOTAL = 7


def _is_stacked(tree: str):
    return (lambda path, leaf: True) if tree == 'layers in rows' else None


def _density(granularity: str) -> float:
    return {'n_of_m:2:4': 0.5, 'n_of_m:1:4': 0.25}.get(granularity, 0.3)


@functools.cache
def _jitted(tree: str, granularity: str):
    options = (
        dict(granularity='fan_in', ablation=0.5, grow='gradient') if granularity == 'ablation' else dict(granularity=granularity)
    )
    tx = sj.sparsify(
        _given_momentum(),
        density=_density(granularity),
        update_every=1,
        total_steps=TOTAL + 1,
        prune_rate=lambda t: jnp.float32(0.4),
        stacked=_is_stacked(tree),
        **options,
    )
    return tx, jax.jit(lambda u, s, p, m: tx.update(u, s, p, momentum=m))


def _layers(tree: str, masks) -> list[np.ndarray]:
    leaves = [np.asarray(masks[name]) for name in TREES[tree]]
    return [row for leaf in leaves for row in leaf] if _is_stacked(tree) else leaves


def _check(tree: str, granularity: str, masks) -> None:
    for i, mask in enumerate(_layers(tree, masks)):
        if granularity.startswith('n_of_m'):
            n, m = map(int, granularity.split(':')[1:])
            for index in np.ndindex(*mask.shape[:-2], mask.shape[-2] // m, mask.shape[-1]):
                *tap, group, output = index
                assert mask[(*tap, slice(group * m, group * m + m), output)].sum() == n
            continue
        inputs = mask.reshape(-1, mask.shape[-1]).sum(0)
        numbers = set(inputs.tolist())
        is_last = i == len(_layers(tree, masks)) - 1
        assert len(numbers - {0}) == 1 and (0 not in numbers or (granularity == 'ablation' and not is_last)), inputs


def _cases():
    """Quick are the convolutions, and one of the others each."""
    quick = ('kernels', 'n_of_m:2:4'), ('kernels', 'fan_in'), ('matrices', 'ablation'), ('layers in rows', 'fan_in')
    pairs = [(tree, granularity) for tree in TREES for granularity in GRANULARITIES]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(('tree', 'granularity'), _cases())
@given(seed=st.integers(0, 2**32 - 1), style=st.sampled_from(['normal', 'ties', 'not finite', 'zero']))
@settings(max_examples=8, deadline=None)
def test_masks_have_their_structure_at_every_step(tree, granularity, seed, style):
    rng, (tx, step) = np.random.default_rng(seed), _jitted(tree, granularity)
    draw = lambda: {name: rng.normal(size=shape).astype(np.float32) for name, shape in TREES[tree].items()}
    params = draw()
    state = tx.init(params)
    params = sj.apply_masks(params, sj.get_masks(state))
    first = [int(mask.sum()) for mask in _layers(tree, sj.get_masks(state))]
    narrowest = min(shape[-1] for shape in TREES[tree].values())
    for _ in range(TOTAL):
        u, m = draw(), draw()
        if style == 'ties':
            u, m = jax.tree.map(np.round, (u, m))
        elif style == 'zero':
            m = jax.tree.map(np.zeros_like, m)
        elif style == 'not finite':
            for name in u:
                u[name].flat[rng.integers(u[name].size)] = rng.choice([np.nan, np.inf])
                m[name].flat[rng.integers(m[name].size)] = np.nan
        updates, state = step(u, state, params, m)
        params = optax.apply_updates(params, updates)
        _check(tree, granularity, state.masks)
        counts = [int(mask.sum()) for mask in _layers(tree, state.masks)]
        if granularity.startswith('n_of_m'):
            assert counts == first
        elif granularity == 'fan_in':  # never more than at first, and never less by a unit that some layer has room for
            full = style == 'not finite' or any(mask.all() for mask in _layers(tree, state.masks))
            assert full or sum(first) - narrowest < sum(counts)
            assert sum(counts) <= sum(first)
        else:
            for now, before, mask in zip(counts, first, _layers(tree, state.masks), strict=True):
                assert before - mask.shape[-1] < now <= before
        for mask, p in zip(_layers(tree, state.masks), _layers(tree, params), strict=True):
            assert (p[~mask] == 0).all()


# --- against numpy


def _ranked(values, where):
    """Indices of the entries that may be chosen, the largest value first; of equal ones the lowest index first."""
    flat = np.asarray(values, np.float64).ravel()
    return [i for i in np.lexsort((np.arange(flat.size), -flat)) if where.ravel()[i]]


def _top(values, where, k):
    mask = np.zeros(np.shape(values), bool)
    mask.ravel()[_ranked(values, where)[:k]] = True
    return mask


def _pruned(q, mask, r):
    return mask & ~_top(-np.abs(q), mask, r)


def _n_of_m(q, m, mask, rate, group):
    after = _pruned(q, mask, math.ceil(np.float32(rate) * np.float32(mask.sum())))
    new = after.copy()
    for index in np.ndindex(*mask.shape[:-2], mask.shape[-2] // group, mask.shape[-1]):
        *tap, g, output = index
        part = (*tap, slice(g * group, g * group + group), output)
        new[part] |= _top(np.abs(m[part]), ~after[part], int(mask[part].sum() - after[part].sum()))
    return new


def _equal_inputs(q, m, after, inputs):
    """Each output keeps its largest weights and grows its largest others, as many as it is to have."""
    new = np.zeros_like(after)
    for output, k in enumerate(inputs):
        column = (..., output)
        kept = _top(np.abs(q[column]), after[column], k)
        new[column] = kept | _top(np.abs(m[column]), ~after[column], k - int(kept.sum()))
    return new


def _random_layer(rng, shape):
    q, m = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    if rng.random() < 0.3:
        q, m = np.round(2 * q) / 2, np.round(2 * m) / 2
    return q, m


def _given(granularity, masks, **options):
    """A state with these masks, and its step; the optimizer returns what it is given."""
    tx = sj.sparsify(
        _given_momentum(),
        density=_density(granularity),
        update_every=1,
        total_steps=9,
        prune_rate=lambda t: jnp.float32(0.4),
        granularity=granularity,
        **options,
    )
    params = {name: jnp.zeros(mask.shape) for name, mask in masks.items()}
    state = sj.set_masks(tx.init(params), {name: jnp.asarray(mask) for name, mask in masks.items()})
    return lambda q, m, gradient=None: jax.jit(lambda u, s, p, m: tx.update(u, s, p, momentum=m))(
        q if gradient is None else gradient, state, params, m
    )[1]


@pytest.mark.parametrize('seed', range(6))
def test_n_of_m_against_numpy(seed):
    rng, shape = np.random.default_rng(seed), (2, 8, 5)
    q, m = _random_layer(rng, shape)
    mask = np.zeros(shape, bool)
    for index in np.ndindex(2, 2, 5):
        tap, group, output = index
        mask[tap, group * 4 + rng.permutation(4)[:2], output] = True
    state = _given('n_of_m:2:4', {'w': mask})({'w': q}, {'w': m})
    np.testing.assert_array_equal(state.masks['w'], _n_of_m(q, m, mask, 0.4, 4))
    expected = _n_of_m(q, m, mask, 0.4, 4)
    assert int(state.stats.flipped[0]) == (expected != mask).sum()
    np.testing.assert_array_equal(state.grown['w'], expected & ~mask)


def _equal_mask(rng, shape, k):
    mask = np.zeros((math.prod(shape[:-1]), shape[-1]), bool)
    for output in range(shape[-1]):
        mask[rng.permutation(len(mask))[:k], output] = True
    return mask.reshape(shape)


@pytest.mark.parametrize('seed', range(6))
def test_fan_in_without_redistribution_against_numpy(seed):
    rng, shape, k = np.random.default_rng(seed), (3, 4, 7), 5
    (q, m), mask = _random_layer(rng, shape), _equal_mask(rng, shape, k)
    state = _given('fan_in', {'w': mask}, redistribute=None)({'w': q}, {'w': m})
    r = math.ceil(np.float32(0.4) * np.float32(k))
    expected = _equal_inputs(q, m, _pruned(q, mask, r * 7), [k] * 7)
    np.testing.assert_array_equal(state.masks['w'], expected)
    assert (int(state.stats.pruned[0]), int(state.stats.grown[0])) == (r, r)


def _whole_units(amount, w, room, outputs):
    """The budget of weights shared out, in whole inputs for all outputs."""
    total = sum(w)
    base = [min(c * o, amount * wl // total) for c, o, wl in zip(room, outputs, w, strict=True)]
    caps = [c * o for c, o in zip(room, outputs, strict=True)]
    extra = 0
    while extra <= max(caps) and sum(min(c, b + extra + 1) for c, b in zip(caps, base, strict=True)) <= amount:
        extra += 1
    target = [min(c, b + extra) for c, b in zip(caps, base, strict=True)]
    open_ = [i for i in range(len(caps)) if target[i] < caps[i]]
    for i in sorted(open_, key=lambda i: (-(amount * w[i] % total), i))[: amount - sum(target)]:
        target[i] += 1
    units = [t // o for t, o in zip(target, outputs, strict=True)]
    left = amount - sum(u * o for u, o in zip(units, outputs, strict=True))
    for i in sorted(range(len(units)), key=lambda i: (-(target[i] % outputs[i]), i)):
        if units[i] < room[i] and outputs[i] <= left:
            units[i] += 1
            left -= outputs[i]
    for i in sorted(range(len(units)), key=lambda i: (-outputs[i], i)):
        while units[i] < room[i] and outputs[i] <= left:
            units[i] += 1
            left -= outputs[i]
    return units


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_whole_units_leave_nothing_that_fits(seed):
    rng = np.random.default_rng(seed)
    room, width = rng.integers(0, 9, 4), rng.choice([1, 3, 10, 100], 4)
    shares, amount = rng.random(4).astype(np.float32), int(rng.integers(0, 1 + (room * width).sum()))
    given_out = np.asarray(_whole(jnp.array([amount]), shares, jnp.asarray(room, jnp.int32), jnp.asarray(width, jnp.int32)))
    left = amount - int((given_out * width).sum())
    assert (given_out <= room).all() and left >= 0
    assert left < min([w for w, r, g in zip(width, room, given_out, strict=True) if g < r], default=amount + 1)


@jax.jit
def _whole(amount, shares, room, width):
    return allocation.whole_units(allocation.total(amount), allocation.weights(shares), room, width)


@pytest.mark.parametrize('seed', range(6))
def test_redistribution_of_inputs_against_numpy(seed):
    rng, shapes = np.random.default_rng(seed), {'a': (20, 7), 'b': (3, 3, 2, 4), 'c': (9, 10)}
    data = {name: _random_layer(rng, shape) for name, shape in shapes.items()}
    outputs, sizes = [7, 4, 10], [20, 18, 9]
    first = [6, 6, 3]  # of 0.3 of the 302 weights the layers have 42, 22 and 27: the nearest multiples of their outputs
    masks = {name: _equal_mask(rng, shape, k) for (name, shape), k in zip(shapes.items(), first, strict=True)}
    state = _given('fan_in', masks)({name: q for name, (q, _) in data.items()}, {name: m for name, (_, m) in data.items()})
    w = oracle.weights([oracle.mean_magnitude(data[name][1], masks[name]) for name in shapes])
    r = oracle.prune_counts(0.4, first, sizes, first, w)
    kept = [k - x for k, x in zip(first, r, strict=True)]
    budget = sum(n * o for n, o in zip(first, outputs, strict=True))
    assert budget == sum(int(m.sum()) for m in masks.values())
    room = [size - k for size, k in zip(sizes, kept, strict=True)]
    grown = _whole_units(budget - sum(k * o for k, o in zip(kept, outputs, strict=True)), w, room, outputs)
    assert state.stats.grown.tolist() == grown
    for name, k, x, g in zip(shapes, first, r, grown, strict=True):
        q, m = data[name]
        after = _pruned(q, masks[name], x * q.shape[-1])
        np.testing.assert_array_equal(state.masks[name], _equal_inputs(q, m, after, [k - x + g] * q.shape[-1]))


@pytest.mark.parametrize('seed', range(8))
def test_ablation_against_numpy(seed):
    """SRigL: salient weights of the layer as a whole decide which outputs stay; those share what the layer has."""
    rng, shape, k, part = np.random.default_rng(seed), (12, 9), 3, 0.25
    q, g = _random_layer(rng, shape)
    g *= rng.lognormal(sigma=1.5, size=9).astype(np.float32)  # some outputs matter more
    mask, last = _equal_mask(rng, shape, k), _equal_mask(rng, (6, 4), 2)
    tx = sj.methods.srigl(
        _two_trees(), 0.3, update_every=1, total_steps=9, ablation=part, distribution='uniform', prune_rate=lambda t: jnp.float32(0.4),
        stop_step=9,
    )  # fmt: skip
    params = {'a': jnp.zeros(shape), 'b': jnp.zeros((6, 4))}
    state = sj.set_masks(tx.init(params), {'a': jnp.asarray(mask), 'b': jnp.asarray(last)})
    step = jax.jit(lambda gradient, s, p, u: tx.update(gradient, s, p, given=u))
    new = step({'a': g, 'b': jnp.ones((6, 4))}, state, params, {'a': q, 'b': jnp.ones((6, 4))})[1].masks
    r = math.ceil(np.float32(0.4) * np.float32(k)) * 9
    after = _pruned(q, mask, r)
    salient = after | _top(np.abs(g), np.ones(shape, bool), r)
    counts = salient.sum(0)
    needed = math.ceil(27 / 12)
    stays = (counts >= max(1, int(part * 12))) | _top(counts, np.ones(9, bool), needed)
    number = min(12, 27 // stays.sum())
    np.testing.assert_array_equal(new['a'], _equal_inputs(q, g, after, [number if s else 0 for s in stays]))
    assert seed or not stays.all(), 'nothing is ablated: the test shows nothing'
    assert (new['b'].sum(0) == 2).all(), 'the last layer keeps its outputs'


def _two_trees() -> optax.GradientTransformationExtraArgs:
    """An inner optimizer whose updates are given beside the gradients."""
    zeros = lambda params: Given(jax.tree.map(jnp.zeros_like, params))
    return optax.GradientTransformationExtraArgs(zeros, lambda updates, state, params=None, *, given: (given, Given(given)))


# --- first masks, one-shot pruning, checks


def test_the_first_masks_are_the_nearest_multiple():
    params = {'a': jnp.ones((784, 300)), 'b': jnp.ones((300, 100)), 'c': jnp.ones((100, 10))}
    for density in (0.05, 0.0137):
        tx = sj.sparse_momentum(0.1, density, 10, 100, granularity='fan_in')
        counts = sj.stats.nonzeros(jax.jit(tx.init)(params))
        for name, leaf in params.items():
            assert abs(counts[name] - density * leaf.size) <= leaf.shape[-1] / 2 + 1, (name, counts[name])


def test_prune_keeps_the_largest_of_each_group_and_output():
    rng = np.random.default_rng(0)
    params = {'w': jnp.asarray(rng.normal(size=(3, 8, 6)), jnp.float32)}
    _, groups = sj.prune(params, 0.25, granularity='n_of_m:1:4')
    for index in np.ndindex(3, 2, 6):
        tap, g, o = index
        part = np.abs(np.asarray(params['w'])[tap, 4 * g : 4 * g + 4, o])
        np.testing.assert_array_equal(groups['w'][tap, 4 * g : 4 * g + 4, o], part == part.max())
    _, equal = sj.prune(params, 0.25, granularity='fan_in')
    np.testing.assert_array_equal(equal['w'], _equal_inputs(params['w'], params['w'], np.ones((3, 8, 6), bool), [6] * 6))


def test_a_state_knows_its_units_and_check_sparse_its_density():
    params = {'w': jnp.ones((40, 30)), 'v': jnp.ones((30, 8))}
    for granularity, density in (('fan_in', 0.22), ('n_of_m:1:4', 0.25)):
        params = {'w': jnp.ones((40, 30)), 'v': jnp.ones((32, 8))}
        state = sj.sparse_momentum(0.1, density, 10, 100, granularity=granularity).init(params)
        masked = sj.apply_masks(params, sj.get_masks(state))
        sj.check_sparse(masked, state, density=density)
        with pytest.raises(ValueError, match='another density'):
            sj.check_sparse(masked, state, density=density + 0.1)
        assert str(sj.granularity.get(granularity)) in sj.stats.table(state)


@pytest.mark.parametrize('granularity', ['fan_in', pytest.param('n_of_m:2:4', marks=pytest.mark.slow)])
def test_sharded_updates_have_equal_bits(granularity):
    params = {'a': jax.random.normal(jax.random.key(0), (64, 32)), 'b': jax.random.normal(jax.random.key(1), (32, 16))}
    tx = sj.sparsify(
        optax.identity(), density=0.5, update_every=1, total_steps=10, granularity=granularity, prune_rate=lambda t: 0.5
    )
    grads = jax.tree.map(lambda p: jnp.round(p * 4) / 4, jax.tree.map(lambda p: jnp.roll(p, 1), params))
    state = tx.init(params)
    params = sj.apply_masks(params, sj.get_masks(state))
    expected = jax.jit(tx.update)(grads, state, params)[1]
    mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    spread = NamedSharding(mesh, P('data', 'model')), NamedSharding(mesh, P())
    args = jax.tree.map(
        lambda x: jax.device_put(x, spread[0] if x.ndim == 2 and x.dtype != jnp.int32 else spread[1]), (grads, state, params)
    )
    compiled = jax.jit(tx.update).lower(*args).compile()
    assert 'all-gather' not in compiled.as_text(), 'a sharded leaf is gathered'
    jax.tree.map(np.testing.assert_array_equal, compiled(*args)[1].masks, expected.masks)


def test_masks_by_hand_keep_their_number_and_their_structure():
    rng = np.random.default_rng(0)
    params = {'w': jnp.asarray(rng.normal(size=(40, 30)), jnp.float32), 'v': jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)}
    for density, of_masks in ((0.5, 0.1), (0.1, 0.5)):
        tx = sj.sparse_momentum(0.1, density, 1, 100, granularity='fan_in')
        _, masks = sj.prune(params, of_masks, granularity='fan_in')
        state = sj.set_masks(tx.init(params), masks)
        _, after = jax.jit(tx.update)(params, state, sj.apply_masks(params, masks))
        number = sum(sj.stats.nonzeros(masks).values())
        assert number - 8 < sum(sj.stats.nonzeros(after).values()) <= number
    loose = {name: jnp.asarray(rng.random(leaf.shape) < 0.5) for name, leaf in params.items()}
    for granularity, told in (('fan_in', 'outputs have from'), ('n_of_m:2:4', 'a group of 4 inputs has')):
        state = sj.sparse_momentum(0.1, 0.5, 1, 100, granularity=granularity).init(params)
        with pytest.raises(ValueError, match=told):
            sj.set_masks(state, loose)


def test_an_output_with_a_weight_that_is_not_finite_stays():
    """Else its update, minus the weight, would leave no zero off the mask."""
    rng = np.random.default_rng(1)
    params = {'a': jnp.asarray(rng.normal(size=(16, 12)), jnp.float32), 'b': jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)}
    tx = sj.methods.srigl(optax.sgd(0.1), 0.2, 2, 100, ablation=0.5, distribution='uniform')
    state, step = tx.init(params), jax.jit(tx.update)
    params = sj.apply_masks(params, sj.get_masks(state))
    for t in range(6):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        for output in range(0, 12 if t == 0 else 0, 3):
            row = int(np.flatnonzero(np.asarray(state.masks['a'])[:, output])[0])
            grads['a'] = grads['a'].at[row, output].set(jnp.inf)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        sj.check_sparse(params, state)
    assert (~jnp.isfinite(params['a'])).any(0).sum() == 4 and state.masks['a'].any(0)[::3].all()


@pytest.mark.parametrize('spec', [P('data', 'model'), P(None, 'model')])
def test_explicit_axes_of_a_mesh(spec):
    params = {'a': jax.random.normal(jax.random.key(0), (16, 8)), 'b': jax.random.normal(jax.random.key(1), (8, 8))}
    tx = sj.sparsify(optax.sgd(0.1, 0.9), density=0.5, update_every=1, total_steps=10, granularity='fan_in')
    state = tx.init(params)
    expected = jax.jit(tx.update)(params, state, sj.apply_masks(params, state.masks))[1].masks
    mesh = jax.make_mesh((4, 2), ('data', 'model'))
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), params)
        state = tx.init(params)
        got = jax.jit(tx.update)(params, state, sj.apply_masks(params, state.masks))[1].masks
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def _sparsify(**options):
    return sj.sparsify(optax.sgd(0.1), **{**dict(density=0.5, update_every=1, total_steps=9), **options})


@pytest.mark.parametrize(
    ('match', 'make'),
    [
        (r'groups of 4 inputs do not divide the 10 inputs.* m of 2, 5, 10 would', lambda p: _sparsify(granularity='n_of_m:2:4').init(p)),
        ('it is 0.5', lambda p: _sparsify(granularity='n_of_m:2:4', density=0.1)),
        ('redistribute: with 2 of every 4', lambda p: _sparsify(granularity='n_of_m:2:4', redistribute='mean_momentum')),
        ('distribution: with 2 of every 4', lambda p: _sparsify(granularity='n_of_m:2:4', distribution='erk')),
        ('1 <= n < m', lambda p: _sparsify(granularity='n_of_m:4:4')),
        ('must be \'n_of_m:N:M\'', lambda p: _sparsify(granularity='n_of_m:2x4')),
        ('not with a schedule', lambda p: sj.methods.gmp(optax.sgd(0.1), 0.5, 2, 9, granularity='fan_in')),
        ('prune_scope', lambda p: _sparsify(granularity='fan_in', prune_scope='global')),
        ('nonzeros|redistribute', lambda p: sj.methods.dsr(optax.sgd(0.1), 0.5, 2, 9, granularity='n_of_m:2:4')),
        ("needs granularity='fan_in'", lambda p: sj.methods.srigl(optax.sgd(0.1), 0.5, 2, 9, granularity='block:4x4')),
        ('ablation=2', lambda p: _sparsify(granularity='fan_in', ablation=2, redistribute=None)),
        ('keep_outputs', lambda p: _sparsify(granularity='fan_in', keep_outputs='out')),
        ('has no effect without ablation', lambda p: _sparsify(granularity='fan_in', keep_outputs=('w',))),
        ('give that number', lambda p: sj.prune(p, {'*': 0.5}, granularity='n_of_m:2:4')),
        ('keep_outputs: the pattern', lambda p: sj.methods.srigl(optax.sgd(0.1), 0.5, 1, 9, keep_outputs=('out/*',)).init(p)),
        ('needs leaves with inputs', lambda p: _sparsify(granularity='fan_in', sparsifiable=lambda *_: True).init({'b': jnp.ones(4)})),
        ('single weights or blocks', lambda p: sj.compact.init(lambda: p, sj.methods.rule('rigl', 0.5, 1, 9, granularity='fan_in'))),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(match, make):
    with pytest.raises(ValueError, match=match):
        make({'w': jnp.ones((10, 8))})
