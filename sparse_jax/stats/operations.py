"""Counts the multiply-adds of a sparse network exactly, from its jaxpr. Used as ``sj.stats.operations``.

A masked leaf is followed through the operations that preserve its zeros (reshapes, transposes, casts, slices, concatenations, padding,
gathers of places that the program knows, products, scans) to the matrix products and convolutions that consume it. The shapes then tell how often each weight is used: in a matrix product all weights
equally often; in a convolution the weight at tap k as often as that tap lies inside the image, so that padding is not counted.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_jax.core import distributions
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.stats import jaxprs, zeros
from sparse_jax.stats.zeros import Part, Value

# A mask update has two selections, each of which reads a weight's key about 32 times; computing the keys takes a few operations more.
MASK_UPDATE_OPERATIONS = 70


class LayerOperations(NamedTuple):
    """Multiply-adds of one leaf for one batch; each forward product has a product of equal cost in the gradients."""

    forward: int  # with the active weights only
    forward_dense: int  # with all weights
    input_gradient: int  # like forward, for the uses whose input needs a gradient, which a first layer's does not
    input_gradient_dense: int
    size: int  # number of weights, active or not


class Operations(NamedTuple):
    """Multiply-adds for one batch, in total and by leaf; training counts are averages over the steps between two mask updates.

    All counts hold for the given masks: with a density schedule they are not averages over the whole run.
    """

    layers: dict[str, LayerOperations]
    other_forward: int  # products without a masked leaf, which are the same in the dense network
    other_backward: int
    dense_gradient_part: float  # fraction of the steps whose weight gradients are dense
    mask_updates: float  # operations of the mask updates, averaged over the steps

    @property
    def inference(self) -> int:
        """Multiply-adds of the sparse network's forward pass."""
        return sum(layer.forward for layer in self.layers.values()) + self.other_forward

    @property
    def inference_dense(self) -> int:
        """Multiply-adds of the dense network's forward pass."""
        return sum(layer.forward_dense for layer in self.layers.values()) + self.other_forward

    @property
    def training(self) -> float:
        """Multiply-adds of a sparse training step: forward, input gradients, weight gradients and its share of a mask update."""
        products = sum(layer.forward + layer.input_gradient + self.weight_gradient(layer) for layer in self.layers.values())
        return products + self.other_forward + self.other_backward + self.mask_updates

    @property
    def training_dense(self) -> int:
        """Multiply-adds of a dense training step."""
        products = sum(2 * layer.forward_dense + layer.input_gradient_dense for layer in self.layers.values())
        return products + self.other_forward + self.other_backward

    def weight_gradient(self, layer: LayerOperations) -> float:
        """Multiply-adds of a layer's weight gradient, averaged over the steps with a dense and with an active-only gradient."""
        return layer.forward + (layer.forward_dense - layer.forward) * self.dense_gradient_part

    def log(self) -> dict[str, float]:
        """Returns the totals by the names under which they are logged."""
        return {
            'operations/inference': self.inference,
            'operations/inference_against_dense': self.inference / max(self.inference_dense, 1),
            'operations/training': self.training,
            'operations/training_against_dense': self.training / max(self.training_dense, 1),
        }

    def table(self) -> str:
        """Returns a table to print: forward, input gradient and weight gradient of each leaf, in millions, and the ratio to dense."""
        lines = [f'{"leaf":32} {"forward":>12} {"input grad.":>12} {"weight grad.":>12} {"dense forward":>14} {"ratio":>8}']
        for name, layer in self.layers.items():
            values = layer.forward, layer.input_gradient, self.weight_gradient(layer), layer.forward_dense
            numbers = ' '.join(f'{v / 1e6:>{w}.4g}' for v, w in zip(values, (12, 12, 12, 14), strict=True))
            lines.append(f'{name[-32:]:32} {numbers} {layer.forward / max(layer.forward_dense, 1):>8.2%}')
        lines.append(f'{"products of dense leaves":32} {self.other_forward / 1e6:>12.4g}')
        for name, sparse, dense in (
            ('inference', self.inference, self.inference_dense),
            ('training step', self.training, self.training_dense),
        ):
            lines.append(
                f'{name:32} {sparse / 1e6:>12.4g} {"against dense":>25} {dense / 1e6:>14.4g} {sparse / max(dense, 1):>8.2%}'
            )
        return '\n'.join(lines) + '\n(millions of multiply-adds for this batch)'


