"""Training steps lowered for platforms that are not here, by the launcher."""

import pathlib

import jax
import pytest

from configs import mnist_lenet300
from sparse_jax.aot import compile_only
from sparse_jax.train import run as run_lib
from tests import launcher
from tests.aot.lowered import compact_steps, steps

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('name', steps)
@pytest.mark.parametrize('platform', ('cuda', 'tpu'))
@pytest.mark.slow
def test_every_sparse_layer_of_the_step_is_on_the_platforms_kernels(name, platform, monkeypatch):
    monkeypatch.setattr(compile_only, 'unavailable', lambda platform: 'of the test')  # to lower takes seconds, to compile a minute
    lowered = steps[name](platform)
    backend = {'cuda': 'gpu', 'tpu': 'tpu'}[platform]
    assert set(lowered.layers.values()) == {(backend, '')}
    on_gpu = platform == 'cuda'  # where the two layers of the Transformer stand one after the other
    layers = {'transformer on four devices': 14 if on_gpu else 7, 'vgg on two devices': 14 if on_gpu else 12}[name]
    assert lowered.kernels == dict.fromkeys(('forward', 'input_gradient', 'weight_gradient'), layers)
    assert ('mosaic_gpu' if on_gpu else '@tpu_custom_call') in lowered.text
    assert lowered.memory is None and lowered.collectives is None and lowered.why_not_compiled == 'of the test'
    assert lowered.state_bytes > 10**6 and jax.default_backend() == 'cpu'


@pytest.mark.parametrize(('platform', 'takes'), [('cuda', 'gpu'), ('tpu', 'reference')])
@pytest.mark.slow
def test_compact_storage_is_on_the_gpus_kernels_and_elsewhere_says_why_not(platform, takes, monkeypatch):
    monkeypatch.setattr(compile_only, 'unavailable', lambda platform: 'of the test')
    lowered = compact_steps['compact transformer on two devices'](platform)
    [(implementation, reason)] = set(lowered.layers.values())
    assert implementation == takes and (reason == '' or 'no kernel for compact weights' in reason)
    counted = dict.fromkeys(('forward', 'input_gradient', 'weight_gradient'), 14) if platform == 'cuda' else {}
    assert lowered.kernels == counted


def _launch(*arguments):
    return launcher.launch('--config=configs/lm_tiny.py', *arguments)


def test_the_launcher_prints_tables_and_makes_nothing(tmp_path):
    own = ('--config.model.dtype=bfloat16', '--config.model.depth=1', '--config.sparsity.granularity=block:64x64')
    done = _launch('--mode=train', '--lower_only=cuda', f'--workdir={tmp_path}/x', *own)
    assert done.returncode == 0, done.stderr
    for words in ('layers/mlp/up/kernel', 'gpu', 'weight_gradient', 'training state'):
        assert words in done.stdout
    assert 'collectives' in done.stdout and not (tmp_path / 'x').exists()


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('--lower_only=rocm',), "--lower_only='rocm': must be cuda or tpu."),
        (('--lower_only=cuda', '--mode=evaluate'), '--lower_only has no meaning with --mode=evaluate'),
        (
            ('--lower_only=cuda', '--config.sparsity.kernels=tpu'),
            "config.sparsity.kernels='tpu' does not run here: it runs on a TPU",
        ),
        (('--lower_only=cuda', '--config.sparsity.kernels=gpu'), 'got float32: set config.model.dtype=bfloat16'),
    ],
)
def test_wrong_flags_are_told_in_one_line(arguments, message):
    done = _launch(*arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_what_cannot_be_compiled_for_says_what_is_missing(monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
    assert compile_only.unavailable('gpu') == 'JAX_PLATFORMS must be cpu'
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setattr(compile_only.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='nothing can be compiled for a GPU here: there is no CUDA plugin for jax: pip install'):
        compile_only.devices('gpu')
    with pytest.raises(ValueError, match='there is no libtpu: pip install'):
        compile_only.devices('tpu')


def test_no_data_is_needed_where_its_name_tells_its_shapes(tmp_path):
    config = mnist_lenet300.get_config()
    config.data.dir = str(tmp_path / 'nothing')
    experiment = run_lib.experiment_of_shapes(config)
    assert experiment.example.shape == (1, 28, 28, 1) and experiment.steps_per_epoch == 540
    config.data.name = 'npz'
    with pytest.raises(ValueError, match='is not there'):
        run_lib.experiment_of_shapes(config)
