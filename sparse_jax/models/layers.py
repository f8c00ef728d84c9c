"""The thin layers that all models are made of: dense where the pattern is None, on the sparse kernels where there is one.

Parameters are float32; a layer computes in the type of its input, so that a model runs in bfloat16 by casting its input once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sparse_jax import kernels
from sparse_jax.models import by_lanes
from sparse_jax.models.by_lanes import ByLanes

Initializer = Callable[[jax.Array, tuple[int, ...], int], jax.Array]  # (key, shape, fan_in)


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Uniform in +-1/sqrt(fan_in), kernels and biases alike: PyTorch's default, with which the original was trained.

    Lecun's normal is 1.7 times as wide; with the original's learning rate some seeds of LeNet-5 then die in the first steps.
    """
    return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)


def normal(scale: float) -> Initializer:
    """Normal with this standard deviation."""
    return lambda key, shape, fan_in: scale * jax.random.normal(key, shape)


def he_fan_out(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Normal with variance 2 / (taps x outputs): the original's start of wide residual networks."""
    del fan_in
    return math.sqrt(2 / (math.prod(shape[:-2]) * shape[-1])) * jax.random.normal(key, shape)


def pattern_at(patterns: Any, *path: str) -> Any:
    """The pattern at a path of a tree in which missing parts and None mean dense.

    >>> pattern_at({'fc1': {'kernel': 'p'}}, 'fc1', 'kernel'), pattern_at(None, 'fc1')
    ('p', None)
    """
    for name in path:
        patterns = None if patterns is None else patterns.get(name)
    return patterns


def kernel_of(kernel: nnx.Param, dtype: Any) -> Any:
    """A layer's kernel in this type: an array, or a frozen weight, which needs no pattern."""
    value = kernel.get_value()
    if isinstance(value, kernels.CompactWeight):
        return dataclasses.replace(value, values=value.values.astype(dtype))
    return value.astype(dtype)


class Network(nnx.Module):
    """A whole model, and what it can do."""

    takes_tokens: ClassVar[bool] = False  # else images
    takes_lanes: ClassVar[bool] = False  # whether its images may lie by lanes: see by_lanes.py


class Linear(nnx.Module):
    """x @ kernel + bias; kernel: [in, out]."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, init: Initializer = uniform, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), in_features))
        if use_bias:
            self.bias = nnx.Param(uniform(rngs.params(), (out_features,), in_features))
        self.use_bias = use_bias

    def __call__(self, x: jax.Array, pattern=None, *, out_dtype: Any = None) -> jax.Array:
        """Args: x: [..., in]. pattern: the kernel's sparsity pattern, or None. out_dtype: None: x's. Returns: [..., out]."""
        kernel = kernel_of(self.kernel, x.dtype)
        if pattern is None and isinstance(kernel, jax.Array):
            y = jnp.matmul(x, kernel, preferred_element_type=out_dtype)
        else:
            wide = jnp.dtype(out_dtype or x.dtype)
            y = kernels.sparse_dot(x.astype(wide), kernel_of(self.kernel, wide), pattern)
        return y + self.bias[...].astype(y.dtype) if self.use_bias else y


class Conv(nnx.Module):
    """2D convolution plus bias; kernel: [height, width, in, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int],
        *,
        strides: tuple[int, int] = (1, 1),
        padding: str | Sequence[tuple[int, int]] = 'SAME',
        use_bias: bool = True,
        init: Initializer = uniform,
        rngs: nnx.Rngs,
    ):
        fan_in = math.prod(kernel_size) * in_features
        self.kernel = nnx.Param(init(rngs.params(), (*kernel_size, in_features, out_features), fan_in))
        if use_bias:
            self.bias = nnx.Param(uniform(rngs.params(), (out_features,), fan_in))
        self.use_bias = use_bias
        self.strides = strides
        self.padding = padding if isinstance(padding, str) else tuple(padding)

    def __call__(self, x, pattern=None, *, residual=None) -> Any:
        """Args: x: [batch, height, width, in]. pattern: the kernel's, or None. residual: is added. Returns: [batch, ..., out]."""
        if isinstance(x, ByLanes):
            bias = self.bias[...] if self.use_bias else None
            return by_lanes.convolve(x, self.kernel[...], bias, pattern, residual, self.strides, self.padding)
        kernel = kernel_of(self.kernel, x.dtype)
        if pattern is None and isinstance(kernel, jax.Array):
            y = kernels.convolve(x, kernel, strides=self.strides, padding=self.padding)
        else:
            y = kernels.sparse_conv(x, kernel, pattern, strides=self.strides, padding=self.padding)
        y = y + self.bias[...].astype(x.dtype) if self.use_bias else y
        return y if residual is None else residual + y


