"""Follows the zeros of masked leaves through the operations of a jaxpr that keep or move them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparse_jax.stats import jaxprs


class Part(NamedTuple):
    """The entries of a value that come from one masked leaf."""

    name: str
    mask: np.ndarray  # of the value's shape; False where this part is certainly zero, or another's
    region: np.ndarray | None = None  # which entries are this leaf's; None: all


class Value(NamedTuple):
    """What is known about a value of the jaxpr."""

    parts: tuple[Part, ...] = ()  # those of masked leaves
    depends: bool = False  # whether it depends on a parameter
    lost: tuple[str, str] | None = None  # (leaf, operation) if an operation that is not followed derived it from a masked leaf
    constant: np.ndarray | None = None  # its entries, where the program tells them: the places that a gather takes


# Operations that are applied to the mask as well.
_SHAPE = {'reshape', 'transpose', 'squeeze', 'expand_dims', 'broadcast_in_dim', 'slice', 'rev'}
# Operations that leave zeros where they are.
_SAME = {
    'convert_element_type', 'neg', 'copy', 'copy_p', 'reduce_precision', 'abs', 'sign', 'sharding_constraint', 'stop_gradient',
    'mul', 'div', 'optimization_barrier', 'integer_pow', 'sqrt', 'tanh',
}  # fmt: skip
# Operations that move zeros; those that are not followed lose them.
_MOVES = {'gather', 'dynamic_slice', 'dynamic_update_slice', 'concatenate', 'pad', 'select_n', 'scatter', 'sort', 'while'}
# Operations by which indices are made, whose results are computed where their operands are known.
_INDICES = _SHAPE | {
    'iota',
    'add',
    'sub',
    'mul',
    'rem',
    'lt',
    'ge',
    'eq',
    'select_n',
    'convert_element_type',
    'concatenate',
    'clamp',
    'copy',
}
_MOST_INDICES = 2**22


def follow(eqn, values: Sequence[Value]) -> list[Value]:
    """What is known about the results of an equation that is no product and calls nothing."""
    name, depends = eqn.primitive.name, any(v.depends for v in values)
    if (known := _known(eqn, values)) is not None:
        return [Value(constant=known)]
    moved = _moved(eqn, values)
    if moved is not None:
        return [Value(parts, depends) for parts in moved]
    lost = next((v.lost for v in values if v.lost), None)
    if name in _MOVES:
        lost = next(((v.parts[0].name, name) for v in values if v.parts), lost)
    elif name not in _SAME | _SHAPE | {'split'}:
        lost = None
    return [Value((), depends, lost)] * len(eqn.outvars)


def mapped(parts: Sequence[Part], function: Callable[[np.ndarray], Any]) -> tuple[Part, ...]:
    """The parts, their masks and regions moved as a function moves entries."""
    return tuple(
        Part(p.name, np.asarray(function(p.mask)), None if p.region is None else np.asarray(function(p.region))) for p in parts
    )


def _moved(eqn, values: Sequence[Value]) -> list[tuple[Part, ...]] | None:
    """The parts of the results; None where no zeros are followed."""
    name, first = eqn.primitive.name, values[0] if values else Value()
    bind = lambda mask, *rest: eqn.primitive.bind(jnp.asarray(mask), *rest, **eqn.params)
    if not any(v.parts for v in values):
        return None
    if name in _SHAPE and len(values) == 1:
        return [mapped(first.parts, bind)]
    if name == 'split':
        outputs = range(len(eqn.outvars))
        return [mapped(first.parts, lambda mask, i=i: bind(mask)[i]) for i in outputs]
    if name == 'concatenate':
        return [_concatenated(values, [v.aval.shape for v in eqn.invars], eqn.params['dimension'])]
    if name == 'pad' and first.parts and np.all(values[1].constant == 0):
        return [mapped(first.parts, lambda mask: bind(mask, jnp.asarray(False)))]
    if name == 'gather' and first.parts and values[1].constant is not None:
        places = jnp.asarray(values[1].constant)
        return [mapped(first.parts, lambda mask: np.asarray(bind(np.asarray(mask, np.float32), places)) != 0)]
    if name in _SAME and not (name == 'div' and not first.parts):
        tracked = [v.parts for v in values if v.parts]
        if len(eqn.outvars) > 1:
            return [v.parts for v in values]
        for other in tracked[1:]:  # of a product of weights, zero where either is
            nonzero = np.logical_or.reduce([p.mask for p in other])
            tracked[0] = tuple(p._replace(mask=np.logical_and(p.mask, nonzero)) for p in tracked[0])
        return [tracked[0]]
    return None


def _concatenated(values: Sequence[Value], shapes: Sequence[tuple[int, ...]], axis: int) -> tuple[Part, ...]:
    """Each operand's parts in their place; what is between them belongs to no masked leaf."""
    found = []
    for i, value in enumerate(values):
        place = lambda own, i=i: np.concatenate([own if j == i else np.zeros(s, bool) for j, s in enumerate(shapes)], axis)
        for part in value.parts:
            region = np.ones(shapes[i], bool) if part.region is None else part.region
            found.append(Part(part.name, place(part.mask), place(region)))
    return tuple(found)


def _known(eqn, values: Sequence[Value]) -> np.ndarray | None:
    """The result's entries, where they can be computed and are few."""
    if eqn.primitive.name not in _INDICES or len(eqn.outvars) != 1 or eqn.outvars[0].aval.size > _MOST_INDICES:
        return None
    if any(v.constant is None for v in values):
        return None
    return np.asarray(eqn.primitive.bind(*(jnp.asarray(v.constant) for v in values), **eqn.params))


def literal(atom) -> Value:
    """A constant that stands in an equation."""
    return Value(constant=np.asarray(atom.val))


def constants(closed) -> list[Value]:
    """Those that a closed jaxpr brings with it; larger ones than indices are, are not kept."""
    small = lambda c: np.asarray(c) if getattr(c, 'size', 1) <= _MOST_INDICES and not jaxprs.is_key(c) else None
    return [Value(constant=small(c)) for c in getattr(closed, 'consts', ())]
