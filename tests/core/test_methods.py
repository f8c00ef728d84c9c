"""One contract for every method: exact budgets, exact zeros, whole blocks, one compilation, any optimizer, checkpoints."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj
from sparse_jax.runtime import checkpoint

pytestmark = pytest.mark.core

OPTIMIZERS = {
    'sgd': lambda: optax.sgd(0.05, 0.9),
    'adam': lambda: optax.adam(0.01),
    'adamw': lambda: optax.adamw(0.01, weight_decay=0.1),
    'lion': lambda: optax.lion(0.01),
    'muon': lambda: optax.contrib.muon(0.01),
}
ENDS_AT_THE_DENSITY = ('gmp', 'granet', 'mest', 'ac_dc', 'truncation')
EVERY, TOTAL, DENSITY = 3, 13, 0.3
STRUCTURES = {'n_of_m:2:4': 0.5, 'fan_in': DENSITY}
SCHEDULED = ('gmp', 'granet', 'mest', 'ac_dc', 'truncation')


def _params(granularity='unstructured'):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        'conv': jax.random.normal(keys[0], (2, 2, 4, 8)),
        'blocks': jax.random.normal(keys[1], (2, 12 if granularity == 'n_of_m:2:4' else 10, 8)),  # 10 is no multiple of 4
        'bias': jax.random.normal(keys[2], (8,)),
    }


@functools.cache
def _create(method, optimizer, granularity):
    tx = sj.methods.create(
        method,
        OPTIMIZERS[optimizer](),
        STRUCTURES.get(granularity, DENSITY),
        EVERY,
        TOTAL,
        granularity=granularity,
        track_exploration=True,
    )

    def step(params, state, t):
        grads = jax.tree.map(lambda p: 0.1 * p + jax.random.normal(jax.random.fold_in(jax.random.key(1), t), p.shape), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # Compiled without optimization: 56 programs that run for milliseconds.
    return tx, jax.jit(step, compiler_options={'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True})


def _units(granularity, masks) -> int:
    """Units that exist, counted by numpy; fails if one is not whole."""
    total = 0
    for name in ('conv', 'blocks'):
        mask = np.asarray(masks[name])
        if granularity == 'n_of_m:2:4':
            groups = mask.reshape(*mask.shape[:-2], -1, 4, mask.shape[-1]).sum(-2)
            assert (groups == 2).all(), 'a group has not 2 of 4'
        if granularity == 'fan_in':
            assert len(set(mask.reshape(-1, mask.shape[-1]).sum(0).tolist()) - {0}) == 1, 'outputs have different numbers of inputs'
        if not granularity.startswith('block'):
            total += int(mask.sum())
            continue
        for index in np.ndindex(mask.shape[:-2]):
            for i in range(0, mask.shape[-2], 4):
                for j in range(0, mask.shape[-1], 4):
                    block = mask[index][i : i + 4, j : j + 4]
                    assert block.all() or not block.any(), 'a block is not whole'
                    total += bool(block.any())
    return total


SIZES = {'unstructured': 2 * 2 * 4 * 8 + 2 * 10 * 8, 'block:4x4': 2 * 2 * 1 * 2 + 2 * 3 * 2}


def _goes_with(method: str, granularity: str) -> bool:
    if method == 'srigl':
        return granularity == 'fan_in'
    if granularity in STRUCTURES:  # a schedule of the density, one threshold over all layers, a wider set
        return method not in (*SCHEDULED, 'dsr', 'top_kast')
    return True


def _contracts():
    """Every method with every optimizer and granularity: quick tests are all of sparse momentum, and two of each other method."""
    every = [*((name, 'unstructured') for name in OPTIMIZERS), ('sgd', 'block:4x4'), ('adam', 'block:4x4')]
    every += [('sgd', structure) for structure in STRUCTURES]
    quick = lambda method, of: method in ('sparse_momentum', 'srigl') or of in (('adam', 'unstructured'), ('sgd', 'block:4x4'))
    return [
        pytest.param(method, *of, marks=() if quick(method, of) else pytest.mark.slow)
        for method, of in itertools.product(sj.methods.NAMES, every)
        if _goes_with(method, of[1])
    ]


@pytest.mark.parametrize(('method', 'optimizer', 'granularity'), _contracts())
def test_contract(method, optimizer, granularity):
    tx, step = _create(method, optimizer, granularity)
    params = _params(granularity)
    state = tx.init(params)
    params = sj.apply_masks(params, state.masks)
    density = sj.methods.parts(method, STRUCTURES.get(granularity, DENSITY), EVERY, TOTAL, granularity=granularity)['density']
    size = SIZES.get(granularity) or sum(mask.size for mask in state.masks.values() if mask.ndim)
    expected = round((float(density(0)) if callable(density) else density) * size)
    slack = 8 * 2 if granularity == 'fan_in' else 0  # a layer has whole inputs for its 8 outputs
    assert abs(_units(granularity, state.masks) - expected) <= slack
    first, ever = state.masks, state.masks
    for t in range(1, TOTAL + 1):
        before = state.masks
        params, state = step(params, state, t)
        sj.check_sparse(params, state)
        if t % EVERY == 0 and t < TOTAL and callable(density):
            expected = round(float(density(t)) * size)
        assert abs(_units(granularity, state.masks) - expected) <= slack, f'step {t}'
        changed = any((state.masks[name] != before[name]).any() for name in ('conv', 'blocks'))
        assert not changed or (t % EVERY == 0 and t < TOTAL)
        ever = jax.tree.map(jnp.logical_or, ever, state.masks)
    assert step._cache_size() == 1
    assert (method == 'static') == all((state.masks[name] == first[name]).all() for name in ('conv', 'blocks'))
    if method in ENDS_AT_THE_DENSITY:
        assert expected == round(DENSITY * size), 'the schedule does not end at the density'
    explored = sum(int(ever[name].sum()) for name in ('conv', 'blocks')) / sum(ever[name].size for name in ('conv', 'blocks'))
    assert sj.stats.exploration_rate(state) == pytest.approx(explored, rel=1e-12)


@pytest.mark.parametrize(
    'method', [m if m in ('sparse_momentum', 'top_kast') else pytest.param(m, marks=pytest.mark.slow) for m in sj.methods.NAMES]
)
def test_a_checkpoint_goes_on_with_the_same_bits(method, tmp_path):
    tx, step = _create(method, 'adam', 'fan_in' if method == 'srigl' else 'block:4x4')
    params = _params()
    state = tx.init(params)
    params = sj.apply_masks(params, state.masks)
    for t in range(1, 5):
        params, state = step(params, state, t)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(4, (params, state), 1.0)
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    (params_again, state_again), _ = checkpoints.restore(4, jax.eval_shape(lambda: (params, state)))
    checkpoints.close()
    for t in range(5, 10):
        params, state = step(params, state, t)
        params_again, state_again = step(params_again, state_again, t)
    jax.tree.map(np.testing.assert_array_equal, (params, state.masks), (params_again, state_again.masks))


@pytest.mark.parametrize('method', ['rigl', 'sparse_momentum'])  # SET prunes negative weights however large
def test_one_that_grows_finds_the_right_support_of_a_quadratic(method):
    """Sum of (w - target)^2 with a target of 8 nonzeros in 64: a network of 16 weights can be right everywhere."""
    target = np.zeros((8, 8), np.float32)
    target.flat[[3, 9, 17, 22, 38, 41, 55, 60]] = [2.0, -1.5, 1.0, 3.0, -2.5, 1.2, -1.0, 2.2]
    tx = sj.methods.create(method, optax.sgd(0.2), 0.25, 1, 201)
    params = {'w': jnp.zeros((8, 8))}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update({'w': params['w'] - target}, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(200):
        params, state = step(params, state)
    assert np.asarray(state.masks['w'])[target != 0].all()
    np.testing.assert_allclose(params['w'], target, atol=1e-2)


def test_accumulated_gradients_are_the_sum_of_the_last_steps():
    tx = sj.methods.rigl(optax.sgd(0.0), 0.25, 4, 41, accumulate_steps=3, prune_rate=lambda t: 0.5)
    params = {'w': jnp.ones((4, 4))}
    state = tx.init(params)
    params = sj.apply_masks(params, state.masks)
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(8, 4, 4)).astype(np.float32)
    step = jax.jit(tx.update)
    for t in range(1, 9):
        before = np.asarray(state.masks['w'])
        _, state = step({'w': jnp.asarray(grads[t - 1])}, state, params)
        if t % 4 == 0:
            total = grads[t - 3 : t].sum(0)
            np.testing.assert_allclose(state.method_state['accumulated_gradient']['w'], total, rtol=1e-5)
            kept = before & np.asarray(state.masks['w'])
            new = np.asarray(state.masks['w']) & ~before
            missing = ~np.asarray(state.masks['w'])
            assert kept.sum() + new.sum() == 4
            if new.any():
                assert np.abs(total[new]).min() >= np.abs(total[missing & ~before]).max(initial=0)


def test_rows_may_be_changed_and_names_are_checked():
    parts = sj.methods.parts('rigl', 0.1, 10, 100, distribution='uniform', prune_rate=0.1)
    assert parts['distribution'] == 'uniform' and parts['prune_rate'] == 0.1 and parts['stop_step'] == 75
    with pytest.raises(ValueError, match="method='rigel' does not exist. Did you mean 'rigl'"):
        sj.methods.parts('rigel', 0.1, 10, 100)


def test_gmp_moves_all_layers_from_dense_to_the_distributions_counts_together():
    tx = sj.methods.gmp(optax.sgd(0.1), 0.2, 2, 21, distribution='erk')
    params = {'a': jax.random.normal(jax.random.key(0), (40, 30)), 'b': jax.random.normal(jax.random.key(1), (10, 10))}
    state = tx.init(params)
    final = sj.distributions.erdos_renyi_kernel(
        [sj.distributions.Layer('a', (40, 30), 1200), sj.distributions.Layer('b', (10, 10), 100)], 0.2
    )
    step = jax.jit(tx.update)
    parts = []
    for _ in range(20):
        _, state = step(jax.tree.map(jnp.zeros_like, params), state, params)
        counts = [int(state.masks[name].sum()) for name in 'ab']
        parts.append([(n - f) / (size - f) for n, f, size in zip(counts, final, (1200, 100), strict=True)])
    assert [int(state.masks[name].sum()) for name in 'ab'] == final
    assert max(abs(a - b) for a, b in parts) < 0.03


def test_global_pruning_takes_the_smallest_over_all_layers():
    """DSR against a brute force: exactly the smallest weights of all layers together go, but never a layer's last one."""
    rng = np.random.default_rng(0)
    params = {'a': rng.normal(size=(20, 10)), 'b': 0.01 * rng.normal(size=(10, 5)), 'c': rng.normal(size=(8, 8))}
    params = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    tx = sj.methods.dsr(optax.sgd(0.0, 0.9), 0.4, 1, 10, prune_rate=lambda t: 0.4)
    state = tx.init(params)
    params = sj.apply_masks(params, state.masks)
    old = {name: np.asarray(mask) for name, mask in state.masks.items()}
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    amount = sum(int(np.ceil(np.float32(0.4) * np.float32(m.sum()))) for m in old.values())
    everyone = sorted((abs(float(np.asarray(params[n]).flat[i])), n, i) for n in old for i in np.flatnonzero(old[n]))
    pruned = dict.fromkeys(old, 0)
    left = amount
    for _, name, _ in everyone:
        if left and pruned[name] < old[name].sum() - 1:
            pruned[name] += 1
            left -= 1
    assert state.stats.pruned.tolist() == [pruned[n] for n in sorted(old)]
    survivors = {n: int(old[n].sum()) - pruned[n] for n in old}
    exact = [amount * survivors[n] / sum(survivors.values()) for n in sorted(old)]
    room = [old[n].size - survivors[n] for n in sorted(old)]
    assert all(g == r or abs(g - e) <= 2 for g, e, r in zip(state.stats.grown.tolist(), exact, room, strict=True))
    assert sum(state.stats.grown.tolist()) == amount


