"""What a network computes, moves and keeps, for one example, from its program by shapes alone.

A program is followed equation by equation. Products (of matrices, convolutions) are what tensor cores do. Everything between them is fused by
the compiler: a value is written where a product or a reduction needs it, and what it is computed of is read once for it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_jax.core import layers as layers_lib
from sparse_jax.stats import jaxprs


class Product(NamedTuple):
    """A product of one example, forward."""

    name: str  # path of its weight; '' where both sides are activations, as in attention
    kind: str  # 'matrix' or 'convolution'
    rows: int  # of the left matrix: positions of an example
    inputs: int  # features or channels, times taps
    outputs: int
    times: int  # how often it is computed: layers of a scan, heads
    needs_input_gradient: bool
    operations: int  # multiply-adds of all times together
    read: int  # elements of the activations that it reads
    written: int  # elements that it writes
    weights: int  # elements of the weight, all layers; 0 without one
    geometry: tuple = ()  # a convolution's image and kernel: (height, width, in, kernel height, kernel width, out, stride, height and width of the result)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a network does with one example."""

    products: tuple[Product, ...]
    moved: int  # elements that the operations between the products read and write, forward
    scores: int  # likewise, of attention's scores: none where one kernel computes attention
    kept: int  # elements that the backward pass needs again, where nothing is computed twice
    kept_scores: int  # likewise, of attention's scores
    carried: int  # of these, what goes from layer to layer of a scan: what is kept where layers are computed twice
    logits: int  # elements of the last product
    parameters: int
    leaves: dict[str, tuple[int, ...]]  # shape of each leaf of the params

    @property
    def forward(self) -> int:
        """Multiply-adds of the forward pass."""
        return sum(p.operations for p in self.products)

    @property
    def backward(self) -> int:
        """Multiply-adds of the backward pass: with a weight its gradient, and the input's where something before it is trained."""
        return sum(p.operations * ((p.name != '') + p.needs_input_gradient * (1 if p.name else 2)) for p in self.products)


def count(apply: Callable[..., Any], params: Any, *inputs: Any) -> Counts:
    """Counts a network.

    Args:
      apply: the network, called as ``apply(params, *inputs)`` for one example; it is traced, not run.
      params: tree of parameters, or their shapes.
      *inputs: arrays or shapes, with a batch of one.

    Returns:
      Its counts.

    Example:
      >>> shapes = {'w': jax.ShapeDtypeStruct((8, 4), 'float32')}
      >>> counted = count(lambda p, x: jax.numpy.tanh(x @ p['w']), shapes, jax.ShapeDtypeStruct((1, 8), 'float32'))
      >>> counted.forward, counted.parameters
      (32, 32)
    """
    closed = jax.make_jaxpr(apply)(params, *inputs)
    named = layers_lib.leaf_paths(params)
    walker = _Walker()
    values = [_Value(name=name, depends=True, is_stored=True, sources=frozenset()) for name, _ in named]
    values += [
        _Value(depends=False, is_stored=True, sources=frozenset([f'input {i}']))
        for i in range(len(closed.jaxpr.invars) - len(values))
    ]
    walker.walk(closed.jaxpr, values, 1)
    leaves = {path: tuple(np.shape(leaf)) for path, leaf in named}
    return Counts(
        products=tuple(walker.products),
        moved=walker.moved['other'],
        scores=walker.moved['scores'],
        kept=walker.kept['other'],
        kept_scores=walker.kept['scores'],
        carried=walker.carried,
        logits=walker.products[-1].written if walker.products else 0,
        parameters=sum(math.prod(shape) for shape in leaves.values()),
        leaves=leaves,
    )


class _Value(NamedTuple):
    """What is known of a value of the program."""

    name: str = ''  # the parameter that it is, whatever its shape and type
    depends: bool = False  # whether it depends on a parameter
    is_stored: bool = False  # whether it is in memory
    is_score: bool = False  # whether it is computed of attention's scores, which its kernels keep on the chip
    sources: frozenset = frozenset()  # sizes by name of the stored values that it is computed of


# Operations that change how a parameter lies, but not what it is.
_SAME = {
    'reshape', 'transpose', 'squeeze', 'expand_dims', 'broadcast_in_dim', 'convert_element_type', 'copy', 'sharding_constraint', 'slice',
    'optimization_barrier', 'reduce_precision', 'split',
}  # fmt: skip
_REDUCTIONS = {
    'reduce_sum',
    'reduce_max',
    'reduce_min',
    'argmax',
    'argmin',
    'reduce_window_sum',
    'reduce_window_max',
    'cumsum',
    'sort',
}


