"""What sparsify is given: one clear error for each thing that cannot work."""

import numbers

import jax
import jax.numpy as jnp
import optax


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
    if not isinstance(density, numbers.Real) or not 0 < float(density) <= 1:
        raise ValueError(f'density={density!r}: must be a number in (0, 1], the share of the weights that exist.')
    for name, least in {'update_every': 1, 'total_steps': 1, 'start_step': 0}.items():
        if not isinstance(static[name], numbers.Integral) or static[name] < least:
            raise ValueError(f'{name}={static[name]!r}: must be an integer, at least {least} (in steps).')
    if stop_step is not None and (not isinstance(stop_step, numbers.Integral) or stop_step < 0):
        raise ValueError(f'stop_step={stop_step!r}: must be an integer, at least 0 (in steps), or None for total_steps.')
    if isinstance(prune_rate, numbers.Real) and not 0 <= float(prune_rate) <= 1:
        raise ValueError(f'prune_rate={prune_rate!r}: must be in [0, 1], or a schedule of the step.')


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
