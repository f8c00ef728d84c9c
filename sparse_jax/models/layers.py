"""The thin layers that all models are made of: dense today where the pattern is None, the place for sparse kernels later."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def _uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Uniform in +-1/sqrt(fan_in), kernels and biases alike: PyTorch's default, with which the original was trained.

    Lecun's normal is 1.7 times as wide; with the original's learning rate some seeds of LeNet-5 then die in the first steps.
    """
    return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)


def _dense_only(pattern) -> None:
    if pattern is not None:
        raise NotImplementedError('this version has no sparse kernels: pass patterns=None.')


class Linear(nnx.Module):
    """x @ kernel + bias; kernel: [in, out]."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_uniform(rngs.params(), (in_features, out_features), in_features))
        self.bias = nnx.Param(_uniform(rngs.params(), (out_features,), in_features))

    def __call__(self, x: jax.Array, pattern=None) -> jax.Array:
        """Args: x: [..., in]. pattern: the kernel's sparsity pattern, or None. Returns: [..., out]."""
        _dense_only(pattern)
        return x @ self.kernel[...] + self.bias[...]


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
        rngs: nnx.Rngs,
    ):
        fan_in = math.prod(kernel_size) * in_features
        self.kernel = nnx.Param(_uniform(rngs.params(), (*kernel_size, in_features, out_features), fan_in))
        self.bias = nnx.Param(_uniform(rngs.params(), (out_features,), fan_in))
        self.strides = strides
        self.padding = padding

    def __call__(self, x: jax.Array, pattern=None) -> jax.Array:
        """Args: x: [batch, height, width, in]. pattern: the kernel's sparsity pattern, or None. Returns: [batch, ..., out]."""
        _dense_only(pattern)
        y = lax.conv_general_dilated(x, self.kernel[...], self.strides, self.padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
        return y + self.bias[...]


def max_pool(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """Maximum over windows that do not overlap; x: [batch, height, width, channels].

    Written as maxima of strided slices: on CPU the gradient of ``lax.reduce_window`` is several times slower.
    """
    slices = [x[:, i :: window[0], j :: window[1]] for i in range(window[0]) for j in range(window[1])]
    return functools.reduce(jnp.maximum, slices)
