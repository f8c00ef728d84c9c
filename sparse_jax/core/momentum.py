"""The momentum of any optimizer: found in its state, by field and never by a parameter's name, or kept beside it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

EPSILON = 1e-8
_AVERAGE_DECAY = 0.9  # of the gradient average that stands in for a missing momentum

MomentumOption = str | Callable[[Any], Any] | None


def _is_namedtuple(x) -> bool:
    return isinstance(x, tuple) and hasattr(x, '_fields')


def _namedtuples(state, treedef) -> Iterator[Any]:
    """All NamedTuples in an optimizer state, without looking into trees of parameters (which may be NamedTuples too)."""
    if jax.tree.structure(state) == treedef:
        return
    if _is_namedtuple(state):
        yield state
    if isinstance(state, (tuple, list)):
        children = state
    elif isinstance(state, dict):
        children = state.values()
    else:
        return
    for child in children:
        yield from _namedtuples(child, treedef)


def find(inner_state: Any, treedef: Any, momentum: MomentumOption = None) -> Any | None:
    r"""The momentum that an optimizer keeps for every parameter, dense, with its sign.

    Looked for are the fields of the state's NamedTuples whose tree is the parameters': ``trace`` (SGD with momentum, RMSProp with
    momentum), Adam's ``mu`` as :math:`\mu / (\sqrt{\nu} + 10^{-8})` where the same NamedTuple has ``nu``, and ``mu`` alone (Lion). Where
    ``mu`` is an average of gradients that were divided by the root of ``nu`` already (ADOPT), name it: ``'mu'``. ``sparsify`` finds that
    out from the optimizer.

    Args:
      inner_state: an optax optimizer's state.
      treedef: the parameters' tree structure.
      momentum: name of the NamedTuple field to take as it is, or a function of the inner state that returns the momentum tree;
        ``'gradient_average'``: none of them.

    Returns:
      A tree of the parameters' structure, or None where the state has no such field, or several.

    Raises:
      ValueError: if ``momentum`` names a field that does not exist or is ambiguous, or its function's tree is not the parameters'.

    Example:
      >>> import optax
      >>> params = {'mu': jnp.ones(2), 'w': jnp.ones(3)}
      >>> state = optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)).init(params)
      >>> find(state, jax.tree.structure(params))['w'].tolist()
      [0.0, 0.0, 0.0]
      >>> find(optax.sgd(0.1).init(params), jax.tree.structure(params)) is None
      True
    """
    candidates = _candidates(inner_state, treedef, momentum)
    return candidates[0]() if len(candidates) == 1 else None


def is_found(inner_state: Any, treedef: Any, momentum: MomentumOption = None) -> bool:
    """Whether :func:`find` finds one; it computes nothing."""
    return len(_candidates(inner_state, treedef, momentum)) == 1


def _candidates(inner_state: Any, treedef: Any, momentum: MomentumOption) -> list[Callable[[], Any]]:
    """What may be the momentum, each as a function that computes it."""
    if momentum == 'gradient_average':
        return []
    if callable(momentum):
        tree = momentum(inner_state)
        if jax.tree.structure(tree) != treedef:
            raise ValueError(
                f'momentum: the function given must return a tree like the params, {treedef}, but returned '
                f'{jax.tree.structure(tree)}.'
            )
        return [lambda: tree]
    candidates = []
    for fields in fields_in(inner_state, treedef):
        if momentum is not None:
            candidates += [functools.partial(fields.get, momentum)] if momentum in fields else []
        elif 'trace' in fields:
            candidates.append(functools.partial(fields.get, 'trace'))
        elif 'mu' in fields and 'nu' in fields:
            candidates.append(functools.partial(_normalized, fields['mu'], fields['nu']))
        elif 'mu' in fields:
            candidates.append(functools.partial(fields.get, 'mu'))
    if momentum is not None and len(candidates) != 1:
        raise ValueError(
            f"momentum={momentum!r} names {len(candidates)} fields of the inner state whose tree is the params'; it must name exactly "
            'one. Give another field, a function of the inner state, or None to have one found.'
        )
    return candidates


def fields_in(inner_state: Any, treedef: Any) -> list[dict[str, Any]]:
    """The fields of each of a state's NamedTuples whose tree is the parameters'."""
    of = lambda state: {f: getattr(state, f) for f in state._fields if jax.tree.structure(getattr(state, f)) == treedef}
    return [of(state) for state in _namedtuples(inner_state, treedef)]


def _normalized(mu: Any, nu: Any) -> Any:
    return jax.tree.map(lambda m, n: m / (jnp.sqrt(n) + EPSILON), mu, nu)


class Read(NamedTuple):
    """What a step of the optimizer and a criterion read: trees like the params, and None where something is not kept."""

    grads: Any
    inner_state: Any
    average: Any  # of the gradients
    accumulated: Any  # gradients, summed
    ever_active: Any
    params: Any
    backward: Any = None  # masks of the weights that are trained, where these are not all


class Advanced(NamedTuple):
    """One step of the inner optimizer."""

    updates: Any
    inner_state: Any
    average: Any  # of the gradients; None: not kept
    momentum: Any


def advance(
    inner: optax.GradientTransformationExtraArgs, option: MomentumOption, read: Read, extra_args: dict[str, Any]
) -> Advanced:
    """Takes a step of the inner optimizer, and says what its momentum is."""
    within = lambda tree: tree if read.backward is None else jax.tree.map(_masked, read.backward, tree)
    updates, inner_state = inner.update(within(read.grads), read.inner_state, read.params, **extra_args)
    updates = within(updates)
    momentum = find(inner_state, jax.tree.structure(read.params), option)
    if momentum is not None or read.average is None:
        return Advanced(updates, inner_state, None, momentum)
    average = jax.tree.map(
        lambda a, g: a if a.ndim == 0 else (_AVERAGE_DECAY * a + (1 - _AVERAGE_DECAY) * g.astype(jnp.float32)).astype(a.dtype),
        read.average,
        read.grads,
    )
    return Advanced(updates, inner_state, average, average)


def _masked(mask: jax.Array, x: Any) -> Any:
    return x if mask.ndim == 0 else jnp.where(mask, x, jnp.zeros((), jnp.result_type(x)))


def accumulate(accumulated: Any, grads: Any, t: jax.Array, *, steps: int, update_every: int) -> Any:
    """The sum of the gradients of the last steps up to an update, with this step's; None where none is kept."""
    if accumulated is None:
        return None
    phase = (t - 1) % update_every - (update_every - steps)

    def add(a, g):
        if a.ndim == 0:
            return a
        return jnp.where(phase < 0, a, jnp.where(phase == 0, 0, a) + g.astype(jnp.float32)).astype(a.dtype)

    return jax.tree.map(add, accumulated, grads)
