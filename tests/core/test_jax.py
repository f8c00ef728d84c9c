"""sparsify wherever jax goes: explicit axes, strict modes, no jit, ensembles, casts, files, other tools for trees."""

import contextlib
import io

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import sparse_jax as sj

pytestmark = pytest.mark.core

TIMES = dict(update_every=2, total_steps=20)
METHODS = ('sparse_momentum', 'set', 'rigl', 'snfs', 'dsr', 'static', 'gmp', 'granet')
PARAMS = {
    'a': jax.random.normal(jax.random.key(0), (8, 8)),
    'b': jax.random.normal(jax.random.key(1), (8, 16)),
    'bias': jnp.ones(8),
}


def _make(method, inner=None, **options):
    # powers of two: their products are exact, so that no contraction of operations tells
    return sj.methods.create(method, optax.sgd(0.125, 0.5) if inner is None else inner, 0.25, **TIMES, **options)


def _train(tx, params=PARAMS, steps=2, jit=True, state=None):
    state = tx.init(params) if state is None else state
    params, update = sj.apply_masks(params, sj.get_masks(state)), jax.jit(tx.update) if jit else tx.update
    for t in range(steps):
        grads = jax.tree.map(lambda p, t=t: jax.random.normal(jax.random.fold_in(jax.random.key(2), t), p.shape, p.dtype), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    sj.check_sparse(params, state)
    return params, state


def _assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- explicit axes of a mesh


def _placed(num_devices):
    mesh = jax.make_mesh((num_devices,), ('x',), devices=jax.devices()[:num_devices])  # its axes are Explicit
    specs = {'a': P('x', None), 'b': P(None, 'x'), 'bias': P()}
    return mesh, {name: jax.device_put(PARAMS[name], jax.NamedSharding(mesh, spec)) for name, spec in specs.items()}


INNER = {
    'sgd': lambda: optax.sgd(0.1),
    'adam': lambda: optax.adam(0.1),
    'adafactor': lambda: optax.adafactor(0.1),
    'lion': lambda: optax.lion(0.1),
}
CASES = [
    pytest.param(1, 'sparse_momentum', 'sgd', marks=pytest.mark.slow),
    pytest.param(4, 'sparse_momentum', 'sgd', marks=pytest.mark.slow),
    pytest.param(1, 'sparse_momentum', 'adam', marks=pytest.mark.slow),
    *(pytest.param(4, method, 'sgd', marks=pytest.mark.slow) for method in ('rigl', 'dsr')),
    *(pytest.param(4, 'sparse_momentum', inner, marks=pytest.mark.slow) for inner in ('adam', 'adafactor', 'lion')),
]


@pytest.mark.parametrize(('num_devices', 'method', 'inner'), CASES)
def test_a_state_straight_from_init_lies_like_its_weights(num_devices, method, inner):
    mesh, params = _placed(num_devices)
    with jax.set_mesh(mesh) if num_devices > 1 else contextlib.nullcontext():  # its axes are explicit in any case
        compilations = {}
        for name, tx in (('plain', INNER[inner]()), ('sparse', _make(method, INNER[inner](), track_exploration=True))):
            state, new = tx.init(params), params
            if name == 'sparse':
                new = sj.apply_masks(params, state.masks)
                for tree in (state.masks, state.grown, *state.method_state.values()):
                    for path in 'ab':
                        assert tree[path].sharding.is_equivalent_to(params[path].sharding, 2), path
            step = jax.jit(lambda params, state, tx=tx: tx.update(params, state, params))
            for _ in range(3):  # past a mask update
                updates, state = step(new, state)
                new = optax.apply_updates(new, updates)
            compilations[name] = step._cache_size()
        sj.check_sparse(new, state)
        assert compilations['sparse'] <= compilations['plain']


@pytest.mark.parametrize('num_devices', [1, 4])
@pytest.mark.parametrize('method', METHODS)
def test_a_step_returns_the_types_of_a_new_state(method, num_devices):
    _, params = _placed(num_devices)
    tx = _make(method)
    state = tx.init(params)
    for tree in (state.masks, state.grown, *state.method_state.values()):
        assert all(tree[path].sharding.is_equivalent_to(params[path].sharding, 2) for path in 'ab')
    after = jax.jit(tx.update).trace(params, state, params).out_info[1]
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(
        lambda x: jax.core.ShapedArray(x.shape, x.dtype, sharding=x.sharding), after
    )


def test_shardings_of_a_state_by_optax():
    mesh = jax.make_mesh((4,), ('x',), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    specs = {'a': P('x', None), 'b': P(None, 'x'), 'bias': P('x')}
    tx = _make('sparse_momentum', optax.adam(0.1), track_exploration=True)
    # the masks of dense leaves are scalars: they take no spec
    placed = optax.tree_map_params(
        tx,
        lambda leaf, spec: spec if leaf.ndim else P(),
        jax.eval_shape(tx.init, PARAMS),
        specs,
        transform_non_params=lambda _: P(),
    )
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), placed, is_leaf=lambda x: isinstance(x, P))
    state = jax.jit(tx.init, out_shardings=shardings)(PARAMS)
    for tree in (state.masks, state.grown, state.inner_state[0].mu, state.method_state['ever_active']):
        assert tree['a'].sharding.spec == P('x', None) and tree['b'].sharding.spec == P(None, 'x')
    assert state.masks['bias'].sharding.spec == P() and state.inner_state[0].mu['bias'].sharding.spec == P('x')


