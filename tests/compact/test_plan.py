"""Mask updates of compact weights: the masks of sj.sparsify, bit for bit, and what surrounds them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_jax as sj
from sparse_jax.compact.move import with_capacities
from sparse_jax.core.granularity import Block, Unstructured
from sparse_jax.kernels.layout import is_layout

EVERY, TOTAL = 2, 40
IS_STACKED = lambda path, leaf: path.startswith('stack')
SHAPES = {'a': {'kernel': (24, 20), 'bias': (20,)}, 'conv': (3, 3, 8, 12), 'stack': (3, 16, 12)}
FEW = {'a': {'kernel': (24, 20), 'bias': (20,)}, 'stack': (3, 16, 12)}
is_shape = lambda x: isinstance(x, tuple)


def _random(step: int, granularity, shapes=SHAPES) -> dict:
    """A tree of arrays; in blocks the magnitude is one in each unit, so that its mean is exact, and signs stay."""
    random, signs = np.random.default_rng(step), np.random.default_rng(7)

    def leaf(shape):
        x = random.standard_normal(shape).astype(np.float32)
        if len(shape) < 2 or isinstance(granularity, Unstructured):
            return jnp.asarray(x)
        rows = shape[0] if shape == SHAPES['stack'] else None
        layer = shape if rows is None else shape[1:]
        units = np.abs(random.standard_normal((rows or 1, *granularity.unit_shape(layer)))).astype(np.float32)
        whole = np.stack([np.asarray(granularity.expand(jnp.asarray(unit), layer)) for unit in units])
        return jnp.asarray(np.where(signs.random(shape) < 0.5, 1, -1) * whole.reshape(shape), jnp.float32)

    return jax.tree.map(leaf, shapes, is_leaf=is_shape)


def _scores(tree: dict, layout: dict, granularity) -> dict:
    """What the probes give: all of it, or a magnitude for each unit at each tap."""

    def leaf(x, lists):
        if not is_layout(lists):
            return None
        if isinstance(granularity, Unstructured):
            return x
        rows, columns = granularity.sides
        return jnp.abs(x)[..., ::rows, ::columns]

    return jax.tree.map(leaf, tree, layout, is_leaf=lambda x: x is None)


def _masks_of(layout: dict) -> dict:
    return jax.tree.map(np.asarray, sj.compact.masks(layout))


def _rule(name: str, granularity):
    options = dict(update_every=EVERY, total_steps=TOTAL, granularity=granularity, stacked=IS_STACKED, seed=5)
    if name == 'rigl_accumulated':
        return sj.methods.rule('rigl', density=0.3, grow=sj.criteria.accumulated_gradient(2), **options)
    if name == 'sparse_momentum' and not isinstance(granularity, Unstructured):
        options['prune_rate'] = 0.3
    return sj.methods.rule(name, density=0.3, **options)


@pytest.mark.parametrize(
    ('name', 'granularity'),
    [
        ('rigl', Unstructured()),
        ('sparse_momentum', Unstructured()),
        ('set', Block(4, 4)),
        ('rigl', Block(8, 4)),
        *(
            pytest.param(name, unit, marks=pytest.mark.slow)
            for name, unit in (
                ('set', Unstructured()),
                ('dsr', Unstructured()),
                ('rigl_accumulated', Unstructured()),
                ('sparse_momentum', Block(4, 4)),
            )
        ),
    ],
    ids=str,
)
def test_masks_are_those_of_sparsify_from_the_same_scores(name, granularity):
    rule = _rule(name, granularity)
    inner = optax.sgd(0.05, momentum=0.9)
    tx = sj.sparsify(inner, rule=rule)
    params = _random(1000, granularity)
    state = jax.jit(tx.init)(params)
    params = sj.apply_masks(params, sj.get_masks(state))
    plan = functools.partial(sj.compact.plan, rule=rule)
    update, advance = jax.jit(tx.update), jax.jit(inner.update)
    capacity_factor, updates_seen = 100.0, 0  # one capacity, and so one program
    for t in range(1, 17):
        grads = _random(t, granularity)
        u, inner_state = advance(grads, state.inner_state, params)
        old_masks = sj.get_masks(state)
        updates, state = update(grads, state, params)
        if rule.timing.is_update(t):
            stepped = sj.apply_masks(optax.apply_updates(params, u), old_masks)
            values, layout = sj.compact.compress(
                stepped, old_masks, granularity=granularity, stacked=IS_STACKED, capacity_factor=capacity_factor
            )
            given = {'sparse_momentum': inner_state[0].trace, 'rigl_accumulated': state.method_state.get('accumulated_gradient')}
            scores = None if name in ('set', 'dsr') else _scores(given.get(name, grads), layout, granularity)
            made = plan(values, layout, scores, t, state.rng_key)
            assert sj.compact.fits(made, layout)
            jax.tree.map(np.testing.assert_array_equal, _masks_of(made.layout), jax.tree.map(np.asarray, sj.get_masks(state)))
            np.testing.assert_array_equal(made.stats.pruned, state.stats.pruned)
            np.testing.assert_array_equal(made.stats.grown, state.stats.grown)
            np.testing.assert_array_equal(made.stats.share, state.stats.share)
            moved = sj.compact.move(values, made)
            whole = sj.compact.expand(moved, made.layout)
            expected = optax.apply_updates(params, updates)
            jax.tree.map(np.testing.assert_array_equal, whole, expected)
            updates_seen += 1
        params = optax.apply_updates(params, updates)
    assert updates_seen == 8 and int(state.stats.pruned.sum()) > 0


@functools.cache
def _dense_start(granularity, whole):
    params = _random(0, granularity, SHAPES if whole else FEW)
    tx = sj.sparsify(optax.sgd(0.1), density=0.3, update_every=2, total_steps=10, granularity=granularity, stacked=IS_STACKED)
    state = jax.jit(tx.init)(params)
    return sj.apply_masks(params, sj.get_masks(state)), state


def _start(granularity=Unstructured(), capacity_factor=1.25, whole=False):
    params, state = _dense_start(granularity, whole)
    return params, state, *sj.compact.compress(params, state, capacity_factor=capacity_factor)


@pytest.mark.parametrize('granularity', (Unstructured(), Block(4, 4), Block(4, 4, whole_kernel=True)), ids=str)
def test_compress_and_expand_are_inverse(granularity):
    params, state, values, layout = _start(granularity, whole=True)
    jax.tree.map(np.testing.assert_array_equal, sj.compact.expand(values, layout), params)
    jax.tree.map(np.testing.assert_array_equal, _masks_of(layout), jax.tree.map(np.asarray, sj.get_masks(state)))
    held = sum(x.size for x in jax.tree.leaves(values)) / sum(x.size for x in jax.tree.leaves(params))
    assert held < 0.3 * 1.25 + 0.1
    again, _ = sj.compact.compress(params, state)
    jax.tree.map(np.testing.assert_array_equal, again, values)


@pytest.mark.parametrize('granularity', (Unstructured(), Block(4, 4)), ids=str)
@pytest.mark.parametrize('method', ('set', 'sparse_momentum', 'static'))
def test_init_is_the_dense_start(granularity, method):
    rule = sj.methods.rule(method, density=0.2, update_every=2, total_steps=10, granularity=granularity, stacked=IS_STACKED)

    def make():
        keys = iter(jax.random.split(jax.random.key(3), 4))
        return jax.tree.map(lambda shape: 0.1 * jax.random.normal(next(keys), shape), SHAPES, is_leaf=is_shape)

    values, layout = sj.compact.init(make, rule)
    params = jax.jit(make)()
    state = jax.jit(sj.sparsify(optax.sgd(0.1), rule=rule).init)(params)
    expected = sj.apply_masks(params, sj.get_masks(state))
    jax.tree.map(np.testing.assert_array_equal, sj.compact.expand(values, layout), expected)
    capacity_factor = 1.25 if method == 'sparse_momentum' else 1.0
    counts = [int(np.max(np.asarray(x.pointers)[..., -1])) for x in jax.tree.leaves(layout, is_leaf=is_layout)]
    for leaf, count in zip(jax.tree.leaves(layout, is_leaf=is_layout), counts, strict=True):
        assert count <= leaf.capacity <= capacity_factor * count


def test_a_plan_without_room_moves_nothing_and_room_is_made(caplog):
    rule = sj.methods.rule('sparse_momentum', density=0.3, update_every=2, total_steps=40, stacked=IS_STACKED)
    params, _, values, layout = _start(capacity_factor=1)
    momentum = _random(1, Unstructured(), FEW)
    momentum['stack'] = 1e4 * momentum['stack']
    scores = _scores(momentum, layout, Unstructured())
    tx = optax.adam(1e-3)
    opt_state = jax.tree.map(lambda x: x + 1, tx.init(values))
    plan = sj.compact.plan(values, layout, scores, 2, jax.random.key(0), rule)
    assert not sj.compact.fits(plan, layout)
    jax.tree.map(np.testing.assert_array_equal, plan.layout, layout)
    with pytest.raises(ValueError, match=r'move: there is no room .* sj.compact.reserve'):
        sj.compact.move(values, plan)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(sj.compact.move)(values, plan), values)
    with caplog.at_level('INFO', logger='sparse_jax'):
        (values, opt_state), layout = sj.compact.reserve((values, opt_state), layout, plan)
    assert 'larger capacities, of all leaves at once: a/kernel' in caplog.text
    jax.tree.map(np.testing.assert_array_equal, sj.compact.expand(values, layout), params)
    again = sj.compact.plan(values, layout, scores, 2, jax.random.key(0), rule)
    assert sj.compact.fits(again, layout)
    jax.tree.map(np.testing.assert_array_equal, again.units, plan.units)
    before = sum(int(np.sum(m)) for m in jax.tree.leaves(_masks_of(layout)))
    assert sum(int(np.sum(m)) for m in jax.tree.leaves(_masks_of(again.layout))) == before


def test_leaves_without_scores_stay_and_growth_is_among_the_others():
    rule = sj.methods.rule('sparse_momentum', density=0.3, update_every=2, total_steps=40, stacked=IS_STACKED)
    _, _, values, layout = _start(capacity_factor=2)
    scores = _scores(_random(1, Unstructured(), FEW), layout, Unstructured()) | {'a': {'kernel': None, 'bias': None}}
    plan = sj.compact.plan(values, layout, scores, 2, jax.random.key(0), rule)
    before, after = _masks_of(layout), _masks_of(plan.layout)
    np.testing.assert_array_equal(before['a']['kernel'], after['a']['kernel'])
    assert before['stack'].sum() == after['stack'].sum() and (before['stack'] != after['stack']).any()
    assert len(plan.stats.pruned) == 3, 'of the layers that take part'


def test_random_growth_is_among_the_leaves_that_are_given_scores():
    rule = sj.methods.rule('set', density=0.3, update_every=2, total_steps=40, stacked=IS_STACKED)
    _, _, values, layout = _start()
    given = {'stack': jnp.zeros((3, 16, 12)), 'a': {'kernel': None, 'bias': None}}
    before, after = (_masks_of(x) for x in (layout, sj.compact.plan(values, layout, given, 2, jax.random.key(0), rule).layout))
    np.testing.assert_array_equal(before['a']['kernel'], after['a']['kernel'])
    assert (before['stack'] != after['stack']).any()


@pytest.mark.parametrize('granularity', (Unstructured(), Block(4, 4)), ids=str)
def test_states_move_with_their_weights(granularity):
    rule = sj.methods.rule('set', density=0.3, update_every=2, total_steps=40, granularity=granularity, stacked=IS_STACKED)
    params, state, values, layout = _start(granularity)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.MultiSteps(optax.adam(1e-3), 2))
    moments = jax.tree.map(lambda x: jnp.where(x == 0, 0, 1 / x), values)
    opt_state = optax.tree_utils.tree_set(tx.init(values), mu=moments)
    plan = sj.compact.plan(values, layout, None, 2, state.rng_key, rule)
    move = jax.jit(sj.compact.move, donate_argnums=0)
    new_values, new_state, average = move(jax.tree.map(jnp.copy, (values, opt_state, {'average': values})), plan)
    old, new = _masks_of(layout), _masks_of(plan.layout)
    kept = jax.tree.map(lambda a, b: a & b, old, new)
    whole = sj.compact.expand(new_values, plan.layout)
    jax.tree.map(lambda w, p, k: np.testing.assert_array_equal(w, np.where(k, p, 0)), whole, params, kept)
    jax.tree.map(np.testing.assert_array_equal, average['average'], new_values)
    mu = sj.compact.expand(optax.tree_utils.tree_get(new_state, 'mu'), plan.layout)
    inverse = jax.tree.map(lambda p, k: np.where(k & (np.asarray(p) != 0), 1 / np.where(np.asarray(p) == 0, 1, p), 0), params, kept)
    jax.tree.map(np.testing.assert_array_equal, mu, jax.tree.map(lambda x: x.astype(np.float32), inverse))


WRONG = [
    (dict(rule=sj.methods.rule('static', density=0.3, update_every=2, total_steps=10)), 'its masks never change'),
    (dict(rule=sj.methods.rule('gmp', density=0.3, update_every=2, total_steps=10)), 'density follows a schedule'),
    (dict(rule=sj.methods.rule('set', density=0.3, update_every=2, total_steps=10, track_exploration=True)), 'ever been active'),
    (dict(scores=None), 'give scores, the gradients of sj.compact.probes'),
    (dict(scores={'stack': jnp.zeros((3, 3))}), 'the scores of stack have shape (3, 3), its units (3, 16, 12)'),
    (dict(scores={'b': jnp.zeros((3, 3))}), "scores has the leaf 'b', which is not compact"),
    (dict(rule='rigl'), "rule='rigl': must be a sj.Rule"),
    (
        dict(rule=sj.methods.rule('set', density=0.3, update_every=2, total_steps=10, granularity='block:4x4')),
        'the units of a/kernel are single weights, those of the rule blocks of 4x4',
    ),
]


@pytest.mark.parametrize(('given', 'message'), WRONG)
def test_plan_tells_what_does_not_fit(given, message):
    _, _, values, layout = _start()
    rule = sj.methods.rule('rigl', density=0.3, update_every=2, total_steps=10)
    arguments = dict(scores=None, rule=rule) | given
    with pytest.raises(ValueError) as error:
        sj.compact.plan(values, layout, arguments['scores'], 2, jax.random.key(0), arguments['rule'])
    assert message in str(error.value)


_ROOMS = (24, 48)  # few, as each compiles a program
_PLANNED = functools.partial(
    sj.compact.plan,
    rule=sj.methods.rule(
        'sparse_momentum', density=0.5, update_every=2, total_steps=40, prune_rate=0.5, redistribute='mean_momentum'
    ),
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 48), st.integers(0, 1), st.floats(0, 3)), min_size=2, max_size=2),
    st.integers(0, 99),
)
def test_whatever_the_rooms_weights_are_counted_padded_with_zeros_and_never_lost(leaves, seed):
    """A leaf may be full, or have more padding than weights; a plan that does not fit moves nothing, and fits once there is room."""
    random = np.random.default_rng(seed)
    masks, params, scores = {}, {}, {}
    for name, (count, _, scale) in zip('ab', leaves, strict=True):
        masks[name] = np.isin(np.arange(48), random.permutation(48)[:count]).reshape(6, 8)
        params[name] = np.where(masks[name], random.standard_normal((6, 8)), 0).astype(np.float32)
        scores[name] = jnp.asarray(10**scale * random.standard_normal((6, 8)), jnp.float32)
    values, layout = sj.compact.compress(params, masks, capacity_factor=1)
    rooms = {
        name: min(room for room in _ROOMS[least:] if room >= count) for name, (count, least, _) in zip('ab', leaves, strict=True)
    }
    values, layout = with_capacities(values, layout, rooms)
    plan = _PLANNED(values, layout, scores, 2, jax.random.key(1))
    wanted = {name: int(plan.units[name]) for name in 'ab'}
    assert sum(wanted.values()) == sum(count for count, _, _ in leaves)
    fits = all(wanted[name] <= rooms[name] for name in 'ab')
    assert sj.compact.fits(plan, layout) == fits
    if not fits:
        jax.tree.map(np.testing.assert_array_equal, sj.compact.expand(values, plan.layout), params)
        values, layout = with_capacities(values, layout, dict.fromkeys('ab', 48))
        plan = _PLANNED(values, layout, scores, 2, jax.random.key(1))
        assert {name: int(plan.units[name]) for name in 'ab'} == wanted
    moved = sj.compact.move(values, plan)
    after, new_masks = sj.compact.expand(moved, plan.layout), sj.compact.masks(plan.layout)
    for name in 'ab':
        mask = np.asarray(new_masks[name])
        assert mask.sum() == wanted[name] >= 1
        assert not np.asarray(moved[name])[wanted[name] :].any()
        np.testing.assert_array_equal(after[name], np.where(mask & masks[name], params[name], 0))
