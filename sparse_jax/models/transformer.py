"""A decoder-only Transformer: pre-norm RMSNorm, rotary embeddings, causal attention, SwiGLU, its layers stacked and scanned.

References: Vaswani et al., Attention is all you need, 2017; Su et al., RoFormer, 2021; Shazeer, GLU variants improve Transformer,
2020; Touvron et al., LLaMA, 2023.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sparse_jax.core import errors, target
from sparse_jax.models import attention, layers
from sparse_jax.models.layers import Embed, Linear, Network, RMSNorm, pattern_at

# Layers at most that a GPU's program has one after the other, since each takes seconds to compile. A loop is compiled once, but copies
# what it keeps into stacks and back.
_UNROLLED = {'none': 12, 'products': 12, 'all': 24}


MOST_LOGITS = 2**27  # at once, where only what is made of them is wanted: half a GB
REMAT = ('none', 'products', 'all')


def rotary(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    r"""Rotary position embedding: turns each pair of features by an angle that grows with the position.

    Feature :math:`i` of the first half and its partner in the second half turn by :math:`p \cdot base^{-2i/d}` at position :math:`p`,
    so that products of queries and keys depend on the distance of their positions only.

    Args:
      x: [batch, length, heads, features], an even number of features.
      base: of the wave lengths.

    Returns:
      The same shape and type; computed in float32.

    Reference: Su et al., RoFormer, 2021.
    """
    length, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(length)[:, None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _kept(y: jax.Array) -> jax.Array:
    """A product's result, which remat='products' keeps for the backward pass."""
    return checkpoint_name(y, 'product')


class _Attention(nnx.Module):
    def __init__(self, features: int, heads: int, *, init_out: layers.Initializer, rngs: nnx.Rngs):
        start = layers.normal(0.02)
        for name in ('query', 'key', 'value'):
            setattr(self, name, Linear(features, features, use_bias=False, init=start, rngs=rngs))
        self.out = Linear(features, features, use_bias=False, init=init_out, rngs=rngs)
        self.heads = heads

    def __call__(self, x, patterns):
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
        query, key, value = (
            split(_kept(getattr(self, name)(x, pattern_at(patterns, name, 'kernel')))) for name in ('query', 'key', 'value')
        )
        y = _kept(attention.causal(rotary(query), rotary(key), value))
        return self.out(y.reshape(x.shape), pattern_at(patterns, 'out', 'kernel'))


class _MLP(nnx.Module):
    def __init__(self, features: int, hidden: int, *, init_out: layers.Initializer, rngs: nnx.Rngs):
        start = layers.normal(0.02)
        self.gate = Linear(features, hidden, use_bias=False, init=start, rngs=rngs)
        self.up = Linear(features, hidden, use_bias=False, init=start, rngs=rngs)
        self.down = Linear(hidden, features, use_bias=False, init=init_out, rngs=rngs)

    def __call__(self, x, patterns):
        gate = jax.nn.silu(_kept(self.gate(x, pattern_at(patterns, 'gate', 'kernel'))))
        up = _kept(self.up(x, pattern_at(patterns, 'up', 'kernel')))
        return self.down(gate * up, pattern_at(patterns, 'down', 'kernel'))


class _Layer(nnx.Module):
    def __init__(self, features, heads, hidden, depth, dropout, *, rngs: nnx.Rngs):
        init_out = layers.normal(0.02 * (2 * depth) ** -0.5)  # GPT-2's: the residual stream keeps its size at any depth
        self.attention_norm = RMSNorm(features)
        self.attention = _Attention(features, heads, init_out=init_out, rngs=rngs)
        self.mlp_norm = RMSNorm(features)
        self.mlp = _MLP(features, hidden, init_out=init_out, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x, *, train: bool, rng, patterns):
        keys = (None, None) if rng is None else jax.random.split(rng)
        y = self.attention(self.attention_norm(x), pattern_at(patterns, 'attention'))
        x = x + layers.dropout(y, self.dropout, keys[0], train=train)
        y = self.mlp(self.mlp_norm(x), pattern_at(patterns, 'mlp'))
        return x + layers.dropout(y, self.dropout, keys[1], train=train)


def _remat(layer: Callable, what: str) -> Callable:
    if what == 'none':
        return layer
    policy = jax.checkpoint_policies.save_only_these_names('product') if what == 'products' else None
    return jax.checkpoint(layer, policy=policy)


@jax.custom_vjp
def _unstack(x: jax.Array) -> list[jax.Array]:
    """The rows of a stacked array."""
    return [jnp.squeeze(part, 0) for part in jnp.split(x, len(x))]


def _unstack_backward(_, rows: list[jax.Array]) -> tuple[jax.Array]:
    # XLA would stack the rows within each kernel that reads them, and so read them for every moment of the optimizer anew.
    return (jax.lax.optimization_barrier(jnp.stack(rows)),)


_unstack.defvjp(lambda x: (_unstack(x), None), _unstack_backward)


