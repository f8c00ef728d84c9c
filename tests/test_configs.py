"""Every config loads, describes an experiment that can be made, and says true things in its docstring."""

import importlib
import pathlib
import re

import jax
import pytest

from configs import cifar10
from sparse_jax import config as config_lib
from sparse_jax import data, models, train
from sparse_jax.report import published

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('__init__', 'cifar10'))
SHAPES = {'mnist': (28, 28, 1), 'mnist_offline': (28, 28, 1), 'text': (1024,), 'stdlib': (128,)}
TOKENS = {'text': 50_258, 'stdlib': 257}  # GPT-2's, and bytes
TRAINING = {
    'mnist': 54_000,
    'cifar10': 45_000,
    'mnist_offline': 4000,
    'digits32': 4000,
    'text': 10**6,
    'stdlib': 90_000,
    'folder': 1000,
}


def _module(name):
    return importlib.import_module(f'configs.{name}')


def _variants(name):
    return ('', *_module(name).VARIANTS)


def _sizes(config):
    shape, tokens = SHAPES.get(config.data.name, (32, 32, 3)), TOKENS.get(config.data.name, 10)
    if config.model.name == 'resnet50':
        shape, tokens = (config.data.size, config.data.size, 3), 1000
    experiment = train.create(config, num_examples=TRAINING[config.data.name], input_shape=shape, num_outputs=tokens)
    return experiment, jax.eval_shape(experiment.init, jax.random.key(0))


@pytest.mark.parametrize('name', FILES)
def test_a_config_and_its_docstring(name):
    module = _module(name)
    for variant in _variants(name):
        config = module.get_config(variant)
        config_lib.validate(config)
        assert config.data.name in data.NAMES and config.model.name in models.names()
        # the largest are traced once: their variants differ in data and steps
        if variant in ('', 'small', 'dense') or config.model.name.startswith('lenet'):
            experiment, state = _sizes(config)
            assert experiment.total_steps == (config.train.steps or config.train.epochs * experiment.steps_per_epoch)
        if variant == '':
            parameters = f'{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,}'
            assert parameters in module.__doc__ or not re.search(r'\d parameters', module.__doc__), parameters
            assert f'{config.sparsity.density:.0%}' in module.__doc__
    assert set(module.VARIANTS) == set(re.findall(rf'configs/{name}\.py:(\w+)', module.__doc__)), 'a docstring names the variants'
    with pytest.raises(ValueError, match="the variant 'nonsense' does not exist"):
        module.get_config('nonsense')
    for command in re.findall(r'python launch.py (.*)', module.__doc__):
        for flag in re.findall(r'--config\.([\w.]+)=', command):
            assert flag in config_lib.flatten(config_lib.Config())
    assert re.search('Cost', module.__doc__), 'a docstring tells the cost'


@pytest.mark.parametrize('name', [name for name in FILES if name.startswith('cifar10_')])
def test_the_cifar_rows_are_the_originals(name):
    config = _module(name).get_config()
    model = name.removeprefix('cifar10_')
    assert config.model.name == model and config.data.name == 'cifar10'
    assert (config.data.batch_size, config.train.epochs, config.data.validation) == (128, 250, 0.1)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.momentum, optimizer.nesterov) == ('sgd', 0.1, 0.9, True)
    assert (optimizer.schedule, optimizer.decay_every, optimizer.decay_factor, optimizer.weight_decay) == (
        'step',
        30_000,
        0.1,
        5e-4,
    )
    numbers = published.find(model, 'cifar10', 'sparse_momentum', config.sparsity.density)
    assert numbers, 'a row has a published number'
    for number in numbers:  # the docstring and the report's table agree; papers give errors or accuracies
        text = _module(name).__doc__
        assert f'{number.accuracy:.2f}' in text or f'{100 - number.accuracy:.2f}' in text, number


def test_every_row_of_the_paper_has_a_config():
    rows = {f'cifar10_{name}' for name in models.names() if name not in ('lenet300', 'lenet5', 'resnet50', 'transformer')}
    assert rows == {name for name in FILES if name.startswith('cifar10')} and len(rows) == 9
    assert cifar10.__doc__


def test_the_small_dense_network_has_the_weights_of_the_sparse_one():
    sizes = {}
    for variant in ('', 'small'):
        _, state = _sizes(_module('lm_tiny').get_config(variant))
        total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        sparse = sum(
            leaf.shape[0] * leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(state.params['layers']) if leaf.ndim == 3
        )
        sizes[variant] = total - sparse + round(0.1 * sparse) if variant == '' else total
    assert sizes['small'] == pytest.approx(sizes[''], rel=0.01)
