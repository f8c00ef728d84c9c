"""What sparsify is given: one clear error for each thing that cannot work."""

import inspect
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.core import errors, schedules
from sparse_jax.core.criteria import signed_magnitude


def check(density, update_every, total_steps, prune_rate, start_step, stop_step, seed):
    """One clear error for each argument that cannot work."""
    static = dict(density=density, update_every=update_every, total_steps=total_steps, start_step=start_step, stop_step=stop_step)
    for name, value in static.items():
        if isinstance(value, jax.Array):
            raise ValueError(
                f'{name} must be a Python number, but is a jax array: it decides shapes and counts. Under optax.inject_hyperparams '
                'inject into the inner optimizer, sparsify(inject_hyperparams(optax.sgd)(learning_rate=...), ...), or name every '
                'argument but the learning rate in static_args.'
            )
    if not is_key(seed) and not isinstance(seed, numbers.Integral):
        raise ValueError(f'seed={seed!r}: must be an integer, or a typed random key such as jax.random.key(0).')
    if not callable(density) and (not isinstance(density, numbers.Real) or not 0 < float(density) <= 1):
        raise ValueError(
            f'density={density!r}: must be a number in (0, 1], the share of the weights that exist, or a schedule of the step.'
        )
    for name, least in {'update_every': 1, 'total_steps': 1, 'start_step': 0}.items():
        if not isinstance(static[name], numbers.Integral) or static[name] < least:
            raise ValueError(f'{name}={static[name]!r}: must be an integer, at least {least} (in steps).')
    if stop_step is not None and (not isinstance(stop_step, numbers.Integral) or stop_step < 0):
        raise ValueError(f'stop_step={stop_step!r}: must be an integer, at least 0 (in steps), or None for total_steps.')
    if not callable(prune_rate) and not (isinstance(prune_rate, numbers.Real) and 0 <= float(prune_rate) <= 1):
        raise ValueError(f'prune_rate={prune_rate!r}: must be in [0, 1], or a schedule of the step.')


def check_functions(inner, sparsifiable, stacked):
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(f'inner={inner!r}: must be an optax transformation, such as optax.adam(1e-3).')
    for name, function in {'sparsifiable': sparsifiable, 'stacked': stacked}.items():
        if function is not None and not callable(function):
            raise ValueError(
                f'{name}={function!r}: must be a function (path, leaf) -> bool, or None. Patterns of leaves that stay dense: dense=.'
            )


def check_criteria(**criteria):
    """That each criterion is a function of one argument."""
    for setting, criterion in criteria.items():
        if criterion is None:
            if setting == 'prune':
                raise ValueError("prune=None: there must be a criterion, such as 'magnitude'. A fixed mask has grow=None instead.")
            continue
        try:
            inspect.signature(criterion).bind(None)
        except TypeError:
            raise ValueError(
                f'{setting}: a criterion is a function of one argument, def {getattr(criterion, "__name__", "criterion")}(info: '
                f'sj.criteria.LeafInfo), but {criterion} has the signature {inspect.signature(criterion)}.'
            ) from None


def check_rule(prune, prune_scope, update_every, accumulated_steps, dense):
    if prune_scope not in ('layer', 'global'):
        raise errors.unknown('prune_scope', prune_scope, ['layer', 'global'])
    if accumulated_steps > update_every:
        raise ValueError(
            f'grow: gradients are accumulated over {accumulated_steps} steps, but masks are updated every {update_every}: '
            f'accumulate over at most update_every steps.'
        )
    if isinstance(dense, str) or not isinstance(dense, Sequence) or not all(isinstance(d, str) for d in dense):
        raise ValueError(f"dense={dense!r}: must be a sequence of path patterns, such as ('out/*',).")
    if prune_scope == 'global' and prune is signed_magnitude:
        raise ValueError("prune='signed_magnitude' ranks the weights of one layer: it does not go with prune_scope='global'.")


def check_density_schedule(density, *, can_grow, update_every, total_steps, start_step, stop_step) -> tuple[float, float]:
    """Checks a density schedule at 0 and at every update; returns the density after the last one, and the least."""
    steps = [
        t
        for t in range(0, total_steps, update_every)
        if t == 0
        or schedules.is_update(t, update_every=update_every, total_steps=total_steps, start_step=start_step, stop_step=stop_step)
    ]
    values = schedules.densities(density, np.array(steps))
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
    return float(values[-1]), float(values.min())


def is_key(x):
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_lookahead(x):
    return isinstance(x, optax.LookaheadState)


def check_params(params, masks):
    if jax.tree.structure(params) != jax.tree.structure(masks):
        raise ValueError(
            f'params has the tree {jax.tree.structure(params)}, but init was given {jax.tree.structure(masks)}: update must be given '
            'the params (or their shapes) that init was given.'
        )
    for (path, param), mask in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(masks), strict=True):
        if mask.ndim and mask.shape != param.shape:
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            raise ValueError(f'params: {name} has the shape {param.shape}, but at init it had {mask.shape}.')