def operations(
    apply_fn: Callable[..., Any],
    params: Any,
    opt_state: Any,
    *inputs: Any,
    dense: Sequence[str] = (),
    dense_gradient_window: int | None = None,
    update_every: int | None = None,
) -> Operations:
    """Counts the multiply-adds of a network with given masks exactly, sparse and dense, for inference and training.

    Args:
      apply_fn: the network, called as ``apply_fn(params, *inputs)``. It is traced, not run. It may contain scans, but no while loops
        with products inside.
      params: tree of parameters, or their shapes.
      opt_state: state of an optimizer with one ``sparsify``; or a tree of masks. Concrete.
      *inputs: what else ``apply_fn`` takes, as arrays or shapes.
      dense: path patterns (``*`` matches anything) of sparse leaves to be counted as dense, as their zeros reach a product through an
        operation that is not followed.
      dense_gradient_window: number of steps before each mask update whose weight gradients are dense, as many as the growth rule
        needs (``sj.criteria.dense_gradient_steps(grow)``); if None, all steps. Requires ``update_every``.
      update_every: number of steps between mask updates; if None, there are no updates.

    Returns:
      The counts, by leaf and in total.

    Raises:
      ValueError: if the params are no tree like the masks, if a while loop contains products, if zeros are lost on the way to a
        product (naming the leaf), or if a window is given without ``update_every``.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = {'w': jnp.eye(4, dtype=bool), 'bias': jnp.array(True)}
      >>> params = {'w': jnp.ones((4, 4)), 'bias': jnp.ones(4)}
      >>> counted = operations(lambda p, x: x @ p['w'] + p['bias'], params, masks, jnp.ones((10, 4)))
      >>> counted.inference, counted.inference_dense
      (40, 160)
    """
    masks = masks_lib.whole(masks_lib.masks_in(opt_state), params)
    if dense_gradient_window is not None and update_every is None:
        raise ValueError(
            f'operations: dense_gradient_window={dense_gradient_window!r} needs update_every, the steps between mask updates.'
        )
    closed = jax.make_jaxpr(apply_fn)(params, *inputs)
    values, counter = [], _Counter()
    named = layers_lib.leaf_paths(params)
    sparse = [name for (name, _), mask in zip(named, jax.tree.leaves(masks), strict=True) if mask.ndim]
    counted_dense = {name for name, i in zip(sparse, distributions.matching(dense, sparse, 'dense'), strict=True) if i is not None}
    for (name, param), mask in zip(named, jax.tree.leaves(masks), strict=True):
        tracked = mask.ndim > 0 and name not in counted_dense
        if tracked:
            if mask.shape != param.shape:
                raise ValueError(f'operations: the mask of {name} has the shape {mask.shape}, its weights {param.shape}.')
            counter.layers[name] = [0, 0, 0, 0, param.size]
        values.append(Value((Part(name, np.asarray(mask)),) if tracked else (), True))
    values += [Value()] * (len(closed.jaxpr.invars) - len(values))
    counter.walk(closed.jaxpr, values, 1, zeros.constants(closed))
    layers = {name: LayerOperations(*row) for name, row in counter.layers.items()}
    part, update = 1.0, 0.0
    if update_every is not None:
        part = 1.0 if dense_gradient_window is None else min(dense_gradient_window, update_every) / update_every
        update = MASK_UPDATE_OPERATIONS * sum(layer.size for layer in layers.values()) / update_every
    return Operations(layers, counter.other_forward, counter.other_backward, part, update)