class _Walker:
    """Walks a jaxpr and adds up what it does."""

    def __init__(self):
        self.products: list[Product] = []
        self.moved, self.kept = ({'other': 0, 'scores': 0} for _ in range(2))
        self.carried = 0
        self._number = 0

    def walk(self, jaxpr, arguments: list[_Value], times: int) -> list[_Value]:
        known: dict[Any, _Value] = dict.fromkeys(jaxpr.constvars, _Value(is_stored=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom) -> _Value:
            return _Value(is_stored=True) if hasattr(atom, 'val') else known[atom]

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            known |= dict(zip(eqn.outvars, self._step(eqn, values, times, known), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn, values: list[_Value], times: int, known: dict[Any, _Value]) -> list[_Value]:
        name = eqn.primitive.name
        depends = any(v.depends for v in values)
        if name in jaxprs.PRODUCTS:
            operands = [self._stored(atom, value, times, known) for atom, value in zip(eqn.invars, values, strict=True)]
            self._product(eqn, operands, times)
            of_activations = name == 'dot_general' and not any(v.name for v in operands) and all(v.depends for v in operands)
            is_score = of_activations and not any(v.is_score for v in operands)
            return [self._new(v, depends, times, is_score) for v in eqn.outvars]
        if name == 'scan':
            return self._scan(eqn, values, times, known)
        if name == 'while':
            return [self._new(v, depends, times) for v in eqn.outvars]
        if name == 'cond':
            return self.walk(jaxprs.body(eqn.params['branches'][-1]), values[1:], times)
        if (called := jaxprs.called(eqn)) is not None:
            inner = jaxprs.body(called)
            return self.walk(inner, values[len(values) - len(inner.invars) :], times)
        if name in _SAME and values[0].name:
            return [values[0]] * len(eqn.outvars)
        sources = frozenset().union(*(v.sources for v in values))
        is_score = any(v.is_score for v in values)
        if name in _REDUCTIONS:
            self.moved['scores' if is_score else 'other'] += times * self._size_of(sources)
            return [self._new(v, depends, times, is_score) for v in eqn.outvars]
        return [_Value(depends=depends, sources=sources, is_score=is_score)] * len(eqn.outvars)

    def _new(self, var, depends: bool, times: int, is_score: bool = False) -> _Value:
        """A value that is in memory."""
        size = math.prod(var.aval.shape)
        self._number += 1
        self.kept['scores' if is_score else 'other'] += times * size if depends else 0
        return _Value(depends=depends, is_stored=True, is_score=is_score, sources=frozenset([(self._number, size)]))

    def _size_of(self, sources: frozenset) -> int:
        return sum(source[1] for source in sources if isinstance(source, tuple))

    def _stored(self, atom, value: _Value, times: int, known: dict[Any, _Value]) -> _Value:
        """The value after it is written, where it was not."""
        if value.is_stored or value.name or hasattr(atom, 'val'):
            return value
        size = math.prod(atom.aval.shape)
        self.moved['scores' if value.is_score else 'other'] += times * (size + self._size_of(value.sources))
        stored = self._new(atom, value.depends, times, value.is_score)
        known[atom] = stored
        return stored

    def _product(self, eqn, operands: list[_Value], times: int) -> None:
        left, right = (v.aval for v in eqn.invars)
        out = eqn.outvars[0].aval
        *_, total = jaxprs.uses(eqn)
        weight = next((i for i in (1, 0) if operands[i].name), None)
        kind = jaxprs.PRODUCTS[eqn.primitive.name]
        shapes = left.shape, right.shape
        if kind == 'matrix':
            (contracted, _), (batch, _) = eqn.params['dimension_numbers']
            inputs = math.prod(left.shape[i] for i in contracted)
            heads = math.prod(left.shape[i] for i in batch)
            rows = math.prod(left.shape) // (inputs * heads)
            outputs = math.prod(right.shape) // (inputs * heads)
            if weight == 0:
                rows, outputs = outputs, rows
            geometry = ()
        else:
            numbers, p = eqn.params['dimension_numbers'], eqn.params
            kernel = [right.shape[i] for i in numbers.rhs_spec]
            outputs, inputs = kernel[0], math.prod(kernel[1:])
            heads, rows = 1, math.prod(out.shape) // outputs
            image = [left.shape[i] for i in numbers.lhs_spec]
            geometry = ()
            if len(kernel) == 4 and p['feature_group_count'] == p['batch_group_count'] == 1:
                sides = [out.shape[i] for i in numbers.out_spec[2:]]
                geometry = (*image[2:], image[1], *kernel[2:], outputs, max(p['window_strides']), *sides)
        other = operands[1 - weight] if weight is not None else operands[0]
        size = math.prod(shapes[weight]) if weight is not None else 0
        activations = sum(math.prod(shape) for i, shape in enumerate(shapes) if i != weight)
        self.products.append(
            Product(
                name='' if weight is None else operands[weight].name,
                kind=kind,
                rows=rows,
                inputs=inputs,
                outputs=outputs,
                times=times * heads,
                needs_input_gradient=other.depends,
                operations=times * total,
                read=times * activations,
                written=times * math.prod(out.shape),
                weights=times * size,
                geometry=geometry,
            )
        )

    def _scan(self, eqn, values: list[_Value], times: int, known: dict[Any, _Value]) -> list[_Value]:
        jaxpr, length, constants, carried = jaxprs.scan(eqn)
        rows = values[constants + carried :]
        inside = [v if v.name else v._replace(is_stored=True, sources=frozenset()) for v in values[:constants]]
        carry = values[constants : constants + carried]
        # what depends on a parameter after one layer does so from then on
        inside += [self._carry(atom, v) for atom, v in zip(eqn.invars[constants : constants + carried], carry, strict=True)]
        inside += [v if v.name else v._replace(is_stored=True) for v in rows]
        self.walk(jaxpr, inside, times * length)
        sizes = [math.prod(v.aval.shape) for v in jaxpr.outvars[:carried]]
        self.carried += times * length * sum(sizes)
        return [self._new(v, True, 0) for v in eqn.outvars]

    def _carry(self, atom, value: _Value) -> _Value:
        self._number += 1
        size = math.prod(atom.aval.shape)
        return _Value(depends=True, is_stored=True, sources=frozenset([(self._number, size)])) if size > 1 else value
