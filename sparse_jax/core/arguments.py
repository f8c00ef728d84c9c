"""What a rule and an update are given: one clear error for each thing that cannot work."""

import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.core import errors, schedules
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.criteria import requirements, signed_magnitude
from sparse_jax.core.distributions import uniform
from sparse_jax.core.granularity import FanIn, NOfM

_P = ParamSpec('_P')
_R = TypeVar('_R')


def stated_once(**stated_by: Sequence[str] | None) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes a function refuse keywords beside one that states them too, as one of the two would be ignored.

    Args:
      **stated_by: keyword to the keywords that it stands for; None: all but ``inner``.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def checked(*args: _P.args, **keywords: _P.kwargs) -> _R:
            given = inspect.signature(function).bind_partial(*args, **keywords).arguments
            given |= given.pop('options', {})
            for name, stated in stated_by.items():
                if given.get(name) is not None:
                    others = given.keys() - {name, 'inner'}
                    if twice := sorted(others if stated is None else others.intersection(stated)):
                        raise ValueError(f'{name}= states {", ".join(twice)} too: give one or the other.')
            return function(*args, **keywords)

        return checked

    return decorate


def check_numbers(density, prune_rate, seed):
    """Checks a density, a prune rate and a seed."""
    schedules.refuse_arrays(density=density)
    if not is_key(seed) and not isinstance(seed, numbers.Integral):
        raise ValueError(f'seed={seed!r}: must be an integer, or a typed random key such as jax.random.key(0).')
    if not is_key(seed) and not -(2**63) <= int(seed) < 2**63:
        raise ValueError(f'seed={seed!r}: must be an integer of 64 bits, in [-2^63, 2^63).')
    for name, value in {'density': density, 'prune_rate': prune_rate}.items():
        if callable(value):
            errors.check_takes(name, value, '(step) -> number')
    if not callable(density) and (not isinstance(density, numbers.Real) or not 0 < float(density) <= 1):
        raise ValueError(
            f'density={density!r}: must be a number in (0, 1], the share of the weights that exist, or a schedule of the step.'
        )
    if not callable(prune_rate) and not (isinstance(prune_rate, numbers.Real) and 0 <= float(prune_rate) <= 1):
        raise ValueError(f'prune_rate={prune_rate!r}: must be in [0, 1], or a schedule of the step.')


def required(name: str, value: Any) -> Any:
    """The value; ValueError where it is missing."""
    if value is None:
        raise ValueError(f'{name} is missing: give {name}=, or rule=.')
    return value


