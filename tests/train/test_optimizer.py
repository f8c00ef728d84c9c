"""Schedules, optimizers, clipping, label smoothing, accumulation and averages of weights, against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_jax as sj
from configs import mnist_lenet300
from sparse_jax import config as config_lib
from sparse_jax import train
from sparse_jax.train import optimizer
from sparse_jax.train import step as step_lib


def _config(**values):
    config = mnist_lenet300.get_config('offline')
    for name, value in values.items():
        section, field = name.split('__')
        setattr(getattr(config, section), field, value)
    return config


def _create(**values):
    return train.create(_config(**values), num_examples=4000, input_shape=(28, 28, 1), num_outputs=10)


BATCH = {'input': np.random.default_rng(0).normal(size=(20, 28, 28, 1)).astype(np.float32), 'label': np.arange(20) % 10}


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(['step', 'cosine', 'constant']),
    warmup=st.integers(0, 20),
    peak=st.floats(0.001, 2),
    every=st.integers(1, 30),
    final=st.floats(0, 1),
    t=st.integers(0, 100),
)
def test_schedules_equal_numpy(kind, warmup, peak, every, final, t):
    total = 100
    made = config_lib.Optimizer(
        schedule=kind, warmup_steps=warmup, learning_rate=peak, decay_every=every, decay_factor=0.5, final_factor=final
    )
    if t < warmup:
        expected = peak * (t + 1) / (warmup + 1)
    else:
        after = t - warmup
        factor = {
            'step': 0.5 ** (after // every),
            'cosine': final + (1 - final) * 0.5 * (1 + math.cos(math.pi * after / (total - warmup))),
            'constant': 1.0,
        }[kind]
        expected = peak * factor
    assert float(optimizer.schedule(made, total)(t)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_original_schedule_has_no_warm_up_and_zero_never_decays():
    made = config_lib.Optimizer(decay_every=10)
    assert [round(float(optimizer.schedule(made, 100)(t)), 6) for t in (0, 9, 10, 20)] == [0.1, 0.1, 0.01, 0.001]
    assert float(optimizer.schedule(config_lib.Optimizer(decay_every=0), 100)(99)) == pytest.approx(0.1)


def test_decays_at_listed_steps_count_from_the_start_of_the_training():
    made = config_lib.Optimizer(decay_at='20,50', warmup_steps=10, decay_every=3)
    rate = optimizer.schedule(made, 100)
    assert [round(float(rate(t)), 6) for t in (10, 19, 20, 49, 50, 99)] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    for wrong in ('50,20', '20,', 'a', '5', '20,20'):
        with pytest.raises(
            ValueError, match='config.optimizer.decay_at=.* must be steps in rising order.* after the 10 of the warm-up'
        ):
            optimizer.schedule(config_lib.Optimizer(decay_at=wrong, warmup_steps=10), 100)


def test_wrong_names_and_a_warm_up_longer_than_the_training():
    for values, message in (
        (dict(optimizer__name='adam'), "optimizer.name='adam' does not exist. Did you mean 'adamw'"),
        (dict(optimizer__schedule='cosin'), "optimizer.schedule='cosin' does not exist. Did you mean 'cosine'"),
        (dict(optimizer__warmup_steps=5000), 'optimizer.warmup_steps=5000 is more than the 4000 steps'),
        (dict(train__accumulate=3), 'config.train.accumulate=3 must divide data.batch_size=100'),
        (dict(model__depth=3), 'config.model.depth=3 is not a setting of lenet300'),
        (dict(model__dropout=0.5), 'config.model.dropout=0.5 is not a setting of lenet300'),
        (dict(model__name='transformer'), 'config.model.depth=0: give the transformer at least 1'),
    ):
        with pytest.raises(ValueError, match=message.replace('.', r'\.')):
            _create(**values)


def test_adamw_equals_numpy_and_decays_matrices_only():
    made = config_lib.Optimizer(name='adamw', beta1=0.8, beta2=0.9, weight_decay=0.1)
    tx = optimizer.create(made, optax.constant_schedule(0.01))
    params = {'fc': {'kernel': jnp.array([[1.0, -2.0]]), 'bias': jnp.array([3.0])}, 'norm': {'scale': jnp.array([[4.0]])}}
    state, rng = tx.init(params), np.random.default_rng(0)
    expected = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    mean, square = (jax.tree.map(np.zeros_like, expected) for _ in range(2))
    for t in range(1, 4):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape), expected)
        updates, state = tx.update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, mean, grads)
        square = jax.tree.map(lambda s, g: 0.9 * s + 0.1 * g * g, square, grads)
        decay = {'fc': {'kernel': 0.1, 'bias': 0.0}, 'norm': {'scale': 0.0}}
        move = lambda p, m, s, d, t=t: p - 0.01 * (m / (1 - 0.8**t) / (np.sqrt(s / (1 - 0.9**t)) + 1e-8) + d * p)
        expected = jax.tree.map(move, expected, mean, square, decay)
    for got, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_clipping_measures_existing_weights_and_scales_all():
    grads = {'w': jnp.array([3.0, 4.0, 100.0]), 'b': jnp.array([12.0])}
    masks = {'w': jnp.array([True, True, False]), 'b': jnp.array(True)}
    got = optimizer.scaled(grads, optimizer.clip_factor(grads, masks, 6.5))  # the norm is 13
    np.testing.assert_allclose(got['w'], [1.5, 2, 50])
    np.testing.assert_allclose(got['b'], [6])
    for same in (optimizer.scaled(grads, optimizer.clip_factor(grads, *options)) for options in ((masks, 13.1), (None, 200.0))):
        np.testing.assert_array_equal(same['w'], grads['w'])
    zeros = jax.tree.map(jnp.zeros_like, grads)
    zero = optimizer.scaled(zeros, optimizer.clip_factor(zeros, masks, 1.0))
    assert not np.isnan(zero['w']).any()


def test_label_smoothing_equals_numpy():
    logits = np.random.default_rng(0).normal(size=(4, 3, 7))
    labels = np.random.default_rng(1).integers(0, 7, (4, 3))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = 0.9 * np.eye(7)[labels] + 0.1 / 7
    np.testing.assert_allclose(step_lib.cross_entropy(jnp.float32(logits), labels, 0.1), -(target * logp).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(
        step_lib.cross_entropy(jnp.float32(logits), labels, 0.0), -(np.eye(7)[labels] * logp).sum(-1), rtol=1e-5
    )
    plain, smooth = (_create(train__label_smoothing=v, sparsity__method='dense') for v in (0.0, 0.2))
    state = plain.init(jax.random.key(0))
    losses = [float(jax.jit(e.train_step)(state, BATCH)[1]['loss']) for e in (plain, smooth)]
    assert losses[0] != losses[1]
    for e in (plain, smooth):  # evaluation is of the plain loss
        assert float(e.evaluate(state, BATCH)['loss']) / 20 == pytest.approx(losses[0], rel=1e-5)


def test_accumulation_is_the_whole_batch():
    whole, parts = (_create(train__accumulate=n, sparsity__method='dense') for n in (1, 5))
    state = whole.init(jax.random.key(0))
    (a, metrics), (b, of_parts) = (jax.jit(e.train_step)(state, BATCH) for e in (whole, parts))
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for key in metrics:
        assert float(metrics[key]) == pytest.approx(float(of_parts[key]), rel=1e-5)
    assert int(b.step) == 1


@pytest.mark.slow
def test_accumulation_carries_running_statistics_and_draws_its_own_dropout():
    """Batch normalisation sees one part after the other, as separate batches do."""
    values = dict(model__name='alexnet_s', sparsity__method='dense', data__batch_size=8)
    shape = dict(num_examples=80, input_shape=(32, 32, 3), num_outputs=10)
    one, two = (train.create(_config(**values, train__accumulate=n), **shape) for n in (1, 2))
    state = jax.jit(one.init)(jax.random.key(0))
    batch = {'input': jax.random.normal(jax.random.key(1), (8, 32, 32, 3)), 'label': jnp.arange(8)}
    got = jax.jit(two.train_step)(state, batch)[0].model_state['norm1']['mean']
    halves = [state]
    for i in range(2):  # the parameters stay those of the beginning
        part = jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch)
        halves.append(halves[-1]._replace(model_state=jax.jit(one.train_step)(halves[-1], part)[0].model_state))
    np.testing.assert_allclose(got, halves[-1].model_state['norm1']['mean'], rtol=1e-5)


def test_average_of_weights_is_masked_at_evaluation():
    made = _create(train__average_decay=0.9, sparsity__update_every=2, data__batch_size=20)
    state = made.init(jax.random.key(0))
    step = jax.jit(made.train_step)
    average = jax.tree.map(lambda p: np.asarray(p, np.float64), state.params)
    for t in range(1, 6):
        state, _ = step(state, BATCH)
        decay = min(0.9, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p, np.float64), average, state.params)
    for got, expected in zip(jax.tree.leaves(state.average[0]), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    masks = sj.get_masks(state.opt_state)
    outside = state.average[0]['fc1']['kernel'][~masks['fc1']['kernel']]
    assert (outside != 0).any(), 'masks moved, so the average itself is not sparse'
    masked = state._replace(params=sj.apply_masks(state.average[0], masks))
    plain = _create(sparsity__update_every=2, data__batch_size=20)
    assert float(made.evaluate(state, BATCH)['loss']) == pytest.approx(float(plain.evaluate(masked, BATCH)['loss']), rel=1e-6)
    assert float(made.evaluate(state, BATCH)['loss']) != float(plain.evaluate(state, BATCH)['loss'])


@pytest.mark.slow
def test_running_statistics_are_averaged_with_the_weights():
    values = dict(model__name='alexnet_s', sparsity__method='dense', data__batch_size=8, train__average_decay=0.9)
    made = train.create(_config(**values), num_examples=80, input_shape=(32, 32, 3), num_outputs=10)
    state = jax.jit(made.init)(jax.random.key(0))
    batch = {'input': jax.random.normal(jax.random.key(1), (8, 32, 32, 3)), 'label': jnp.arange(8)}
    step = jax.jit(made.train_step)
    mean = np.asarray(state.model_state['norm1']['mean'], np.float64)
    for t in (1, 2):
        state, _ = step(state, batch)
        decay = (1 + t) / (10 + t)
        mean = decay * mean + (1 - decay) * np.asarray(state.model_state['norm1']['mean'])
    np.testing.assert_allclose(state.average[1]['norm1']['mean'], mean, rtol=1e-5)
    live = train.create(
        _config(**{**values, 'train__average_decay': 0.0}), num_examples=80, input_shape=(32, 32, 3), num_outputs=10
    )
    averaged = state._replace(params=state.average[0], model_state=state.average[1], average=None)
    assert float(jax.jit(made.evaluate)(state, batch)['loss']) == pytest.approx(
        float(jax.jit(live.evaluate)(averaged, batch)['loss'])
    )


@pytest.mark.slow
def test_an_average_goes_on_after_a_restart(tmp_path):
    """The same bits with and without a checkpoint in the middle."""
    from sparse_jax.runtime import checkpoint

    made = _create(train__average_decay=0.9, sparsity__update_every=2, data__batch_size=20)
    step = jax.jit(made.train_step)
    state = step(made.init(jax.random.key(0)), BATCH)[0]
    saved = checkpoint.Checkpoints(tmp_path / 'checkpoints')
    saved.save(1, state, 0.0)
    saved.close()
    again = checkpoint.Checkpoints(tmp_path / 'checkpoints')
    restored, _ = again.restore(1, jax.eval_shape(made.init, jax.random.key(0)))
    again.close()
    for a, b in zip(jax.tree.leaves(step(state, BATCH)[0]), jax.tree.leaves(step(restored, BATCH)[0]), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