def test_set_prunes_both_signs_by_their_own_smallest():
    rng = np.random.default_rng(1)
    w = np.concatenate([rng.uniform(0.1, 1, 30), -rng.uniform(5, 9, 10)]).astype(np.float32)
    rng.shuffle(w)
    info = sj.criteria.LeafInfo(jnp.asarray(w), jnp.ones(40, bool), None, None, None, jnp.int32(12))
    scores = np.asarray(jax.jit(sj.criteria.signed_magnitude)(info))
    chosen = np.argsort(scores, kind='stable')[:12]
    positive, negative = np.sort(w[w > 0]), np.sort(-w[w < 0])
    assert sorted(w[chosen]) == pytest.approx(sorted([*positive[:9], *-negative[:3]]))


def test_a_rising_density_is_shared_out_and_exact():
    density = lambda t: 0.1 + 0.02 * (t // 2)
    tx = sj.sparsify(optax.sgd(0.1, 0.9), density=density, update_every=2, total_steps=21, prune_rate=0.3)
    params = _params()
    state = tx.init(params)
    step = jax.jit(tx.update)
    sizes = {'conv': 128, 'blocks': 160}
    for t in range(1, 21):
        grads = jax.tree.map(lambda p, t=t: jax.random.normal(jax.random.key(t), p.shape), params)
        _, state = step(grads, state, params)
        expected = round(density(t // 2 * 2) * 288)
        assert sum(int(state.masks[name].sum()) for name in sizes) == expected


@pytest.mark.parametrize(
    'window', [dict(update_every=10, total_steps=10), dict(stop_step=1), dict(start_step=8), dict(start_step=20)]
)
@pytest.mark.parametrize('method', ('gmp', 'granet'))
def test_a_density_that_could_never_fall_is_refused(method, window):
    arguments = {'update_every': 2, 'total_steps': 10, **window}
    with pytest.raises(ValueError, match='leaves no mask update after start_step'):
        sj.methods.create(method, optax.sgd(0.1), 0.25, **arguments)


def test_gradual_pruning_ends_at_any_distribution_also_one_by_patterns():
    params = {'a': jax.random.normal(jax.random.key(0), (40, 30)), 'b': jax.random.normal(jax.random.key(1), (10, 10))}
    for distribution in ({'b': 0.5}, 'uniform'):
        tx = sj.sparsify(optax.sgd(0.1), density=sj.schedules.cubic(1.0, 0.25, 0, 8), grow=None, update_every=2, total_steps=10,
                         distribution=distribution)  # fmt: skip
        state = tx.init(params)
        step = jax.jit(tx.update)
        for _ in range(9):
            _, state = step(params, state, params)
        counts = [int(state.masks[name].sum()) for name in 'ab']
        assert sum(counts) == 325 and counts[1] == (50 if distribution != 'uniform' else 25)


def test_no_average_is_kept_that_nothing_reads():
    for name in ('static', 'set', 'dsr', 'rigl', 'gmp', 'granet'):
        assert sj.methods.create(name, optax.sgd(0.1), 0.25, 2, 20).init({'w': jnp.ones((8, 8))}).method_state == {}
    assert 'gradient_average' in sj.methods.snfs(optax.sgd(0.1), 0.25, 2, 20).init({'w': jnp.ones((8, 8))}).method_state
