"""The programs of a run's steps: those that are compiled ahead are those that are called, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mnist_lenet300
from sparse_jax import config as config_lib
from sparse_jax import kernels, train
from sparse_jax.core import masks as masks_lib
from sparse_jax.runtime import checkpoint, records, workdir
from sparse_jax.train import programs
from sparse_jax.train import run as run_lib

_LAYERS = ('fc1/kernel', 'fc2/kernel', 'fc3/kernel')
_BOTH = [programs.Kind(False, False), programs.Kind(True, True)]


def _run(tmp_path):
    config = mnist_lenet300.get_config('offline')
    config.mesh.data = config.mesh.model = 1
    config.train.steps, config.sparsity.update_every, config.sparsity.dense_gradient_window = 12, 4, 2
    return run_lib.prepare(config, tmp_path / 'run')


def _batch():
    random = np.random.default_rng(0)
    return jax.device_put({'input': random.random((100, 28, 28, 1), np.float32), 'label': random.integers(0, 10, 100, np.int32)})


def test_which_programs_a_run_will_need(tmp_path):
    experiment = _run(tmp_path).experiment
    kinds = [programs.kind_of(experiment, step) for step in range(1, 13)]
    assert kinds[3] == kinds[7] == (True, True) and kinds[2] == kinds[6] == (True, False) and kinds[0] == (False, False)
    assert programs.ahead(experiment, 0) == [kinds[0], kinds[2], kinds[3]]
    assert programs.ahead(experiment, 11) == [(False, False)]


def test_what_is_compiled_ahead_gives_the_same_bits(tmp_path):
    run = _run(tmp_path)
    begin = lambda: jax.jit(run.experiment.init)(jax.random.key(0))
    patterns = lambda: jax.device_put(
        kernels.make_patterns(
            jax.device_get(masks_lib.find_state(begin().opt_state)), implementations=dict.fromkeys(_LAYERS, 'reference')
        )
    )
    plain, ahead = (programs.Programs(run.devices, run.experiment) for _ in range(2))
    ahead.compile(_BOTH, begin(), _batch(), patterns())
    for kind in _BOTH:
        for given in (patterns(), None):  # the second ones are not what was compiled for
            expected, got = (p(kind, begin(), _batch(), given) for p in (plain, ahead))
            assert checkpoint.fingerprint(got) == checkpoint.fingerprint(expected)
    ahead.close()


def test_a_run_that_began_when_remat_was_true_or_false_goes_on(tmp_path):
    config = mnist_lenet300.get_config('offline')
    for before, now in ((False, 'none'), (True, 'all')):
        records.write(tmp_path / records.CONFIG, config_lib.identity(config) | {'model.remat': before})
        config.model.remat = now
        assert workdir.differences(config, tmp_path) == []
        config.model.remat = 'products'
        assert workdir.differences(config, tmp_path) == [f"model.remat: '{now}' there, 'products' given"]
        config.model.remat = 'none'


def test_a_device_without_memory_is_told_with_what_takes_less(tmp_path, monkeypatch):
    def exhausted(self, kind, *arguments):
        return jnp.zeros(2**46)  # as the allocator really says it

    monkeypatch.setattr(programs.Programs, '__call__', exhausted)
    config = mnist_lenet300.get_config('offline')
    config.mesh.data = config.mesh.model = 1
    config.train.steps = 4
    with pytest.raises(RuntimeError, match='no memory left') as told:
        train.train(config, tmp_path / 'run')
    said = str(told.value)
    assert '\n' not in said and 'allocating 281474976710656 bytes' in said and 'Nothing had been saved.' in said
    assert 'config.data.batch_size=50 instead of 100' in said and 'config.train.accumulate=2' in said and 'remat' not in said