def _unstacked(params: Any, others: Any, depth: int, dtype: Any) -> list[Any]:
    """Each layer's part of trees of stacked arrays; weights of products are cast before, all layers' at once."""

    def rows(x):
        return _unstack(x) if jnp.issubdtype(x.dtype, jnp.inexact) else [x[i] for i in range(depth)]

    cast = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 2 and jnp.issubdtype(x.dtype, jnp.inexact) else x, params)
    leaves, structure = jax.tree.flatten((cast, *others))
    return [structure.unflatten(row) for row in zip(*map(rows, leaves), strict=True)]


class Transformer(Network):
    """Tokens int[batch, length] to logits float32[batch, length, tokens].

    Args:
      input_shape: (length,), of one sequence; longer ones are taken as well.
      num_outputs: number of tokens.
      depth: number of layers; their parameters are stacked along a first axis.
      features: width of the residual stream.
      heads: of the attention; divides `features` into even parts.
      hidden: width of the SwiGLU; 0: 8/3 of `features`, rounded up to a multiple of 64.
      tied: whether the output layer is the embedding, transposed.
      dropout: of each residual branch.
      remat: what the backward pass computes again: ``'none'``; ``'products'``: all but the products' results, that is what lies between
        them; ``'all'``: a third more work, and memory for one layer's activations instead of all layers'.
    """

    takes_tokens = True

    def __init__(
        self,
        input_shape: tuple[int],
        num_outputs: int,
        *,
        depth: int,
        features: int,
        heads: int,
        hidden: int = 0,
        tied: bool = True,
        dropout: float = 0.0,
        remat: str = 'none',
        rngs: nnx.Rngs,
    ):
        if len(input_shape) != 1:
            raise ValueError(f"model.name='transformer' takes sequences of tokens, got examples of shape {tuple(input_shape)}.")
        if features % heads or features // heads % 2:
            raise ValueError(
                f'model.heads={heads} must divide model.features={features} into parts of an even size (rotary embeddings turn pairs).'
            )
        if remat not in REMAT:
            raise errors.unknown('model.remat', remat, REMAT)
        self.embed = Embed(num_outputs, features, rngs=rngs)
        hidden = hidden or -(-8 * features // 3 // 64) * 64
        make = nnx.vmap(lambda key: _Layer(features, heads, hidden, depth, dropout, rngs=nnx.Rngs(key)))
        self.layers = make(jax.random.split(rngs.params(), depth))
        self.norm = RMSNorm(features)
        if not tied:
            self.head = Linear(features, num_outputs, use_bias=False, init=layers.normal(0.02), rngs=rngs)
        self.tied = tied
        self.depth = depth
        self.remat = remat

    def __call__(
        self, tokens, *, train: bool, rng=None, patterns=None, dtype=jnp.float32, measure: Callable | None = None, labels=None
    ):
        """The logits, or what `measure` makes of those of each token and its label: then no more of them exist at once than MOST_LOGITS."""
        x = self._features(tokens, train, rng, patterns, dtype)
        if measure is None:
            return self._logits(x, patterns)
        batch, length = tokens.shape
        outputs = self.embed.table.shape[0]
        parts = next(
            n for n in range(1, length + 1) if length % n == 0 and (batch * length // n * outputs <= MOST_LOGITS or n == length)
        )
        if parts == 1:
            return measure(self._logits(x, patterns), labels)
        part = lambda x, labels: measure(self._logits(x, patterns), labels)
        split = lambda x: jnp.moveaxis(
            x.reshape(batch, parts, -1, *x.shape[2:]), 1, 0
        )  # by position: the batch may lie over devices
        measured = jax.lax.map(lambda row: jax.checkpoint(part)(*row), (split(x), split(labels)))
        return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(batch, length, *y.shape[3:]), measured)

    def _logits(self, x, patterns):
        if self.tied:
            return self.embed.logits(x)
        return self.head(x, pattern_at(patterns, 'head', 'kernel'), out_dtype=jnp.float32)

    def _features(self, tokens, train: bool, rng, patterns, dtype) -> jax.Array:
        graphdef, stacked = nnx.split(self.layers)
        keys = None if rng is None else jax.random.split(rng, self.depth)

        def layer(x, row):
            params, key, patterns = row
            return nnx.merge(graphdef, params)(x, train=train, rng=key, patterns=patterns), None

        rows, x = (nnx.to_pure_dict(stacked), keys, pattern_at(patterns, 'layers')), self.embed(tokens, dtype)
        on_gpu = target.platform() == 'gpu'
        if on_gpu and self.depth <= _UNROLLED[self.remat]:
            layer = _remat(layer, self.remat)
            for row in _unstacked(rows[0], rows[1:], self.depth, dtype):
                x, _ = layer(x, row)
        else:
            # A loop stacks whatever it keeps: on a GPU, where copies count, what lies between the products is computed again.
            layer = _remat(layer, 'products' if on_gpu and self.remat == 'none' else self.remat)
            x, _ = jax.lax.scan(layer, x, rows)
        return self.norm(x)


def stacked(path: str, leaf) -> bool:
    """Which leaves hold one layer a row: the argument ``stacked`` of ``sj.sparsify``."""
    del leaf
    return path.startswith('layers/')