# --- modes of jax

MODES = {
    'ranks': lambda: jax.numpy_rank_promotion('raise'),
    'dtypes': lambda: jax.numpy_dtype_promotion('strict'),
    'leaks': jax.checking_leaks,
    'random keys': lambda: jax.legacy_prng_key('error'),
}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('method', [METHODS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[1:])])
def test_strict_modes(mode, method):
    with MODES[mode]():
        tx = _make(method)
        state = tx.init(PARAMS)
        updates, after = jax.jit(tx.update).trace(PARAMS, state, sj.apply_masks(PARAMS, state.masks)).out_info
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(updates) == types(PARAMS) and types(after) == types(state)


@pytest.mark.slow
def test_a_run_under_debug_nans():
    with jax.debug_nans(True):
        params, _ = _train(_make('sparse_momentum'))
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_without_jit(method):
    with jax.disable_jit():
        got = _train(_make(method), jit=False)
    expected = _train(_make(method))
    _assert_equal((got[0], got[1].masks, got[1].grown), (expected[0], expected[1].masks, expected[1].grown))


def test_steps_copy_nothing_between_host_and_device():
    tx = _make('sparse_momentum')
    state = tx.init(PARAMS)
    params, update = sj.apply_masks(PARAMS, state.masks), jax.jit(tx.update)
    update(PARAMS, state, params)
    with jax.transfer_guard('disallow'):
        for _ in range(2):
            _, state = update(PARAMS, state, params)
    assert int(state.count) == 2


def test_budgets_of_large_networks_are_exact_under_a_float32_schedule():
    budgets = sj.schedules.budgets(optax.linear_schedule(1.0, 0.1, 1000), 10**9, sj.Timing(100, 1001), every=100)
    assert budgets[-1] == 100_000_000 and budgets[4] == 550_000_000


# --- an ensemble


def _ensemble():
    make = lambda seed: _make('sparse_momentum', seed=seed)
    members = 3
    params = jax.tree.map(lambda p: jnp.stack([p] * members), PARAMS)
    states = jax.jit(jax.vmap(lambda key, params: make(key).init(params)))(jax.random.split(jax.random.key(7), members), params)
    # one count for all: a batched one would make the condition around a mask update a select, and every step an update
    states = states._replace(count=jnp.int32(0))
    axes = jax.tree.map(lambda _: 0, states)._replace(count=None)
    step = jax.jit(jax.vmap(make(0).update, in_axes=(0, axes, 0), out_axes=(0, axes)))
    return make, members, params, states, step


def test_an_ensemble_keeps_the_condition_and_draws_masks_of_its_own():
    _, members, params, states, step = _ensemble()
    assert ' cond[' in str(step.trace(params, states, params).jaxpr)
    assert not (states.masks['a'][0] == states.masks['a'][1]).all(), 'members share their first masks'
    assert states.masks['a'].sum((1, 2)).tolist() == [16] * members
    with pytest.raises(ValueError, match=r'Those of an ensemble: jax.vmap\(sj.apply_masks\)'):
        sj.apply_masks(params, states.masks)


@pytest.mark.slow
def test_members_of_an_ensemble_move_as_each_would_alone():
    make, members, params, states, step = _ensemble()
    new, after = jax.vmap(sj.apply_masks)(params, states.masks), states
    for _ in range(2):
        updates, after = step(params, after, new)
        new = optax.apply_updates(new, updates)
    member = lambda tree: jax.tree.map(lambda x: x if x.ndim == 0 else x[1], tree)
    own, state, update = sj.apply_masks(member(params), member(states).masks), member(states), jax.jit(make(0).update)
    for _ in range(2):
        updates, state = update(member(params), state, own)
        own = optax.apply_updates(own, updates)
    _assert_equal(state.masks, member(after.masks))
    assert after.masks['a'].sum((1, 2)).tolist() != [16] * members and after.grown['a'].any()
    assert all(sum(m[i].sum() for m in (after.masks['a'], after.masks['b'])) == 48 for i in range(members))


# --- what adam's state survives


@pytest.fixture(scope='module')
def trained():
    tx = _make('sparse_momentum', optax.sgd(0.1), track_exploration=True)
    params, state = _train(tx)
    update = jax.jit(tx.update)
    return tx, update, params, state, update(PARAMS, state, params)


