"""flax's Linear and Conv with another product: everything else is flax's own code, which runs with it in the place of lax's."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
from flax import nnx
from jax import lax

from sparse_jax import kernels
from sparse_jax.core import errors


class SparsityPattern(nnx.Variable):
    """A layer's pattern, or None where it is dense. Part of the module's state, and no Param: it has no gradient."""


class _Kernel:
    """What flax reads a layer's kernel from: a frozen weight as it is."""

    def __init__(self, weight: kernels.CompactWeight):
        self._weight = weight

    def __getitem__(self, index):
        return self._weight


def _promoted(layer: Any):
    """flax's promotion of (inputs, kernel, bias), by the values where the kernel is frozen."""

    def promote(arrays, *, dtype=None):
        inputs, weight, bias = arrays
        inputs, values, bias = layer.promote_dtype((inputs, weight.values, bias), dtype=dtype)
        return inputs, dataclasses.replace(weight, values=values), bias

    return promote


def _with_product(layer: Any, **product: Any) -> SimpleNamespace:
    """What a layer is to flax's code, with another product."""
    weight = layer.kernel.get_value()
    own = dict(product)
    if isinstance(weight, kernels.CompactWeight):
        own |= dict(kernel=_Kernel(weight), promote_dtype=_promoted(layer))
    return SimpleNamespace(**(vars(layer) | own))


def _is_sparse(layer: Any) -> bool:
    return layer.pattern.get_value() is not None or isinstance(layer.kernel.get_value(), kernels.CompactWeight)


class SparseLinear(nnx.Linear):
    """``flax.nnx.Linear``, by :func:`sparse_jax.kernels.sparse_dot` where :attr:`pattern` is set or the kernel is frozen.

    It takes what ``nnx.Linear`` takes, and has the same parameters under the same names.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> layer = SparseLinear(4, 2, rngs=nnx.Rngs(0))
      >>> mask = np.array([[True, False]] * 4)
      >>> layer.kernel[...] = jnp.where(mask, layer.kernel[...], 0)
      >>> layer.pattern.set_value(kernels.make_pattern(mask))
      >>> layer(jnp.ones((3, 4))).shape
      (3, 2)
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pattern = SparsityPattern(None)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Args: inputs: [..., in]. out_sharding: as ``nnx.Linear`` takes it, where the layer is dense. Returns: [..., out]."""
        if not _is_sparse(self):
            return super().__call__(inputs, out_sharding)
        pattern = self.pattern.get_value()

        def product(x, w, dimensions, *, precision=None, out_sharding=None, preferred_element_type=None):
            del dimensions, precision, out_sharding
            y = kernels.sparse_dot(x, w, pattern)
            return y if preferred_element_type is None else y.astype(preferred_element_type)

        return nnx.Linear.__call__(_with_product(self, dot_general=product), inputs)  # pyright: ignore[reportArgumentType]


class SparseConv(nnx.Conv):
    """``flax.nnx.Conv``, by :func:`sparse_jax.kernels.sparse_conv` where :attr:`pattern` is set or the kernel is frozen.

    It takes what ``nnx.Conv`` takes, and has the same parameters under the same names. Convolutions that are not 2D, in groups or of
    dilated inputs are flax's, of the masked kernel.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pattern = SparsityPattern(None)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Args: inputs: [..., height, width, in]. out_sharding: as ``nnx.Conv`` takes it, where the layer is dense. Returns: [..., out]."""
        if not _is_sparse(self):
            return super().__call__(inputs, out_sharding)
        pattern = self.pattern.get_value()

        def product(
            x, w, strides, padding, *, lhs_dilation, rhs_dilation, feature_group_count, preferred_element_type=None, **others
        ):
            if feature_group_count != 1 or len(strides) != 2 or any(step != 1 for step in lhs_dilation):
                errors.say_once(
                    'SparseConv: convolutions that are not 2D, in groups or of dilated inputs run on XLA, with the masked kernel.'
                )
                w = w.to_dense() if isinstance(w, kernels.CompactWeight) else w
                own = dict(lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation, feature_group_count=feature_group_count)
                return lax.conv_general_dilated(
                    x, w, strides, padding, **own, preferred_element_type=preferred_element_type, **others
                )
            y = kernels.sparse_conv(x, w, pattern, strides=tuple(strides), padding=padding, dilation=tuple(rhs_dilation))
            return y if preferred_element_type is None else y.astype(preferred_element_type)

        return nnx.Conv.__call__(_with_product(self, conv_general_dilated=product), inputs)  # pyright: ignore[reportArgumentType]
