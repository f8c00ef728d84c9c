"""What works, but is not as fast as its user may think, is logged once, with what to do."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_jax as sj
from sparse_jax import kernels
from sparse_jax.core import errors
from sparse_jax.kernels.cpu import operations as cpu
from sparse_jax.launch import allocator


@pytest.fixture
def said(caplog):
    errors.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, 'sparse_jax'):
        yield lambda: [record.getMessage() for record in caplog.records]
    errors.say_once.cache_clear()


def test_a_window_as_long_as_the_interval(said):
    for count in range(60):
        sj.needs_dense_gradient(count, update_every=23, total_steps=60, window=22)
    assert not said()
    assert all(sj.needs_dense_gradient(count, update_every=20, total_steps=200, window=22) for count in range(100))
    (message,) = said()
    assert 'window=22 steps' in message and 'every 20' in message and 'Take a shorter window' in message


def test_a_sparse_leaf_without_a_kernel(said):
    masks = {'attention': jnp.ones((4, 2, 8), bool), 'fc': jnp.eye(4, dtype=bool), 'bias': jnp.array(True)}
    for _ in range(2):
        patterns = kernels.make_patterns(masks)
    assert patterns['attention'] is None and patterns['fc'] is not None
    assert said() == ['make_patterns: attention has 3 axes: it is no matrix and no 2D convolution, and stays dense (pattern None).']
    with pytest.raises(ValueError, match='A leaf whose pattern is None is dense: multiply with jnp.dot'):
        kernels.sparse_dot(jnp.ones((2, 8)), jnp.ones((8, 8)), patterns['attention'])


@pytest.mark.skipif(bool(cpu.unavailable()), reason='needs a C++ compiler: install g++ or clang++')
@pytest.mark.parametrize('told', [True, False])
def test_malloc_that_returns_memory(said, monkeypatch, told):
    monkeypatch.setenv('GLIBC_TUNABLES', 'x') if told else monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    monkeypatch.delenv('LD_PRELOAD', raising=False)
    cpu._malloc_returns_memory.cache_clear()
    pattern = kernels.make_pattern(np.eye(512, dtype=bool))
    product = lambda x: kernels.sparse_dot(x, jnp.eye(512), pattern, implementation='cpu')
    for rows in (64, 2**14, 2**14):
        jax.eval_shape(product, jax.ShapeDtypeStruct((rows, 512), jnp.float32))
    assert len(said()) == (0 if told or not cpu._malloc_returns_memory() else 1)
    assert all(f'GLIBC_TUNABLES={allocator.MALLOC}' in message for message in said())
    cpu._malloc_returns_memory.cache_clear()
