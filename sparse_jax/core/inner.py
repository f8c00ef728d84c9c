"""What an optimizer does, read from its program: where its momentum is, what it freezes, and whether it keeps weights of its own.

The type of a state does not tell: optax's Adam and ADOPT have the same one, and LARS keeps a trace of updates that it has scaled layer by
layer. So the optimizer is traced, by shapes alone, and its program is followed from every input to every output.
"""

import functools
import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from sparse_jax.core import momentum as momentum_lib
from sparse_jax.core.layers import Layer
from sparse_jax.core.momentum import MomentumOption

# optax optimizers that no state of arrays gives away: the type of their state, and what is wrong with them
_REFUSED = {
    'LookaheadState': 'optax.lookahead is not supported: its slow weights are not sparse. Wrap its fast optimizer alone.',
    'SAMState': 'optax.contrib.sam takes gradients at weights of its own, which are not sparse. Take them so in your loss, and wrap '
    'the optimizer inside.',
    'ScaleByZoomLinesearchState': 'a line search evaluates the loss at weights that are not sparse: optax.lbfgs(linesearch=None) does '
    'without.',
    'ScaleByBacktrackingLinesearchState': 'a line search evaluates the loss at weights that are not sparse. Wrap the optimizer '
    'without it.',
    'DifferentiallyPrivateAggregateState': 'gradients of single examples are aggregated before sparsify: '
    'optax.chain(optax.contrib.differentially_private_aggregate(...), sj.sparsify(...)).',
}


class Facts(NamedTuple):
    """What is known of an optimizer for params of some shapes."""

    momentum: MomentumOption  # for momentum.find
    frozen: tuple[int, ...]  # leaves of the params whose update depends on nothing
    own_weights: str  # the part of its state that holds weights of its own, which move off the masks; '' where there is none
    refused: str = ''  # why it cannot be wrapped
    states: tuple[Any, ...] = ()  # the trees of its state, new and after a step, as far as they are known


def facts(inner: optax.GradientTransformationExtraArgs, params: Any) -> Facts:
    """Reads an optimizer's program, once for each tree of params.

    Its momentum is ``'mu'`` where the program divides by the root of ``nu`` before the average (ADOPT), and ``'gradient_average'``
    where layers are scaled one by one before it (LARS, NovoGrad), which says nothing of their shares, or where ``mu`` and ``nu`` are
    kept by a program that cannot be read, as it takes arguments of its own (Sophia).

    >>> params = {'w': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
    >>> optimizers = optax.adam(0.1), optax.contrib.adopt(0.1), optax.lars(0.1)
    >>> [facts(optax.with_extra_args_support(tx), params).momentum for tx in optimizers]
    [None, 'mu', 'gradient_average']
    """
    leaves, treedef = jax.tree.flatten(jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params))
    if not leaves:  # optax's placeholders
        return Facts(None, (), '')
    known = _KNOWN.setdefault(inner.update, {})
    key = treedef, tuple(leaves)
    if key not in known:
        with jax.disable_jit(False):
            known[key] = _read(inner, jax.tree.unflatten(treedef, leaves))
    return known[key]


_KNOWN: weakref.WeakKeyDictionary[Any, dict[Any, Facts]] = weakref.WeakKeyDictionary()


def _read(inner: optax.GradientTransformationExtraArgs, params: Any) -> Facts:
    try:
        init, state = jax.make_jaxpr(inner.init, return_shape=True)(params)
    except Exception:  # it asks for values
        return Facts('gradient_average', (), '')
    tree, refused = jax.tree.structure(state), _refusal(state)
    num_params, num_state = len(jax.tree.leaves(params)), len(jax.tree.leaves(state))
    copies = [i for i, bits in enumerate(_reach(init.jaxpr)) if bits & _elementwise(num_params)]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    fields = momentum_lib.fields_in(jax.tree.unflatten(tree, range(num_state)), jax.tree.structure(params))
    try:
        update, (_, after) = jax.make_jaxpr(inner.update, return_shape=True)(params, state, params)
    except Exception:  # it takes arguments of its own
        option = 'gradient_average' if any({'mu', 'nu'} <= field.keys() for field in fields) else None
        return Facts(option, (), names[copies[0]] if copies else '', refused, (tree,))
    reach = _reach(update.jaxpr)
    updates, states = reach[:num_params], reach[num_params:]
    frozen = tuple(i for i, bits in enumerate(updates) if not bits)
    if jax.tree.structure(after) != tree:
        return Facts(None, frozen, '', refused, (tree, jax.tree.structure(after)))
    own = ''
    for i in copies:
        itself = 1 << 2 * (num_params + i)
        is_start, is_remembered = states[i] == itself, bool(states[i] & itself)
        # a start may tell how far the weights have come (DoG), but not where they are to be (COCOB)
        if any(bits & itself for bits in updates) if is_start else is_remembered:
            own = own or names[i]
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)], [leaf.shape for leaf in jax.tree.leaves(params)]
    return Facts(_momentum(fields, states, *shapes), frozen, own, refused, (tree,))


