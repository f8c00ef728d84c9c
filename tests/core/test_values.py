"""Methods whose weights enter with a value, come and go by phases, or outgrow their density: each against its rule in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj

pytestmark = pytest.mark.core

SHAPES = {'a': (6, 8), 'b': (3, 3, 2, 4), 'bias': (8,)}
SPARSE = ('a', 'b')


def _draw(rng, scale=1.0):
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def _largest(values, count, where=None):
    """A mask of the largest magnitudes; of equal ones those of the lowest index."""
    flat = np.abs(np.asarray(values)).ravel()
    order = np.lexsort((np.arange(flat.size), -flat))
    order = order if where is None else [i for i in order if where.ravel()[i]]
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(np.shape(values))


def _run(tx, params, steps, rng):
    """Yields what a step was given and what came of it."""
    state = tx.init(params)
    params, step = sj.apply_masks(params, sj.get_masks(state)), jax.jit(tx.update)
    for t in range(1, steps + 1):
        grads = _draw(rng)
        updates, new = step(grads, state, params)
        after = optax.apply_updates(params, updates)
        sj.check_sparse(after, new)
        yield t, grads, params, state, after, new
        params, state = after, new


@pytest.mark.parametrize('seed', range(2))
def test_truncation_keeps_the_largest_after_each_step(seed):
    """SGD with momentum by hand, all of it dense, and the largest of p + u in each matrix after each step."""
    rng, total, rate, decay = np.random.default_rng(seed), 12, 0.1, 0.9
    params = _draw(rng)
    tx = sj.methods.truncation(optax.sgd(rate, decay), 0.1, total, anneal=0.5)
    p = {name: leaf.copy() for name, leaf in params.items()}
    trace = {name: np.zeros_like(leaf) for name, leaf in p.items()}
    for t, grads, _, _, after, state in _run(tx, params, total - 1, rng):
        density = 1 + (0.1 - 1) * min(t / 6, 1)
        total_count = sum(int(np.asarray(state.masks[name]).sum()) for name in SPARSE)
        assert total_count == round(density * (48 + 72))
        for name in p:
            trace[name] = grads[name] + np.float32(decay) * trace[name]
            q = p[name] - np.float32(rate) * trace[name]
            if name in SPARSE:
                keep = _largest(q, int(state.masks[name].sum()))
                np.testing.assert_array_equal(state.masks[name], keep)
                q = np.where(keep, q, 0)
            np.testing.assert_allclose(after[name], q, rtol=1e-5, atol=1e-6)
            p[name] = np.asarray(after[name])
    assert total_count == round(0.1 * 120)


@pytest.mark.parametrize('options', [dict(anneal=1.0), dict(anneal=0.9, update_every=7), dict(stop_step=5)])
def test_truncation_arrives_at_its_density(options):
    rng = np.random.default_rng(0)
    *_, new = list(_run(sj.methods.truncation(optax.sgd(0.1), 0.1, 20, **options), _draw(rng), 20, rng))[-1]
    assert sum(int(new.masks[name].sum()) for name in SPARSE) == 12


def test_a_backward_density_of_none_is_twice_the_density():
    make = lambda **options: sj.methods.create('top_kast', optax.sgd(0.1), 0.2, 3, 9, **options).init(
        _draw(np.random.default_rng(0))
    )
    for state in (make(), make(backward_density=None)):
        assert sj.stats.density(state.method_state['backward']) == pytest.approx(0.4, abs=0.01)


def test_truncation_on_demand_of_biases_and_embeddings():
    params = {'embed': jnp.ones((8, 4)), 'fc': {'kernel': jnp.ones((4, 6)), 'bias': jnp.ones(6)}, 'norm': {'scale': jnp.ones(4)}}
    chosen = lambda **options: sj.layer_names(sj.methods.truncation(optax.adamw(0.1), 0.5, 10, **options).init(params))
    assert chosen() == ['fc/kernel']
    assert chosen(biases=True) == ['fc/bias', 'fc/kernel', 'norm/scale']
    assert chosen(embeddings=True) == ['embed', 'fc/kernel']
    with pytest.raises(ValueError, match='leave out biases='):
        chosen(biases=True, sparsifiable=lambda path, leaf: True)


@pytest.mark.parametrize('seed', range(2))
def test_top_kast_uses_the_largest_and_trains_a_wider_set(seed):
    rng, rate, decay, every = np.random.default_rng(seed), 0.1, 0.9, 3
    params = _draw(rng)
    tx = sj.methods.top_kast(optax.sgd(rate, decay), 0.25, every, 100, backward_density=0.5)
    theta = {name: leaf.copy() for name, leaf in params.items()}
    trace = {name: np.zeros_like(leaf) for name, leaf in theta.items()}
    sizes = {'a': (12, 24), 'b': (18, 36)}
    forward = {name: _largest(theta[name], k) for name, (k, _) in sizes.items()}
    backward = {name: _largest(theta[name], k) for name, (_, k) in sizes.items()}
    for t, grads, before, state, after, new in _run(tx, params, 10, rng):
        for name in SPARSE:
            np.testing.assert_array_equal(state.masks[name], forward[name])
            np.testing.assert_array_equal(state.method_state['backward'][name], backward[name])
            np.testing.assert_allclose(before[name], np.where(forward[name], theta[name], 0), rtol=1e-5, atol=1e-6)
        for name in theta:
            wider = backward.get(name, True)
            trace[name] = np.where(wider, grads[name], 0) + np.float32(decay) * trace[name]
            theta[name] = theta[name] - np.where(wider, np.float32(rate) * trace[name], 0)
        if t % every == 0:
            forward = {name: _largest(theta[name], k) for name, (k, _) in sizes.items()}
            backward = {name: _largest(theta[name], k) for name, (_, k) in sizes.items()}
        for name in SPARSE:
            np.testing.assert_array_equal(new.masks[name], forward[name])
            stored = np.where(forward[name], 0, theta[name])
            np.testing.assert_allclose(new.method_state['stored'][name], stored, rtol=1e-5, atol=1e-6)
            theta[name] = np.where(forward[name], after[name], new.method_state['stored'][name])  # no drift by rounding
        np.testing.assert_allclose(after['bias'], theta['bias'], rtol=1e-5, atol=1e-6)
    assert (forward['a'] != _largest(params['a'], 12)).any(), 'no weight has moved: the test shows nothing'


def test_top_kast_chooses_its_own_masks():
    state = sj.methods.top_kast(optax.sgd(0.1), 0.25, 3, 100).init(_draw(np.random.default_rng(0)))
    with pytest.raises(ValueError, match='keeps the values of all weights'):
        sj.set_masks(state, sj.get_masks(state))


def test_ac_dc_is_dense_before_its_last_sparse_phase():
    rng = np.random.default_rng(0)
    params = _draw(rng)
    for total, phases in ((13, 'DSDSS'), (16, 'DSDSDS'), (4, 'DS')):
        tx = sj.methods.ac_dc(optax.sgd(0.1), 0.2, 3, total)
        rows = list(_run(tx, params, total, rng))
        counts = [sum(int(new.masks[name].sum()) for name in SPARSE) for *_, new in rows]
        expected = [120 if phases[min(t // 3, len(phases) - 1)] == 'D' else 24 for t in range(1, total + 1)]
        assert counts == expected, total
        for t, grads, before, _, _, new in rows:
            for name in SPARSE if t % 3 == 0 and counts[t - 1] == 24 and counts[t - 2] == 120 else ():
                q = before[name] - np.float32(0.1) * grads[name]
                np.testing.assert_array_equal(new.masks[name], _largest(q, int(new.masks[name].sum())))


def test_ac_dc_needs_a_second_phase():
    with pytest.raises(ValueError, match='leaves no mask update'):
        sj.methods.ac_dc(optax.sgd(0.1), 0.2, 10, 10)


def test_mest_prunes_at_the_next_update_what_it_has_grown():
    """By |w| + 0.5 |g|; between updates there is more than the density, by a cosine to nothing at the last."""
    rng, every, total, extra = np.random.default_rng(3), 4, 30, 0.5
    params = _draw(rng)
    tx = sj.methods.mest(optax.sgd(0.1), 0.25, every, total, extra=extra, distribution='uniform')
    last = 28
    part = lambda t: extra * (1 + np.cos(np.pi * min(t / last, 1))) / 2 if t < last else 0.0
    counts = lambda masks: {name: int(np.asarray(masks[name]).sum()) for name in SPARSE}
    for t, grads, before, state, _, new in _run(tx, params, total, rng):
        assert sum(counts(new.masks).values()) == round(0.25 * (1 + part(t - t % every)) * 120)
        if t % every:
            continue
        for i, name in enumerate(SPARSE):
            q = before[name] - np.float32(0.1) * grads[name]
            score = np.abs(q) + 0.5 * np.abs(grads[name])
            stays = counts(state.masks)[name] - int(new.stats.pruned[i])
            kept = _largest(score, stays, np.asarray(state.masks[name]))
            assert (np.asarray(new.masks[name]) >= kept).all(), 'one of the most important is pruned'
            assert int(new.masks[name].sum()) == stays + int(new.stats.grown[i])
    assert sum(counts(new.masks).values()) == 30


@pytest.mark.parametrize(
    ('match', 'make'),
    [
        ('backward_density=0.1', lambda: sj.methods.top_kast(optax.sgd(0.1), 0.2, 3, 9, backward_density=0.1)),
        ('does not go with', lambda: sj.methods.top_kast(optax.sgd(0.1), 0.5, 3, 9, granularity='n_of_m:2:4')),
        ("needs enters_with='value'", lambda: sj.sparsify(optax.sgd(0.1), density=0.1, update_every=2, total_steps=9, backward_density=0.5)),
        ('needs redistribute=None', lambda: sj.sparsify(optax.sgd(0.1), density=0.1, update_every=2, total_steps=9, enters_with='value')),
        ("enters_with='all'", lambda: sj.sparsify(optax.sgd(0.1), density=0.1, update_every=2, total_steps=9, enters_with='all')),
        ('extra=0', lambda: sj.methods.mest(optax.sgd(0.1), 0.2, 3, 9, extra=0)),
        ('leaves no mask update', lambda: sj.methods.mest(optax.sgd(0.1), 0.2, 10, 10)),
        ('anneal=1.5', lambda: sj.methods.truncation(optax.sgd(0.1), 0.2, 9, anneal=1.5)),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(match, make):
    with pytest.raises(ValueError, match=match):
        make()
