"""Rules and timings: the same method said in another way, masks moved by hand, and what a state says of its leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj

PARAMS = {
    'a': jax.random.normal(jax.random.key(0), (12, 10)),
    'b': jax.random.normal(jax.random.key(1), (10, 8)),
    'bias': jnp.zeros(8),
}
LENGTHS = dict(update_every=5, total_steps=40)


def grads(t):
    return jax.tree.map(lambda p: jnp.cos(p * (t + 1)), PARAMS)


def program(tx):
    """What init and update are, as text."""
    state = jax.eval_shape(tx.init, PARAMS)
    return str(jax.make_jaxpr(tx.init)(PARAMS)), str(jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS))


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('name', sj.methods.NAMES)
def test_a_rule_says_what_the_keywords_say(name):
    inner, options = optax.sgd(0.1, 0.9), dict(granularity='fan_in' if name == 'srigl' else 'block:2x2', seed=3)
    by_keywords = sj.methods.create(name, inner, 0.4, **LENGTHS, **options)
    by_rule = sj.sparsify(inner, rule=sj.methods.rule(name, 0.4, timing=sj.Timing(**LENGTHS), **options))
    assert program(by_keywords) == program(by_rule)


def test_a_timing_says_what_four_keywords_say():
    steps = dict(**LENGTHS, start_step=5, stop_step=20)
    tx = sj.sparsify(optax.sgd(0.1, 0.9), density=0.3, timing=sj.Timing(**steps))
    assert program(tx) == program(sj.sparsify(optax.sgd(0.1, 0.9), density=0.3, **steps))
    rule = sj.methods.rule('rigl', 0.3, timing=sj.Timing(**steps))
    assert (rule.timing.start_step, rule.timing.stop_step) == (5, 20)
    assert sj.methods.rule('rigl', 0.3, **LENGTHS).timing.stop_step == 30  # the method's own


def test_timing_against_the_definition():
    timing = sj.Timing(update_every=4, total_steps=30, start_step=6, stop_step=22)
    updates = [t for t in range(1, 31) if t > 6 and t % 4 == 0 and t < 22]
    assert [t for t in range(1, 31) if timing.is_update(t)] == updates == [8, 12, 16, 20]
    for window in (0, 1, 3, 9):
        wanted = [count for count in range(30) if any(t - window < count + 1 <= t for t in updates)]
        # the window of an update reaches back to the start, not over the update before: they overlap
        assert [count for count in range(30) if timing.needs_dense_gradient(count, window)] == wanted
    assert all(timing.needs_dense_gradient(count, None) for count in range(30))


@pytest.mark.parametrize(
    'make, message',
    (
        (lambda rule, timing: sj.sparsify(optax.sgd(0.1), rule=rule, density=0.1), 'rule= states density too'),
        (lambda rule, timing: sj.sparsify(optax.sgd(0.1), rule=rule, prune=sj.criteria.magnitude), 'rule= states prune too'),
        (lambda rule, timing: sj.sparsify(optax.sgd(0.1), rule=rule, timing=timing), 'rule= states timing too'),
        (
            lambda rule, timing: sj.sparsify(optax.sgd(0.1), density=0.1, timing=timing, start_step=3),
            'timing= states start_step too',
        ),
        (lambda rule, timing: sj.methods.rule('set', 0.1, 5, 40, timing=timing), 'states'),
        (lambda rule, timing: sj.sparsify(optax.sgd(0.1), density=0.1), 'update_every is missing: give update_every=, or rule='),
        (lambda rule, timing: sj.sparsify(optax.sgd(0.1), timing=timing), 'density is missing'),
        (lambda rule, timing: sj.Timing(0, 10), 'update_every=0: must be an integer, at least 1'),
        (lambda rule, timing: sj.Rule(density=2, timing=timing), r'density=2: must be a number in \(0, 1\]'),
        (lambda rule, timing: sj.Rule(density=0.1, timing=timing, grow='momentun'), "Did you mean 'momentum'"),
    ),
)
def test_what_is_stated_twice_or_not_at_all(make, message):
    timing = sj.Timing(**LENGTHS)
    with pytest.raises(ValueError, match=message):
        make(sj.Rule(density=0.1, timing=timing), timing)


@pytest.mark.parametrize(
    'name', ['sparse_momentum', 'gmp', *(pytest.param(m, marks=pytest.mark.slow) for m in ('set', 'rigl', 'dsr', 'granet'))]
)
def test_masks_move_by_hand_in_any_step_of_a_chain(name):
    inner = optax.adam(1e-2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), sj.methods.create(name, inner, 0.3, update_every=10, total_steps=40))
    state = tx.init(PARAMS)
    params = sj.apply_masks(PARAMS, sj.get_masks(state))
    updates, state = tx.update(grads(0), state, params)  # an ordinary step
    params = optax.apply_updates(params, updates)
    before = sj.get_masks(state)
    updates, state = jax.jit(lambda g, s, p: tx.update(g, s, p, update_masks=True))(grads(1), state, params)
    params = optax.apply_updates(params, updates)
    sj.check_sparse(params, state)
    flips = sum(int((x != y).sum()) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(sj.get_masks(state)), strict=True))
    assert flips > 0
    counted = sum(sj.stats.nonzeros(state).values())
    schedule = {'gmp': 1.0, 'granet': 0.5}.get(name, 0.3)  # where a density schedule begins; at step 2 of 30 it has fallen a little
    if name in ('gmp', 'granet'):
        rate = sj.schedules.cubic(schedule, 0.3, 0, 30)
        assert counted == round(float(rate(2)) * 200)
    else:
        assert counted == round(0.3 * 200)


def test_a_move_by_hand_at_an_update_step_is_the_update():
    tx = sj.sparse_momentum(0.1, 0.3, **LENGTHS)
    state = tx.init(PARAMS)
    params = sj.apply_masks(PARAMS, sj.get_masks(state))
    update = jax.jit(tx.update, static_argnames='update_masks')
    for t in range(4):
        updates, state = update(grads(t), state, params)
        params = optax.apply_updates(params, updates)
    assert_equal(update(grads(4), state, params), update(grads(4), state, params, update_masks=True))
    updates, kept = update(grads(4), state, params, update_masks=False)
    assert_equal(sj.get_masks(kept), sj.get_masks(state))


def test_accumulated_gradients_outside_of_their_window_are_the_steps_own():
    tx = sj.methods.rigl(optax.sgd(0.0), 0.3, 10, 40, accumulate_steps=3)
    plain = sj.methods.rigl(optax.sgd(0.0), 0.3, 10, 40)
    states = [x.init(PARAMS) for x in (tx, plain)]
    params = sj.apply_masks(PARAMS, sj.get_masks(states[0]))
    moved = [x.update(grads(1), s, params, update_masks=True)[1] for x, s in zip((tx, plain), states, strict=True)]
    assert_equal(sj.get_masks(moved[0]), sj.get_masks(moved[1]))


def test_update_masks_is_static_and_masks_that_never_move_are_told():
    tx = sj.sparse_momentum(0.1, 0.3, **LENGTHS)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match='update_masks=.*must be True, False or None'):
        jax.jit(lambda flag: tx.update(grads(0), state, PARAMS, update_masks=flag))(True)
    fixed = sj.methods.static(optax.sgd(0.1), 0.3)
    with pytest.raises(ValueError, match='update_masks=True: .* masks never change'):
        fixed.update(grads(0), fixed.init(PARAMS), PARAMS, update_masks=True)


def test_lookahead_around_that_averages_masks_is_refused():
    tx = optax.lookahead(sj.sparse_momentum(0.1, 0.3, **LENGTHS), sync_period=1, slow_step_size=0.5, reset_state=True)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    with pytest.raises(ValueError, match='the mask of a is .*, not bool: .*lookahead'):
        for t in range(3):
            updates, state = tx.update(optax.LookaheadParams(grads(t), grads(t)).fast, state, params)
            params = optax.apply_updates(params, updates)


def test_the_state_says_what_is_stacked_and_in_which_units():
    params = {'blocks': jnp.ones((3, 8, 8)), 'head': jnp.ones((8, 4)), 'norm': jnp.ones((4, 4))}
    options = dict(stacked=lambda path, leaf: path == 'blocks', granularity='block:2x4:kernel')
    state = sj.sparse_momentum(0.1, 0.5, **LENGTHS, **options).init(params)
    assert state.layers.tolist() == [[3, 2, 2, 4], [0, 2, 2, 4], [-1, 0, 0, 0]]
    assert state.layers.dtype == jnp.int32
    assert sj.layer_names(state) == ['blocks[0]', 'blocks[1]', 'blocks[2]', 'head']


@pytest.mark.parametrize('impl', ('threefry2x32', 'rbg'))
def test_states_with_a_typed_key_go_on_with_the_same_bits(impl):
    tx = sj.methods.set_(optax.sgd(0.1), 0.3, **LENGTHS, seed=jax.random.key(7, impl=impl))
    state = tx.init(PARAMS)
    assert state.rng_key.dtype == jnp.uint32
    typed = state._replace(rng_key=jax.random.wrap_key_data(state.rng_key, impl=impl))
    one, other = (tx.update(grads(0), s, PARAMS, update_masks=True)[1].masks for s in (state, typed))
    assert_equal(one, other)