def _momentum(fields: list[dict[str, Any]], states: list[int], shapes: list[tuple], of_params: list[tuple]) -> MomentumOption:
    """The option for ``momentum.find``, from what reaches each leaf of the new state; the fields hold the numbers of its leaves."""
    num_params = len(of_params)
    gradients = 2 * _elementwise(num_params)  # through a reduction
    fields = [field for field in fields if 'trace' in field or 'mu' in field]
    for field in fields if len(fields) == 1 else ():  # of several none is taken
        name = 'trace' if 'trace' in field else 'mu'
        for k, i in enumerate(jax.tree.leaves(field.get(name))):
            if num_params > 1 and states[i] & gradients == 2 << 2 * k:  # of its own gradient alone
                return 'gradient_average'
        if name == 'mu' and 'mu' in field and 'nu' in field:
            mu, nu = jax.tree.leaves(field['mu']), jax.tree.leaves(field['nu'])
            if [shapes[i] for i in nu] != of_params:
                return 'gradient_average'  # one nu a layer
            of_nu = sum(3 << 2 * (num_params + i) for i in nu)
            if any(states[i] & of_nu for i in mu):
                return 'mu'
    return None


def _refusal(state: Any) -> str:
    refused = lambda x: type(x).__name__ in _REFUSED and type(x).__module__.startswith('optax')
    return next((_REFUSED[type(x).__name__] for x in jax.tree.leaves(state, is_leaf=refused) if refused(x)), '')


def check(inner: optax.GradientTransformationExtraArgs, params: Any, layers: Sequence[Layer]) -> None:
    """Refuses an optimizer whose weights would not be sparse, or that would never train one of these layers, whose masks move."""
    known = facts(inner, params)
    if known.refused:
        raise ValueError(f'inner: {known.refused}')
    if known.own_weights:
        raise ValueError(
            f'inner keeps weights of its own, in {known.own_weights} of its state, and moves them where there is no mask: its network '
            'would not be sparse. Wrap an optimizer that computes updates for the params it is given.'
        )
    frozen = [layer.name for layer in layers if layer.leaf in known.frozen]
    if frozen:
        raise ValueError(
            f'inner never changes {", ".join(frozen)} (optax.set_to_zero), whose mask would move: pruned weights would be lost, and '
            f"new ones stay zero. Keep frozen leaves dense, dense={tuple(frozen)!r}, or leave them out: optax.partition({{'trained': "
            "sj.sparsify(...), 'frozen': optax.set_to_zero()}, labels)."
        )


def check_state(
    inner: optax.GradientTransformationExtraArgs, state: Any, grads: Any, params: Any, extra_args: dict[str, Any]
) -> None:
    """Refuses the state of another optimizer, where this one cannot go on with it."""
    expected, given = facts(inner, params).states, jax.tree.structure(state)
    if not expected or given in expected:
        return
    error = None
    if given.num_leaves in [tree.num_leaves for tree in expected]:  # static parts of a state may change
        try:
            jax.eval_shape(lambda *args: inner.update(*args, **extra_args), grads, state, params)
            return
        except Exception as failed:
            error = failed
    raise ValueError(
        f'state is of another optimizer: its inner_state is {given}, but init of this one makes {expected[0]}.'
    ) from error


# --- which inputs of a program reach which outputs: bit 2k says that input k does so element by element, bit 2k + 1 through a reduction

_REDUCTIONS = (
    'reduce_sum',
    'reduce_max',
    'reduce_min',
    'reduce_prod',
    'reduce_and',
    'reduce_or',
    'argmax',
    'argmin',
    'dot_general',
)


def _elementwise(number: int) -> int:
    """The bits of the first inputs, element by element."""
    return (4**number - 1) // 3


def _reach(jaxpr: Any) -> list[int]:
    """What reaches each output of a program."""
    return _follow(jaxpr, [1 << 2 * k for k in range(len(jaxpr.invars))], _elementwise(len(jaxpr.invars)))


def _follow(jaxpr: Any, inputs: Sequence[int], even: int) -> list[int]:
    reach = dict(zip(jaxpr.invars, inputs, strict=True))
    of = lambda x: 0 if isinstance(x, Literal) else reach.get(x, 0)
    for eqn in jaxpr.eqns:
        reach.update(zip(eqn.outvars, _through(eqn, [of(x) for x in eqn.invars], even), strict=True))
    return [of(x) for x in jaxpr.outvars]


def _through(eqn: Any, inputs: list[int], even: int) -> list[int]:
    name, called = eqn.primitive.name, eqn.params.get('jaxpr', eqn.params.get('call_jaxpr'))
    everything = functools.reduce(operator.or_, inputs, 0)
    if name == 'cond':
        branches = [_follow(branch.jaxpr, inputs[1:], even) for branch in eqn.params['branches']]
        return [functools.reduce(operator.or_, outputs, inputs[0]) for outputs in zip(*branches, strict=True)]
    called = getattr(called, 'jaxpr', called)
    if name not in ('scan', 'while') and called is not None and len(called.invars) == len(inputs):
        return _follow(called, inputs, even)
    if name in _REDUCTIONS:
        everything = (everything & even) << 1 | everything & even << 1
    return [everything] * len(eqn.outvars)
