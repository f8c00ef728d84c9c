"""Sparse training of the larger networks: exact counts through mask updates, layers that are stacked, leaves that stay dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_jax as sj
from sparse_jax import config as config_lib
from sparse_jax import train
from sparse_jax.core import layers as layers_lib
from sparse_jax.report import run_report


def _config(model, **values):
    config = config_lib.Config()
    config.model.name = model
    config.data.batch_size = 2
    config.optimizer.schedule, config.optimizer.learning_rate = 'constant', 0.01
    config.train.steps, config.sparsity.update_every = 100, 2
    for name, value in values.items():
        config_lib.override(config, name.replace('__', '.'), str(value))
    return config


def _check_counts(made, state, budget):
    masks = sj.get_masks(state.opt_state)
    assert sum(sj.stats.nonzeros(masks).values()) == budget
    for mask, param in zip(jax.tree.leaves(masks), jax.tree.leaves(state.params), strict=True):
        if mask.ndim:
            assert not np.asarray(param)[~np.asarray(mask)].any()
    return {name: count for name, (count, _) in train.state.sizes(made, state).layers.items()}


@pytest.mark.parametrize(
    ('model', 'density', 'own'),
    [
        ('wrn_28_2', 0.1, {'model__dropout': 0.3}),
        pytest.param(
            'transformer',
            0.1,
            {'model__depth': 3, 'model__features': 64, 'model__heads': 4, 'optimizer__name': 'adamw'},
            marks=pytest.mark.core,
        ),
    ],
)
@pytest.mark.slow
def test_counts_are_exact_through_three_updates(model, density, own):
    config = _config(model, sparsity__density=density, **own)
    shape = (16,) if model == 'transformer' else (32, 32, 3)
    made = train.create(config, num_examples=100, input_shape=shape, num_outputs=20)
    state = jax.jit(made.init)(jax.random.key(0))
    sizes = [int(np.prod(layer.shape)) * (layer.depth or 1) for layer in made.layers]
    budget = round(density * sum(sizes))
    rng = np.random.default_rng(0)
    step = jax.jit(made.train_step)
    counts = [_check_counts(made, state, budget)]
    for t in range(1, 7):
        if model == 'transformer':
            tokens = rng.integers(0, 20, (2, 17), dtype=np.int32)
            batch = {'input': tokens[:, :-1], 'label': tokens[:, 1:]}
        else:
            batch = {'input': rng.standard_normal((2, *shape), np.float32), 'label': rng.integers(0, 20, 2)}
        state, metrics = step(state, batch)
        assert np.isfinite(float(metrics['loss']))
        counts.append(_check_counts(made, state, budget))
        assert (counts[-1] != counts[-2]) == (t % 2 == 0), 'the budget moves between layers at updates, and only then'
    stats = state.opt_state.stats if isinstance(state.opt_state, sj.SparsifyState) else None
    assert stats is not None and int(stats.grown.sum()) == int(stats.pruned.sum()) > 0
    dense = {path for path, mask in layers_lib.leaf_paths(sj.get_masks(state.opt_state)) if mask.ndim == 0}
    everything = {path for path, _ in layers_lib.leaf_paths(state.params)}
    assert dense == {path for path in everything if not path.endswith('kernel')}
    if model == 'transformer':
        assert {'embed/table', 'norm/scale', 'layers/mlp_norm/scale', 'layers/attention_norm/scale'} == dense
        rows = [counts[-1][f'layers/mlp/up/kernel[{i}]'] for i in range(3)]
        assert len(counts[-1]) == 7 * 3 and len(set(rows)) > 1, 'stacked layers have shares of their own'


def test_stacked_layers_start_at_the_density_each():
    config = _config('transformer', model__depth=4, model__features=32, model__heads=2, sparsity__density=0.25)
    made = train.create(config, num_examples=100, input_shape=(8,), num_outputs=20)
    state = jax.jit(made.init)(jax.random.key(0))
    for name, (count, size) in train.state.sizes(made, state).layers.items():
        assert count == pytest.approx(0.25 * size, abs=1), name


@pytest.mark.slow
def test_a_bfloat16_step_updates_float32_masters():
    config = _config('transformer', model__depth=2, model__features=32, model__heads=2, model__dtype='bfloat16')
    made = train.create(config, num_examples=100, input_shape=(8,), num_outputs=20)
    state = jax.jit(made.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 20, (2, 9), dtype=np.int32)
    after, _ = jax.jit(made.train_step)(state, {'input': tokens[:, :-1], 'label': tokens[:, 1:]})
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype('float32')}
    moved = np.abs(np.asarray(after.params['embed']['table'] - state.params['embed']['table'])).max()
    assert 0 < moved < 1e-2


@pytest.mark.core
@pytest.mark.slow
def test_a_language_model_trains_from_the_launchers_loop(tmp_path):
    (tmp_path / 'text').mkdir()
    for i in range(6):
        (tmp_path / 'text' / f'{i}.txt').write_text(f'{i} abc abd abe ' * 60)
    config = _config('transformer', model__depth=2, model__features=32, model__heads=2, optimizer__name='adamw', train__steps=40)
    for name, value in {
        'data.name': 'text', 'data.dir': str(tmp_path / 'text'), 'data.length': '32', 'data.validation': '0.3', 'data.batch_size': '8',
        'train.eval_every': '20', 'log.every': '10', 'sparsity.update_every': '10', 'sparsity.density': '0.2',
    }.items():  # fmt: skip
        config_lib.override(config, name, value)
    result = train.train(config, tmp_path / 'run')
    assert result['eval_loss'] == result['validation_loss'] < np.log(257) - 1
    assert result['validation_bits_per_byte'] == pytest.approx(result['eval_loss'] / np.log(2) / (900 / 901), rel=0.02)
    assert len(result['layers']) == 14 and result['nonzeros'] == round(0.2 * sum(size for _, size in result['layers'].values()))
    assert 0.2 < result['operations_inference_against_dense'] < 0.5, 'attention and the embedding are dense'
    assert train.evaluate(config, tmp_path / 'run')['eval_loss'] == pytest.approx(result['eval_loss'], rel=1e-6)
    run_report.show(tmp_path / 'run')
    assert (tmp_path / 'run' / 'report.png').exists()
