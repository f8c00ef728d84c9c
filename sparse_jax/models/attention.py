"""Causal attention, by what runs it best on the platform that a program is traced for.

On a GPU attention that writes its scores costs more than all products of a sparse layer: cuDNN's keeps none, where jax finds cuDNN, and
tokamax's kernel for Hopper neither. Where there is no such kernel, or it does not take the operands, XLA's scores are in the type of the
operands and computed again in the backward pass.

Reference: Dao et al., FlashAttention, 2022.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sparse_jax.core import errors, target
from sparse_jax.kernels import backend, device

_HALF = ('bfloat16', 'float16')


def causal(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    r""":math:`\mathrm{softmax}(q k^\top / \sqrt{d}) v`, each position over itself and those before it.

    Args:
      query: [batch, length, heads, features].
      key: the same.
      value: the same.

    Returns:
      The same shape and type.
    """
    return _IMPLEMENTATIONS[choose(query.shape, query.dtype).implementation](query, key, value)


def choose(shape: tuple[int, ...], dtype: Any) -> backend.Choice:
    """What computes attention of these operands, and why nothing faster does.

    Args:
      shape: of the query: [batch, length, heads, features].
      dtype: of all operands.

    Returns:
      ``'xla'``, ``'cudnn'``, ``'tokamax'`` or ``'recomputed'``, and a reason in the last case.
    """
    if target.platform() != 'gpu' or device.interpret():
        return backend.Choice('xla', '')
    choice = _on_gpu(shape, dtype)
    named = f'attention of {"x".join(map(str, shape))} {jnp.dtype(dtype).name}'
    if choice.reason:
        errors.say_once(
            f'sparse_jax: {named} by XLA, whose scores are written and made twice, since no kernel takes these operands: {choice.reason}.'
        )
    else:
        _log(f'{named} by {choice.implementation}')
    return choice


@functools.cache
def _log(message: str) -> None:
    logging.getLogger('sparse_jax').info('%s', message)


def _on_gpu(shape: tuple[int, ...], dtype: Any) -> backend.Choice:
    if jnp.dtype(dtype).name not in _HALF:
        return backend.Choice('recomputed', f'they take {" or ".join(_HALF)}, not {jnp.dtype(dtype).name}')
    reasons = []
    for name in ('cudnn', 'tokamax'):
        if not (reason := _unavailable(name, shape, jnp.dtype(dtype).name)):
            return backend.Choice(name, '')
        reasons.append(f'{name}: {reason}')
    return backend.Choice('recomputed', '; '.join(reasons))


def _unavailable(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Why a kernel cannot take such operands, forward and backward; empty where it can."""
    if name == 'tokamax' and not importlib.util.find_spec('tokamax'):
        return 'it is not installed (pip install "sparse_jax[gpu]")'
    if name == 'cudnn' and device.is_absent():
        return 'it is not asked for devices that are not here'
    if name == 'tokamax' and device.is_absent() and device.stand_in() is None:
        return 'it needs the device that it is compiled for'
    run = _IMPLEMENTATIONS[name]
    x = jax.ShapeDtypeStruct(shape, dtype)
    try:
        jax.eval_shape(jax.grad(lambda q, k, v: run(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2)), x, x, x)
    except Exception as error:  # what a kernel raises is its own
        return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ''


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, implementation: Any = None) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=implementation)


def _tokamax(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    import tokamax  # pyright: ignore[reportMissingImports]  # takes seconds, and is an extra

    run = functools.partial(tokamax.dot_product_attention, is_causal=True, implementation='mosaic')
    mesh = target.mesh()
    if mesh is None:
        return run(query, key, value)
    # each device its examples and its heads, as far as they divide
    batch, _, heads, _ = query.shape
    axes = [axis if size % mesh.shape[axis] == 0 else None for axis, size in (('data', batch), ('model', heads))]
    spec = P(axes[0], None, axes[1], None)
    return jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(query, key, value)


@jax.checkpoint
def _recomputed(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    length, features = query.shape[1], query.shape[-1]
    scores = jnp.einsum('bqhd,bkhd->bhqk', query * query.dtype.type(features**-0.5), key)
    seen = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores.astype(jnp.float32), -jnp.inf), axis=-1).astype(query.dtype)
    return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


_IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    'xla': _xla,
    'cudnn': functools.partial(_xla, implementation='cudnn'),
    'tokamax': _tokamax,
    'recomputed': _recomputed,
}
