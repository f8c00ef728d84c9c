"""Attention on each platform, and the Transformer as a GPU's program has it, against the plain definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax import kernels, models
from sparse_jax.models import attention, transformer


def _definition(query, key, value):
    scores = np.einsum('bqhd,bkhd->bhqk', query, key) / np.sqrt(query.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum('bhqk,bkhd->bqhd', weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.core
@pytest.mark.parametrize('name', ('xla', 'recomputed'))
def test_attention_equals_its_definition(name):
    run = attention._IMPLEMENTATIONS[name]
    operands = [np.random.default_rng(i).normal(size=(2, 9, 3, 4)).astype(np.float32) for i in range(3)]
    np.testing.assert_allclose(run(*operands), _definition(*(x.astype(np.float64) for x in operands)), rtol=1e-5, atol=1e-6)
    loss = lambda run, *x: (run(*x) ** 2).sum()
    plain = jax.grad(functools.partial(loss, attention._IMPLEMENTATIONS['xla']), argnums=(0, 1, 2))(*operands)
    for ours, expected in zip(jax.grad(functools.partial(loss, run), argnums=(0, 1, 2))(*operands), plain, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_recomputed_attention_keeps_no_scores():
    x = jnp.ones((1, 64, 2, 8), jnp.bfloat16)
    _, vjp = jax.vjp(attention._IMPLEMENTATIONS['recomputed'], x, x, x)
    assert max(leaf.size for leaf in jax.tree.leaves(vjp)) <= x.size


def test_what_takes_attention_is_said_with_its_reason():
    assert attention.choose((2, 64, 2, 8), jnp.float32) == ('xla', '')
    with kernels.lowering_for('gpu'):
        choice = attention.choose((2, 64, 2, 8), jnp.float32)
        assert choice.implementation == 'recomputed' and 'they take bfloat16 or float16, not float32' in choice.reason
        choice = attention.choose((2, 64, 2, 8), jnp.bfloat16)
        assert choice.implementation == 'recomputed' and 'cudnn: ' in choice.reason and 'tokamax: ' in choice.reason


def _network(**options):
    settings = dict(depth=3, features=32, heads=4, hidden=48) | options
    model = models.create('transformer', input_shape=(12,), num_outputs=17, **settings)
    tokens = np.random.default_rng(0).integers(0, 17, (4, 12))
    return model, *model.init(jax.random.key(0)), tokens, np.roll(tokens, -1, 1)


def _gradients(model, params, state, tokens, labels, **options):
    """A step's loss and gradients, as the training takes them."""

    def measure(logits, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0], logits.argmax(-1) == labels

    def loss(params):
        (losses, correct), _ = model.apply(params, state, tokens, train=True, measure=measure, labels=labels, **options)
        return losses.mean(), correct

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def _assert_close(tree, expected):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=2e-4, atol=2e-6)


@pytest.mark.core
@pytest.mark.parametrize('remat', transformer.REMAT)
@pytest.mark.parametrize('most', (0, 12))
def test_layers_one_after_the_other_and_in_a_loop_are_one_network(remat, most, monkeypatch):
    model, *rest = _network(remat=remat)
    expected = _gradients(_network()[0], *rest)
    monkeypatch.setattr(transformer, '_UNROLLED', dict.fromkeys(transformer.REMAT, most))
    with kernels.lowering_for('gpu', interpret=True):
        _assert_close(_gradients(model, *rest), expected)


@pytest.mark.parametrize('tied', (True, False))
def test_logits_in_parts_give_the_whole_loss(tied, monkeypatch):
    model, *rest = _network(tied=tied)
    expected = _gradients(model, *rest)
    monkeypatch.setattr(transformer, 'MOST_LOGITS', 4 * 17 * 3)  # of 4 x 12 x 17
    _assert_close(_gradients(model, *rest), expected)
    text = jax.jit(functools.partial(_gradients, model)).lower(*rest).as_text()
    assert 'tensor<4x3x17xf32>' in text and 'tensor<4x12x17xf32>' not in text


def test_an_unknown_remat_is_told():
    with pytest.raises(ValueError, match="model.remat='everything' does not exist"):
        _network(remat='everything')