def check_type(name: str, value: Any, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise ValueError(f'{name}={value!r}: must be a sj.{wanted.__name__}.')


def check_inner(inner):
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(f'inner={inner!r}: must be an optax transformation, such as optax.adam(1e-3).')


def check_functions(**functions):
    """Checks that each is a function (path, leaf) -> bool, or None."""
    for name, function in functions.items():
        if function is None:
            continue
        if not callable(function):
            raise ValueError(
                f'{name}={function!r}: must be a function (path, leaf) -> bool, or None. Patterns of leaves that stay dense: dense=.'
            )
        errors.check_takes(name, function, '(path, leaf) -> bool')


def check_momentum(momentum):
    """Checks that it is a field's name, a function of the inner state, or None."""
    if callable(momentum):
        errors.check_takes('momentum', momentum, '(inner_state) -> tree like the params')
    elif momentum is not None and not isinstance(momentum, str):
        raise ValueError(
            f"momentum={momentum!r}: must be the name of a field, such as 'trace', a function of the inner state, 'gradient_average', "
            'or None.'
        )


def check_criteria(**criteria):
    """Checks that each criterion is a function of one argument."""
    for setting, criterion in criteria.items():
        if criterion is None:
            if setting == 'prune':
                raise ValueError("prune=None: there must be a criterion, such as 'magnitude'. A fixed mask has grow=None instead.")
            continue
        errors.check_takes(setting, criterion, '(info: sj.criteria.LeafInfo) -> scores')


def check_together(rule):
    """Checks what the parts of a rule ask of each other."""
    if rule.prune_scope not in ('layer', 'global'):
        raise errors.unknown('prune_scope', rule.prune_scope, ['layer', 'global'])
    steps, update_every = requirements(rule.prune, rule.grow, rule.redistribute).accumulated_gradient, rule.timing.update_every
    if steps > update_every and not rule.is_fixed:
        raise ValueError(
            f'grow: gradients are accumulated over {steps} steps, but masks are updated every {update_every}: '
            f'accumulate over at most update_every steps.'
        )
    dense = rule.dense
    if isinstance(dense, str) or not isinstance(dense, Sequence) or not all(isinstance(d, str) for d in dense):
        raise ValueError(f"dense={dense!r}: must be a sequence of path patterns, such as ('out/*',).")
    if not isinstance(rule.track_exploration, bool):
        raise ValueError(f'track_exploration={rule.track_exploration!r}: must be True or False.')
    if rule.is_global and rule.prune is signed_magnitude:
        raise ValueError("prune='signed_magnitude' ranks the weights of one layer: it does not go with prune_scope='global'.")


def check_structure(rule) -> None:
    """Checks that a rule can keep its masks' structure."""
    units, density = rule.granularity, rule.density
    if not isinstance(rule.ablation, numbers.Real) or isinstance(rule.ablation, bool) or not 0 <= float(rule.ablation) <= 1:
        raise ValueError(f'ablation={rule.ablation!r}: must be a part of the inputs, in [0, 1]; 0: outputs stay.')
    if rule.keep_outputs is not None and (
        isinstance(rule.keep_outputs, str) or not all(isinstance(p, str) for p in rule.keep_outputs)
    ):
        raise ValueError(f"keep_outputs={rule.keep_outputs!r}: must be a sequence of path patterns, such as ('out/*',), or None.")
    if rule.keep_outputs is not None and not rule.ablation:
        raise ValueError(f'keep_outputs={rule.keep_outputs!r} has no effect without ablation=.')
    if rule.ablation and (not isinstance(units, FanIn) or rule.redistribute is not None):
        raise ValueError(
            f"ablation={rule.ablation!r} gives an output's weights to the others of its layer: it needs granularity='fan_in' and redistribute=None; other units go with rigl."
        )
    if isinstance(units, (NOfM, FanIn)) and callable(density):
        raise ValueError(f'density: {units} go with a number, not with a schedule: take a method of constant density.')
    if isinstance(units, FanIn) and rule.is_global:
        raise ValueError(
            "prune_scope='global' would prune other numbers in each layer than granularity='fan_in' can take: leave it 'layer'."
        )
    if isinstance(units, NOfM):
        if abs(float(density) - units.n / units.m) > 1e-9:
            raise ValueError(f'density={density!r}: with {units} it is {units.n / units.m:g}: give that.')
        if rule.redistribute is not None:
            raise ValueError(
                f'redistribute: with {units} every layer keeps its density: give None, or leave it out; a method that shares growth out does not go '
                'with it.'
            )
        if rule.distribution is not uniform:
            raise ValueError(f'distribution: with {units} every layer has the density {units.n / units.m:g}: leave it out.')


def check_values(rule) -> None:
    """Checks what a rule says of the values that weights enter with."""
    if rule.enters_with not in ('zero', 'value'):
        raise errors.unknown('enters_with', rule.enters_with, ['zero', 'value'])
    if rule.enters_with == 'value' and rule.redistribute is not None:
        raise ValueError("enters_with='value' keeps the largest weights of each layer: it needs redistribute=None.")
    wider = rule.backward_density
    if wider is None:
        return
    if not isinstance(wider, numbers.Real) or isinstance(wider, bool) or callable(rule.density) or not rule.density <= wider <= 1:
        raise ValueError(
            f'backward_density={wider!r}: must be a number from density={rule.density!r}, which is constant, to 1, or None.'
        )
    if rule.enters_with != 'value':
        raise ValueError("backward_density trains weights that are not in the forward pass: it needs enters_with='value'.")
    if isinstance(rule.granularity, (NOfM, FanIn)):
        raise ValueError(f'backward_density does not go with {rule.granularity}: take single weights or blocks.')


def check_density_schedule(density: optax.Schedule, timing: schedules.Timing, *, can_grow: bool) -> None:
    """Checks a density schedule at step 0 and at every update."""
    steps = timing.steps()
    values = schedules.densities(density, steps)
    wrong = ~((values > 0) & (values <= 1))
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(f'density: the schedule is {values[i]} at step {steps[i]}; it must be in (0, 1] throughout.')
    rises = np.flatnonzero(np.diff(values) > 0)
    if not can_grow and len(rises):
        i = int(rises[0])
        raise ValueError(
            f'density: the schedule rises from {values[i]:.6g} at step {steps[i]} to {values[i + 1]:.6g} at step {steps[i + 1]}, but '
            'grow=None grows nothing: give a grow criterion, or a schedule that only falls.'
        )


def check_update_masks(rule, update_masks: Any) -> None:
    """Checks the extra argument of update: it decides what the program is, so it must be known when tracing."""
    if update_masks is not None and not isinstance(update_masks, bool):
        raise ValueError(
            f'update_masks={update_masks!r}: must be True, False or None (by the timing), a Python value that is static under jit.'
        )
    if update_masks and rule.is_fixed:
        raise ValueError('update_masks=True: this rule has grow=None and a constant density, so its masks never change.')


def is_key(x: Any) -> bool:
    """Whether x is a typed random key."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_leaves(params: Any) -> None:
    """Refuses a leaf that is no number or array."""
    for name, leaf in layers_lib.leaf_paths(params):
        if not hasattr(leaf, 'dtype') and not isinstance(leaf, numbers.Number):
            raise ValueError(
                f'params: the leaf {name!r} is {leaf!r}, not an array: take it out of the tree, as nnx.split and eqx.partition do.'
            )


def check_masks(masks: Any) -> None:
    """Refuses masks that something has computed with: they would no longer be masks."""
    if not any(mask.ndim for mask in jax.tree.leaves(masks)):
        raise ValueError('no leaf of params is sparse.')
    for name, mask in layers_lib.leaf_paths(masks):
        if mask.dtype != jnp.bool_:
            raise ValueError(
                f'the mask of {name} is {mask.dtype}, not bool: something around sparsify averages its state, as '
                'optax.lookahead(reset_state=True) does. Leave that out, or wrap the optimizer inside with it.'
            )


def check_state(state: Any, params: Any, rule: Any, needed: Sequence[str]) -> None:
    """Refuses the state of another method: it lacks what this one's criteria read, or keeps what nothing here would."""
    present, wrong = state.method_state.keys(), []
    for what, names in (('lacks', set(needed) - present), ('has', present - set(needed))):
        if names:
            wrong.append(f'its method_state {what} {", ".join(sorted(names))}')
    layers = layers_lib.layers_of_masks(params, state.masks, rule.stacked, rule.matrix_axes)
    if state.stats.share.shape != (layers[-1].stop,):
        wrong.append(f'its stats have the shape {state.stats.share.shape}, but there are {layers[-1].stop} layers (see stacked=)')
    if wrong:
        raise ValueError(
            f'state is of another transformation: {"; ".join(wrong)}. Give the state that init of this one made; '
            'sj.set_masks(tx.init(params), masks) goes on with the masks alone.'
        )


def check_gradients(grads: Any, params: Any) -> None:
    """Checks that gradients are a tree like the params."""
    if jax.tree.structure(grads) != jax.tree.structure(params):
        raise ValueError(
            f'grads has the tree {jax.tree.structure(grads)}, but params {jax.tree.structure(params)}: call tx.update(grads, state, params).'
        )
    for (name, grad), param in zip(layers_lib.leaf_paths(grads), jax.tree.leaves(params), strict=True):
        if jnp.shape(grad) != jnp.shape(param):
            raise ValueError(f'grads: {name} has the shape {jnp.shape(grad)}, but the param has {jnp.shape(param)}.')


def check_params(params: Any, masks: Any) -> None:
    """Checks that params are those that the masks were made for."""
    if params is None:
        raise ValueError('sparsify needs the current params: call tx.update(grads, state, params).')
    if jax.tree.structure(params) != jax.tree.structure(masks):
        raise ValueError(
            f'params has the tree {jax.tree.structure(params)}, but init was given {jax.tree.structure(masks)}: update must be given '
            'the params (or their shapes) that init was given.'
        )
    for (name, param), mask in zip(layers_lib.leaf_paths(params), jax.tree.leaves(masks), strict=True):
        if mask.ndim and mask.shape != param.shape:
            raise ValueError(f'params: {name} has the shape {param.shape}, but at init it had {mask.shape}.')