def test_flax_serialization_and_numpys_files(trained):
    tx, update, params, state, expected = trained
    back = flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state))
    _assert_equal(update(PARAMS, back, params), expected)
    leaves, treedef = jax.tree.flatten(state)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as loaded:
        back = jax.tree.unflatten(treedef, [loaded[name] for name in loaded.files])
    _assert_equal(update(PARAMS, back, params), expected)


def test_casts_of_floating_leaves_and_norms(trained):
    tx, _, params, state, _ = trained
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    _, after = jax.eval_shape(tx.update, PARAMS, cast, params)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, cast)
    optax.tree.norm(state)
    assert np.isfinite(float(optax.tree.norm(state.inner_state)))


def test_count_is_found_by_the_state_it_is_of():
    tx = sj.sparsify(optax.adam(0.1), density=0.25, **TIMES)
    state = optax.chain(optax.clip(1.0), tx).init(PARAMS)
    with pytest.raises(KeyError, match='multiple values'):  # Adam has one too
        optax.tree.get(state, 'count')
    assert optax.tree.get(state, 'count', filtering=lambda path, _: getattr(path[-1], 'tuple_name', '') == 'SparsifyState') == 0


# --- leaves that are no arrays of real numbers


def test_complex_leaves_are_refused_where_they_would_be_sparse_and_trained_where_not():
    params = {'w': PARAMS['a'], 'complex': jnp.full((4, 4), 1 + 2j)}
    with pytest.raises(ValueError, match=r"sparsifiable chose the leaf 'complex' of dtype complex64; a sparse leaf is of real"):
        sj.sparsify(optax.sgd(0.1), density=0.5, sparsifiable=lambda path, leaf: True, **TIMES).init(params)
    tx = sj.sparsify(optax.sgd(0.1), density=0.5, **TIMES)
    state = tx.init(params)
    assert sj.layer_names(state) == ['w']
    updates, _ = tx.update({'w': params['w'], 'complex': jnp.full((4, 4), 1j)}, state, params)
    np.testing.assert_allclose(updates['complex'], -0.1j)


def test_python_numbers_train_and_functions_are_named():
    tx = sj.sparsify(optax.adam(0.1), density=0.5, **TIMES)
    params = {'w': PARAMS['a'], 'temperature': 1.0}
    updates, state = tx.update({'w': params['w'], 'temperature': 0.5}, tx.init(params), params)
    assert float(updates['temperature']) == pytest.approx(-0.1, rel=1e-3) and sj.layer_names(state) == ['w']
    with pytest.raises(ValueError, match=r"params: the leaf 'activation' is .*custom_jvp.*, not an array"):
        tx.init({'w': PARAMS['a'], 'activation': jax.nn.relu})


# --- states of other transformations


def test_a_state_of_another_method_or_optimizer_is_refused_when_tracing():
    state = _make('sparse_momentum', optax.adam(0.1)).init(PARAMS)
    others = {
        r'its method_state lacks ever_active': _make('rigl', optax.adam(0.1), track_exploration=True),
        r'its method_state lacks gradient_average': _make('snfs', optax.adam(0.1), momentum='gradient_average'),
        r'its inner_state is .*ScaleByAdamState.*but init of this one makes .*TraceState': _make('sparse_momentum'),
        r'stats have the shape \(2,\), but there are 9 layers \(see stacked=\)': _make(
            'sparse_momentum', optax.adam(0.1), stacked=lambda path, leaf: path == 'a'
        ),
    }
    for message, tx in others.items():
        with pytest.raises(ValueError, match='state is of another .*' + message):
            jax.jit(tx.update).trace(PARAMS, state, PARAMS)
    exploring = _make('rigl', track_exploration=True).init(PARAMS)
    with pytest.raises(ValueError, match='its method_state has ever_active'):
        _make('rigl').update(PARAMS, exploring, PARAMS)


@pytest.mark.parametrize('granularity', ['unstructured', 'block:4x4'])
def test_another_density_is_told_where_the_state_is_concrete(granularity):
    tx = sj.sparsify(optax.adam(0.1), density=0.25, granularity=granularity, **TIMES)
    state = tx.init(PARAMS)
    params = sj.apply_masks(PARAMS, state.masks)
    sj.check_sparse(params, state, density=0.25)
    with pytest.raises(ValueError, match='density=0.5 keeps .* units, but the masks of this state have'):
        sj.check_sparse(params, state, density=0.5)


def test_gradients_of_other_shapes_are_refused():
    tx = _make('sparse_momentum')
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r'grads: a has the shape \(3, 8, 8\), but the param has \(8, 8\)'):
        tx.update({**PARAMS, 'a': jnp.ones((3, 8, 8))}, state, PARAMS)
    with pytest.raises(ValueError, match='grads has the tree'):
        tx.update({'a': PARAMS['a']}, state, PARAMS)
