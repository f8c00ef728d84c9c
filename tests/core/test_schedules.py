"""Prune rates against float64, and as the default of an update."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_jax as sj

pytestmark = pytest.mark.core


def test_cosine_equals_the_originals():
    steps = np.arange(0, 1201, 7)
    got = jax.vmap(sj.schedules.cosine(0.5, 1000))(steps)
    expected = [0.005 + (0.5 - 0.005) / 2 * (1 + math.cos(math.pi * min(t, 1000) / 1000)) for t in steps]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_linear_and_constant():
    assert [float(sj.schedules.linear(0.5, 100)(t)) for t in (0, 50, 100, 200)] == [0.5, 0.25, 0.0, 0.0]
    assert float(sj.schedules.constant(0.25)(10**6)) == 0.25


@pytest.mark.parametrize('t', [10, 500, 990])
def test_the_default_prune_rate_of_an_update_is_the_cosine(t):
    tx = sj.sparsify(optax.sgd(0.1), density=0.4, update_every=10, total_steps=1000, redistribute=None)
    params = {'w': jax.random.normal(jax.random.key(0), (50, 50))}
    state = tx.init(params)
    _, state = jax.jit(tx.update)(params, state._replace(count=jnp.int32(t - 1)), sj.apply_masks(params, state.masks))
    rate = 0.005 + 0.495 / 2 * (1 + math.cos(math.pi * t / 1000))
    assert int(state.stats.pruned[0]) == math.ceil(rate * 1000)