class BatchNorm(nnx.Module):
    r"""Batch normalisation over all axes but the last, as in PyTorch: :math:`\gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta`.

    In training the batch's mean and (biased) variance are used, and the running ones move towards them by a tenth, the variance as
    the unbiased estimate; in evaluation the running ones are used. Statistics are float32 in any case. Over a sharded batch they
    are those of the whole batch.

    Reference: Ioffe and Szegedy, Batch normalization, 2015.
    """

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))

    def __call__(self, x, *, train: bool) -> Any:
        """Args: x: [batch, ..., features]. Returns: the same shape and type."""
        if isinstance(x, ByLanes):
            return self._by_lanes(x, train)
        wide = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(wide, axes)
            # two passes: E[x^2] - E[x]^2 cancels where the mean is large
            var = jnp.mean(jnp.square(wide - mean), axes)
            self._update(mean, var, math.prod(x.shape[:-1]))
        factor = self.scale[...] * lax.rsqrt(var + 1e-5)
        return ((wide - mean) * factor + self.bias[...]).astype(x.dtype)

    def _update(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
        self.var[...] = 0.9 * self.var[...] + 0.1 * var * (count / max(count - 1, 1))

    def _by_lanes(self, x: ByLanes, train: bool) -> ByLanes:
        if x.rectified or x.normalisation is not None:
            x = by_lanes.new(x.array(), x)
        bias = 0 if x.bias is None else x.bias
        mean, var = self.mean[...] - bias, self.var[...]
        if train:
            mean, var = x.known_moments()
            self._update(mean + bias, var, x.values.size // len(mean))
        factor = self.scale[...] * lax.rsqrt(var + 1e-5)
        return dataclasses.replace(x, moments=None, bias=None, normalisation=jnp.stack([mean, factor, self.bias[...]]))


class RMSNorm(nnx.Module):
    r""":math:`\gamma x / \sqrt{\mathrm{mean}(x^2) + \epsilon}` over the last axis, computed in float32.

    Reference: Zhang and Sennrich, Root mean square layer normalization, 2019.
    """

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Args: x: [..., features]. Returns: the same shape and type."""
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
        return (wide * self.scale[...]).astype(x.dtype)


class Embed(nnx.Module):
    """A row for each token; also the transposed output layer where the two are tied. Table: [tokens, features]."""

    def __init__(self, num_tokens: int, features: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_tokens, features)))

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """Args: tokens: int[...]. Returns: dtype[..., features]."""
        return self.table[...].astype(dtype)[tokens]

    def logits(self, x: jax.Array) -> jax.Array:
        """Args: x: [..., features]. Returns: float32[..., tokens]."""
        return jnp.matmul(x, self.table[...].astype(x.dtype).T, preferred_element_type=jnp.float32)


def dropout(x, rate: float, key: jax.Array | None, *, train: bool) -> Any:
    """Zeroes entries with this probability in training and scales the others by 1 / (1 - rate).

    Args:
      x: any shape.
      rate: in [0, 1).
      key: a random key; not read where nothing is dropped.
      train: whether to drop anything.

    Returns:
      The same shape and type.

    Raises:
      ValueError: in training with a rate above 0 and no key.

    Reference: Srivastava et al., Dropout, 2014.
    """
    if not train or rate == 0:
        return x
    if key is None:
        raise ValueError('dropout needs a random key in training: call apply(..., rng=key).')
    if isinstance(x, ByLanes):  # the same entries as by channels
        values = x.array()
        keep = jax.random.bernoulli(key, 1 - rate, jax.eval_shape(kernels.from_lanes, values).shape)
        return by_lanes.new(jnp.where(kernels.to_lanes(keep), values / (1 - rate), 0), x)
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def relu(x) -> Any:
    """max(x, 0), element by element."""
    return dataclasses.replace(x, rectified=True) if isinstance(x, ByLanes) else jax.nn.relu(x)


def max_pool(x, window: tuple[int, int]) -> Any:
    """Maximum over windows that do not overlap; x: [batch, height, width, channels]; what fills no window is left out.

    Written as maxima of strided slices: on CPU the gradient of ``lax.reduce_window`` is several times slower.
    """
    if isinstance(x, ByLanes):
        return (
            by_lanes.max_pool(x, window)
            if math.prod(window) <= by_lanes.MOST_POOLED
            else by_lanes.new(max_pool(x.array(), window), x)
        )
    height, width = (side // step * step for side, step in zip(x.shape[1:3], window, strict=True))
    slices = [x[:, i : height : window[0], j : width : window[1]] for i in range(window[0]) for j in range(window[1])]
    return functools.reduce(jnp.maximum, slices)


def average(x) -> jax.Array:
    """Mean over all pixels: [batch, height, width, channels] to [batch, channels]."""
    return kernels.from_lanes(x.array().mean((1, 2))) if isinstance(x, ByLanes) else x.mean((1, 2))


def flatten(x) -> jax.Array:
    """[batch, ...] to [batch, features]."""
    x = kernels.from_lanes(x.array()) if isinstance(x, ByLanes) else x
    return x.reshape(len(x), -1)
