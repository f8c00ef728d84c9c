"""Networks of the user's, by the name of their class."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_jax as sj
from configs import mnist_lenet300
from sparse_jax import data, models, train
from sparse_jax.core import layers as layers_lib
from sparse_jax.models import own
from sparse_jax.runtime import checkpoint
from sparse_jax.train.evaluate import restored
from tests import own_parts


def _create(name='Net', shape=(12, 12, 3), outputs=4, **options):
    return models.create(f'tests.own_parts:{name}', input_shape=shape, num_outputs=outputs, **options)


@pytest.mark.parametrize('name', ['Net', 'Dense'])
def test_a_class_is_pure_functions(name):
    model = _create(name, width=8)
    params, state = model.init(jax.random.key(0))
    again, _ = model.init(jax.random.key(0))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, again)), strict=True))
    assert json.loads(json.dumps(jax.tree.map(jnp.shape, params)))  # names are text, as checkpoints need them
    x = jax.random.normal(jax.random.key(1), (5, 12, 12, 3))
    logits, same = model.apply(params, state, x, train=False)
    assert logits.shape == (5, 4) and all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, same)), strict=True))
    runs = [model.apply(params, state, x, train=True, rng=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert not np.array_equal(runs[0][0], runs[2][0])  # dropout follows the key
    assert not all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, runs[0][1])), strict=True)
    )  # running statistics


def test_patterns_reach_the_layers():
    model = _create()
    params, state = model.init(jax.random.key(0))
    masks = jax.tree.map(lambda x: np.random.default_rng(x.size).random(x.shape) < 0.3 if x.ndim > 1 else np.array(True), params)
    params = sj.apply_masks(params, masks)
    x = jax.random.normal(jax.random.key(1), (3, 12, 12, 3))
    gradients = lambda patterns: jax.grad(
        lambda p: jnp.sum(model.apply(p, state, x, train=True, rng=jax.random.key(0), patterns=patterns)[0] ** 2)
    )(params)
    dense, sparse = gradients(None), gradients(sj.kernels.make_patterns(masks))
    for (path, a), b, mask in zip(layers_lib.leaf_paths(dense), jax.tree.leaves(sparse), jax.tree.leaves(masks), strict=True):
        np.testing.assert_allclose(b, np.where(mask, a, 0), rtol=1e-4, atol=1e-4 * np.abs(a).max(), err_msg=path)


def test_tokens():
    model = _create('Tokens', shape=(16,), outputs=32)
    params, state = model.init(jax.random.key(0))
    assert model.apply(params, state, jnp.zeros((2, 16), jnp.int32), train=False)[0].shape == (2, 16, 32)


def _config(**settings):
    config = mnist_lenet300.get_config('offline')
    config.mesh.data, config.data.batch_size, config.train.steps, config.sparsity.update_every = 1, 20, 8, 3
    config.checkpoint.every, config.log.every, config.sparsity.kernels = 4, 2, 'cpu'
    config.model.name = 'tests.own_parts:Net'
    for name, value in settings.items():
        section, field = name.split('__')
        setattr(getattr(config, section), field, value)
    return config


@pytest.mark.parametrize('name', ['Net', 'Dense'])
def test_a_run_of_it_resumes_with_equal_bits(tmp_path, name):
    config = _config(model__name=f'tests.own_parts:{name}', model__options='width=12', log__callback='tests.own_parts:callback')
    own_parts.SEEN.clear()
    whole = train.train(config, tmp_path / 'whole')
    lines = [json.loads(line) for line in (tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()]
    assert [{'step': step, **values} for step, values in own_parts.SEEN] == lines and lines
    half = _config(model__name=f'tests.own_parts:{name}', model__options='width=12', train__steps=4, train__schedule_steps=8)
    train.train(half, tmp_path / 'parts')
    parts = _config(model__name=f'tests.own_parts:{name}', model__options='width=12', train__schedule_steps=8)
    assert train.train(parts, tmp_path / 'parts')['nonzeros'] == whole['nonzeros']
    prints = [checkpoint.fingerprint(restored(c, tmp_path / where)[2]) for c, where in ((config, 'whole'), (parts, 'parts'))]
    assert prints[0] == prints[1]


def test_what_does_not_fit_is_told_before_a_file_is_made(tmp_path):
    for settings, message in (
        (
            dict(model__name='tests.own_partz:Net'),
            r"cannot be imported \(ModuleNotFoundError: No module named 'tests.own_partz'\)\. Modules are looked for in",
        ),
        (dict(model__name='tests.own_parts:Nett'), "has no 'Nett'. Did you mean 'Net'"),
        (dict(model__name='tests.own_parts:load'), 'must be a class derived from flax.nnx.Module or flax.linen.Module'),
        (dict(model__name='tests.own_parts:NoRngs'), 'must take rngs'),
        (dict(model__name='tests.own_parts:Needy'), "must be told width: give config.model.options='width=...'"),
        (
            dict(model__name='tests.own_parts:SevenClasses'),
            r'gives \(2, 7\) .* must be of shape \(2, 10\): 10 is the number of classes',
        ),
        (
            dict(model__name='tests.own_parts:Fails'),
            r"fails with an example of shape \(2, 28, 28, 1\) \(KeyError: 'no such layer'; .*own_parts\.py, line \d+\)",
        ),
        (dict(model__options='widht=3'), "takes no 'widht'; it takes input_shape, num_outputs, width"),
        (dict(model__options='width'), "must be names and values, such as 'width=64,depth=3'"),
        (dict(model__depth=3), 'is not a setting of'),
        (dict(model__dtype='bfloat16', sparsity__kernels='auto'), "takes no 'dtype'"),
        (dict(model__layout='lanes'), "model.layout='lanes' is for the CIFAR networks"),
        (dict(model__name='lenet300', model__options='width=3'), "is for classes of one's own"),
        (dict(log__callback='tests.own_parts:wrong_callback'), r'must be a function \(step, values\)'),
        (dict(log__callback='print'), 'must be mypackage.module:function'),
    ):
        with pytest.raises(ValueError, match=message):
            train.train(_config(**settings), tmp_path / 'run')
        assert not (tmp_path / 'run').exists()


def test_options_are_literals_and_words():
    assert own.parse_options("width=3, name=gelu, sizes=(1, 2), flag=True, text='a b'") == {
        'width': 3, 'name': 'gelu', 'sizes': (1, 2), 'flag': True, 'text': 'a b',
    }  # fmt: skip
    assert own.parse_options('') == {}
    for text in ('__import__("os")', 'a=f()', 'a=b.c', '3', '**x', 'a=1)('):
        with pytest.raises(ValueError, match='must be names and values'):
            own.parse_options(text)
    assert data.NAMES
