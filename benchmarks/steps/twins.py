"""The networks of benchmarks/steps/train_step.py in plain jax.lax, as anyone would write them, on the same parameters as ours.

Nothing here is tuned or shared with the layers of sparse_jax.models: it is the rival `xla_seconds` and an oracle for the tests.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax import models
from sparse_jax.core import layers as layers_lib

MODELS = ('vgg_d', 'wrn_16_8', 'lenet5', 'lm_tiny')
LM: dict[str, Any] = dict(depth=4, features=192, heads=4)  # configs/lm_tiny.py
LENGTH, TOKENS = 128, 257


def create(name: str) -> models.Model:
    """Creates our model, without dropout."""
    if name == 'lm_tiny':
        return models.create('transformer', input_shape=(LENGTH,), num_outputs=TOKENS, **LM)
    options: dict[str, Any] = {'dropout': 0.0} if name.startswith('wrn') else {}
    return models.create(name, input_shape=(28, 28, 1) if name == 'lenet5' else (32, 32, 3), num_outputs=10, **options)


def batch(name: str, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws a batch of noise with labels by numpy, so that it is the same everywhere."""
    rng = np.random.default_rng((seed, 1))
    if name == 'lm_tiny':
        tokens = rng.integers(0, TOKENS, (size, LENGTH + 1), dtype=np.int32)
        return {'input': tokens[:, :-1], 'label': tokens[:, 1:]}
    shape = (28, 28, 1) if name == 'lenet5' else (32, 32, 3)
    return {'input': rng.standard_normal((size, *shape), np.float32), 'label': rng.integers(0, 10, size, dtype=np.int32)}


def parameters(name: str, seed: int = 0):
    """Draws the parameters of our model's tree by numpy, so that all twins and versions start from the same ones."""
    rng = np.random.default_rng((seed, 2))
    shapes, _ = jax.eval_shape(create(name).init, jax.random.key(0))
    leaves = []
    for path, leaf in layers_lib.leaf_paths(shapes):
        if path.endswith('scale'):
            leaves.append(np.ones(leaf.shape, np.float32))
        elif path.endswith('bias'):
            leaves.append(np.zeros(leaf.shape, np.float32))
        else:
            stacked = path.startswith('layers/')
            fan_in = np.prod(leaf.shape[stacked:-1]) if 'table' not in path else 2500
            leaves.append((rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in)).astype(np.float32))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _conv(x, p, stride=1, padding: Any = 'SAME'):
    y = lax.conv_general_dilated(x, p['kernel'], (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    return y + p['bias'] if 'bias' in p else y


def _norm(x, p):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5) * p['scale'] + p['bias']


def _pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')


def _linear(x, p):
    y = x @ p['kernel']
    return y + p['bias'] if 'bias' in p else y


def _vgg_d(p, x):
    for stage, depth in enumerate((2, 2, 3, 3, 3), 1):
        for i in range(1, depth + 1):
            x = jax.nn.relu(_norm(_conv(x, p[f'conv{stage}_{i}']), p[f'norm{stage}_{i}']))
        x = _pool(x)
    x = x.reshape(len(x), -1)
    for i in (1, 2):
        x = _norm(jax.nn.relu(_linear(x, p[f'fc{i}'])), p[f'fc_norm{i}'])
    return _linear(x, p['out'])


def _wrn_16_8(p, x):
    x = _conv(x, p['conv'])
    for stage in (1, 2, 3):
        for i in (1, 2):
            b, stride = p[f'block{stage}_{i}'], 2 if stage > 1 and i == 1 else 1
            ones = ((1, 1), (1, 1))
            y = jax.nn.relu(_norm(x, b['norm1']))
            residual = _conv(y, b['shortcut'], stride, 'VALID') if 'shortcut' in b else x
            y = jax.nn.relu(_norm(_conv(y, b['conv1'], stride, ones), b['norm2']))
            x = residual + _conv(y, b['conv2'], 1, ones)
    return _linear(jax.nn.relu(_norm(x, p['norm'])).mean((1, 2)), p['fc'])


def _lenet5(p, x):
    x = jax.nn.relu(_pool(_conv(x, p['conv1'], padding='VALID')))
    x = jax.nn.relu(_pool(_conv(x, p['conv2'], padding='VALID')))
    return _linear(jax.nn.relu(_linear(x.reshape(len(x), -1), p['fc1'])), p['fc2'])


def _rms(x, p):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p['scale']


def _rotate(x):  # [batch, heads, length, features]
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[2])[:, None] / 10_000 ** (jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


def _lm_tiny(p, tokens):
    x = p['embed']['table'][tokens]
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))
    for i in range(LM['depth']):
        q = jax.tree.map(lambda leaf, i=i: leaf[i], p['layers'])
        y, a = _rms(x, q['attention_norm']), q['attention']
        heads = lambda y, w: (y @ w['kernel']).reshape(*y.shape[:2], LM['heads'], -1).transpose(0, 2, 1, 3)
        query, key, value = _rotate(heads(y, a['query'])), _rotate(heads(y, a['key'])), heads(y, a['value'])
        scores = jnp.where(mask, query @ key.transpose(0, 1, 3, 2) / jnp.sqrt(query.shape[-1]), -jnp.inf)
        y = (jax.nn.softmax(scores) @ value).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + _linear(y, a['out'])
        y, m = _rms(x, q['mlp_norm']), q['mlp']
        x = x + _linear(jax.nn.silu(_linear(y, m['gate'])) * _linear(y, m['up']), m['down'])
    return _rms(x, p['norm']) @ p['embed']['table'].T


_FORWARD = {'vgg_d': _vgg_d, 'wrn_16_8': _wrn_16_8, 'lenet5': _lenet5, 'lm_tiny': _lm_tiny}
# A small rate: with batch normalisation over few pixels VGG-D amplifies rounding. At 0.001 its third loss (batch 16) is 1.19 in float32
# and 0.88 in float64; at this rate 0.197 and 0.189.
RATE, MOMENTUM, DECAY = 0.0001, 0.9, 5e-4


def forward_loss(name: str):
    """Returns the loss function (params, batch) -> mean cross entropy."""
    forward = _FORWARD[name]

    def loss_fn(params, batch):
        logp = jax.nn.log_softmax(forward(params, batch['input']))
        return -jnp.take_along_axis(logp, batch['label'][..., None], -1).mean()

    return loss_fn


def step(name: str):
    """Returns a training step (params, trace, batch) -> (params, trace, loss): SGD with Nesterov momentum and L2, written out."""
    loss_fn = forward_loss(name)

    def train_step(params, trace, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        grads = jax.tree.map(lambda g, p: g + DECAY * p, grads, params)
        trace = jax.tree.map(lambda g, t: g + MOMENTUM * t, grads, trace)
        params = jax.tree.map(lambda p, g, t: p - RATE * (g + MOMENTUM * t), params, grads, trace)
        return params, trace, loss

    return train_step
