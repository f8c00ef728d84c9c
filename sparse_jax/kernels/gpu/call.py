"""How a kernel body becomes a call: operands by name, and the name that compiled programs and profiles show."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def once(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A kernel as a function of its own in the program, which is lowered once for all layers of the same shapes: a third of a second each.

    Args:
      function: of operands, and of keyword arguments that are static.
    """
    parameters = inspect.signature(function).parameters.values()
    return jax.jit(function, static_argnames=[p.name for p in parameters if p.kind is p.KEYWORD_ONLY])


def call(body: Callable[..., None], name: str, operands: Any, *, interpret=None, **options) -> jax.Array:
    """Runs a Mosaic GPU kernel.

    Args:
      body: takes the operands as references in global memory, in the NamedTuple they came in, then references to the result and to
        scratch memory.
      name: of the kernel; the lowering and profiles look for it.
      operands: a NamedTuple of arrays.
      interpret: parameters of the interpreter; None: compile.
      **options: of ``plgpu.kernel``.

    Returns:
      The result.
    """

    def named(*refs, **scratch_refs):
        body(type(operands)(*refs[: len(operands)]), *refs[len(operands) :], **scratch_refs)

    named.__name__ = name
    if interpret is not None:
        options['interpret'] = interpret
    return plgpu.kernel(named, **options)(*operands)