class _Counter:
    """Walks a jaxpr and adds up its multiply-adds."""

    def __init__(self):
        self.layers: dict[str, list] = {}  # the fields of LayerOperations by leaf
        self.other_forward = 0
        self.other_backward = 0

    def walk(self, jaxpr, arguments: list[Value], times: int, constants: Sequence[Value] = ()) -> list[Value]:
        """Counts a jaxpr that runs `times` times; returns its results' values."""
        environment = dict.fromkeys(jaxpr.constvars, Value()) | dict(zip(jaxpr.constvars, constants, strict=False))
        environment |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom):
            return zeros.literal(atom) if hasattr(atom, 'val') else environment[atom]

        for eqn in jaxpr.eqns:
            results = self.step(eqn, [read(atom) for atom in eqn.invars], times)
            environment |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn, values: list[Value], times: int) -> list[Value]:
        name = eqn.primitive.name
        if name in jaxprs.PRODUCTS:
            self.product(eqn, values, jaxprs.uses(eqn), times)
        elif name == 'scan':
            return self.scan(eqn, values, times)
        elif name == 'while':
            inner = [jaxprs.body(eqn.params[key]) for key in ('cond_jaxpr', 'body_jaxpr')]
            if any(jaxprs.has_products(jaxpr) for jaxpr in inner):
                raise ValueError('operations: products stand in a while_loop, which has no known number of rounds: use lax.scan.')
        elif name == 'cond':
            self.branches(eqn, values[1:], times)
        elif (called := jaxprs.called(eqn)) is not None:
            inner = jaxprs.body(called)
            return self.walk(inner, values[len(values) - len(inner.invars) :], times, zeros.constants(called))
        return zeros.follow(eqn, values)

    def product(self, eqn, values, uses: tuple[Any, Any, int], times: int) -> None:
        """Counts a product; `uses` tells how often each entry of the left and the right operand is used, and all multiply-adds."""
        left_use, right_use, total = uses
        left, right = values
        masked, other, use = (right, left, right_use) if right.parts else (left, right, left_use)
        if lost := left.lost or right.lost:
            raise ValueError(
                f'operations: {lost[0]} reaches a product through {lost[1]!r}, through which its zeros are not followed: use slices '
                f'with fixed bounds, split, reshapes, transpositions or lax.scan; or count it as dense, dense=({lost[0]!r},).'
            )
        count = lambda entries: times * int((entries * use).sum(dtype=np.int64))
        rest = times * total  # of entries that are no masked leaf's
        for part in masked.parts:
            row = self.layers[part.name]
            forward, dense = count(part.mask), times * total if part.region is None else count(part.region)
            row[0] += forward
            row[1] += dense
            row[2] += forward * other.depends
            row[3] += dense * other.depends
            rest -= dense
        self.other_forward += rest
        self.other_backward += rest * (left.depends + right.depends)

    def scan(self, eqn, values, times):
        jaxpr, length, num_consts, num_carry = jaxprs.scan(eqn)
        consts, carry, rows = values[:num_consts], values[num_consts : num_consts + num_carry], values[num_consts + num_carry :]
        carry = [Value((), v.depends, v.lost) for v in carry]
        done = 0
        while done < length:
            slices = [v._replace(parts=zeros.mapped(v.parts, lambda mask, row=done: mask[row]), constant=None) for v in rows]
            before = [v.depends for v in carry]
            # once an iteration changes nothing in what the carry depends on, and no masks are scanned, the remaining ones are like it
            probe = _Counter()
            probe.layers = {name: [0] * 5 for name in self.layers}
            out = probe.walk(jaxpr, consts + carry + slices, 0)[:num_carry]
            same = before == [v.depends or b for v, b in zip(out, before, strict=True)]
            iterations = length - done if same and not any(v.parts for v in rows) else 1
            self.walk(jaxpr, consts + carry + slices, times * iterations)
            carry = [Value((), v.depends or b) for v, b in zip(out, before, strict=True)]
            done += iterations
        return [Value((), any(v.depends for v in values))] * len(eqn.outvars)

    def branches(self, eqn, values, times):
        """Counts the branch of a condition that has the most multiply-adds."""
        best: tuple[int, _Counter] | None = None
        for branch in eqn.params['branches']:
            counter = _Counter()
            counter.layers = {name: [0, 0, 0, 0, row[4]] for name, row in self.layers.items()}
            counter.walk(jaxprs.body(branch), values, times)
            total = counter.other_forward + sum(row[1] for row in counter.layers.values())
            if best is None or total > best[0]:
                best = total, counter
        assert best is not None
        counter = best[1]
        self.other_forward += counter.other_forward
        self.other_backward += counter.other_backward
        for name, row in counter.layers.items():
            counts = self.layers[name]
            self.layers[name] = [a + b for a, b in zip(counts[:4], row[:4], strict=True)] + [row[4]]
