"""Activations of convolutional networks on a CPU: by lanes, with a normalisation and a ReLU that the next convolution does while it reads.

Plain XLA writes and reads an activation some ten times a step for batch normalisation and ReLU, forward and backward; at 5% of the weights
that takes longer than the convolutions. So an activation is kept as the convolution before wrote it, with its channels' moments, and
what comes after is noted down until somebody needs the values. The thin layers of layers.py take either form.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_jax import kernels
from sparse_jax.kernels.cpu import lanes

BATCH, MOST_POOLED = lanes.BATCH, lanes.MOST_POOLED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByLanes:
    """max((values + bias - mean) * scale + shift, 0), each part of it only where it is there.

    Attributes:
      values: float32[batch / 16, height, width, channels, 16].
      moments: float32[2, channels]: mean and variance of the values; None: not known.
      bias: float32[channels]; None: zero.
      normalisation: float32[3, channels]: mean (of the values, without the bias), scale and shift; None: there is none.
      rectified: whether negative values are zero.
      train: whether the moments of what comes next are wanted.
    """

    values: jax.Array
    moments: jax.Array | None = None
    bias: jax.Array | None = None
    normalisation: jax.Array | None = None
    rectified: bool = dataclasses.field(default=False, metadata=dict(static=True))
    train: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def array(self) -> jax.Array:
        """The values with all that is noted down, by lanes."""
        x = self.values
        if self.normalisation is not None:  # its mean is free of the bias already
            mean, scale, shift = self.normalisation[..., None]
            x = (x - mean) * scale + shift
        elif self.bias is not None:
            x = x + self.bias[:, None]
        return jax.nn.relu(x) if self.rectified else x

    def known_moments(self) -> jax.Array:
        """Mean and variance of the channels of what is not normalised, without the bias."""
        if self.moments is not None:
            return self.moments
        over = lambda x: x.mean((0, 1, 2)).mean(-1)  # lanes last: so each sum is over vectors
        mean = over(self.values)
        return jnp.stack([mean, over(jnp.square(self.values - mean[:, None]))])


def begin(x: jax.Array, *, train: bool) -> ByLanes:
    """Args: x: [batch, height, width, channels] of a batch that is a multiple of 16."""
    return ByLanes(lanes.to_lanes(x), train=train)


def new(values: jax.Array, x: ByLanes) -> ByLanes:
    """Values that were made of x's, with nothing noted down."""
    return ByLanes(values, train=x.train)


def _for_kernels(x: ByLanes) -> tuple[jax.Array, jax.Array | None]:
    """Values, and the normalisation that kernels do while they read them: the one that ReLU follows."""
    return (x.values, x.normalisation) if x.rectified and x.normalisation is not None else (x.array(), None)


def max_pool(x: ByLanes, window: tuple[int, int]) -> ByLanes:
    """As layers.max_pool."""
    return new(kernels.max_pool_by_lanes(*_for_kernels(x), window), x)


def convolve(x: ByLanes, w: jax.Array, bias: jax.Array | None, pattern, residual: ByLanes | None, strides, padding) -> ByLanes:
    """As layers.Conv."""
    values, activation = _for_kernels(x)
    added = None if residual is None else residual.array()
    y, moments = kernels.convolve_by_lanes(
        values, activation, w, added, pattern, strides=strides, padding=padding, statistics=x.train
    )
    return ByLanes(y, moments if x.train else None, bias, train=x.train)
