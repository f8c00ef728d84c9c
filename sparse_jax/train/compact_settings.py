"""What settings make of a training with compact storage, and which of them do not go together with it."""

import functools
from typing import Any

import jax

from sparse_jax import config as config_lib
from sparse_jax.compact import tree
from sparse_jax.compact.plan import check_rule, reads_scores
from sparse_jax.core import criteria, references
from sparse_jax.core.rule import Rule
from sparse_jax.kernels import backend
from sparse_jax.train import compact_step, starting_masks
from sparse_jax.train import step as step_lib

_STORAGE = "config.sparsity.storage='compact'"
_OF_ONE_STEP = (criteria.gradient, criteria.taylor, criteria.magnitude_and_gradient, criteria.mean_gradient)


def check(config: config_lib.Config, rule: Rule | None) -> None:
    """Raises ValueError for settings that compact storage cannot take; rule: None for the dense twin."""
    sparsity = config.sparsity
    if rule is None:
        raise ValueError(f"{_STORAGE}: sparsity.method='dense' has no sparse layers: leave it at 'dense'.")
    if references.is_reference(config.model.name):
        raise ValueError(
            f"{_STORAGE}: model.name={config.model.name!r} multiplies with whole weights: take sparsity.storage='dense', or sj.compact in a "
            'loop of your own.'
        )
    if sparsity.kernels not in ('auto', *backend.COMPACT):
        raise ValueError(
            f'config.sparsity.kernels={sparsity.kernels!r} has no products with compact storage: take {", ".join(("auto", *backend.COMPACT))}.'
        )
    if config.mesh.layout != 'data' or config.mesh.rules:
        raise ValueError(
            f"{_STORAGE} has all weights on every device: take mesh.layout='data' and no mesh.rules, or sparsity.storage='dense'."
        )
    if sparsity.method in starting_masks.STARTS:
        raise ValueError(
            f"{_STORAGE}: sparsity.method={sparsity.method!r} scores the dense network: train a step of it with sparsity.storage='dense' "
            '(train.steps=1, train.schedule_steps=1), and start from that run by --init_from.'
        )
    if rule.momentum == 'gradient_average':
        raise ValueError(
            f"{_STORAGE}: sparsity.method={sparsity.method!r} keeps an average of all weights' gradients: take sparse_momentum, rigl, or "
            "sparsity.storage='dense'."
        )
    if not rule.is_fixed:
        try:
            check_rule(rule)
        except ValueError as error:
            reason = str(error).removeprefix('plan: ').partition(': train')[0]
            raise ValueError(
                f"{_STORAGE} with sparsity.method={sparsity.method!r}: {reason}: take sparsity.storage='dense'."
            ) from None
    _score(config, rule)


def _score(config: config_lib.Config, rule: Rule) -> tuple[int | None, float]:
    """What scores are: of how many steps up to an update (None: all of them, 0: there are none), and the decay of their sum in a step."""
    sparsity = config.sparsity
    if rule.is_fixed or not reads_scores(rule):
        if sparsity.groups > 1:
            raise ValueError(
                f'config.sparsity.groups={sparsity.groups} has no effect: {sparsity.method} scores no weights: leave it at 1.'
            )
        return 0, 0.0
    parts = [part for part in (rule.prune, rule.grow, rule.redistribute) if part is not None]
    kinds = {kind for part in parts if (kind := _kind(part))}
    if len(kinds) > 1:
        raise ValueError(
            f'{_STORAGE} keeps one kind of score, and sparsity.prune, grow and redistribute read {" and ".join(sorted(kinds))}: name '
            'criteria that read the same.'
        )
    steps = criteria.dense_gradient_steps(rule.grow)
    window = sparsity.dense_gradient_window if steps is None else steps
    if window == 0:
        raise ValueError(
            f'{_STORAGE} scores weights in the steps whose gradients growth reads, which are none here: redistribution and pruning cannot '
            'read them either. Take a growth by gradient or momentum with sparsity.dense_gradient_window of at least 1, or criteria that '
            'read weights only.'
        )
    momentum = config.optimizer.momentum if config.optimizer.name == 'sgd' else config.optimizer.beta1
    [kind] = kinds
    return window, {'a gradient': 0.0, 'sums of gradients': 1.0, 'a momentum': momentum}[kind]


def _kind(criterion: criteria.Criterion) -> str:
    """What a criterion reads beside weights; '' for nothing."""
    needs = criteria.requirements(criterion)
    if needs.accumulated_gradient:
        return 'sums of gradients'
    if criterion in _OF_ONE_STEP:
        return 'a gradient'
    return 'a momentum' if needs.momentum else ''


def functions(config: config_lib.Config, step: step_lib.StepSpec, rule: Rule) -> dict[str, Any]:
    """The functions of an experiment with compact storage, by their names in :class:`sparse_jax.train.state.Experiment`.

    Args:
      config: the settings, which :func:`check` has passed.
      step: of the experiment; its optimizer trains values.
      rule: of the method; its updates move one group each.
    """
    window, decay = _score(config, rule)
    kernels = config.sparsity.kernels
    spec = compact_step.CompactSpec(
        step=step,
        rule=rule,
        window=window,
        decay=decay,
        groups=config.sparsity.groups,
        implementation=None if kernels == 'auto' else kernels,
    )
    init = functools.partial(compact_step.init, spec)
    shapes = jax.eval_shape(init, jax.random.key(0))
    leaves = len(tree.compact_leaves(shapes.opt_state.layout).paths)
    if spec.groups > leaves:
        raise ValueError(
            f'config.sparsity.groups={spec.groups} is more than the {leaves} sparse layers, of which a group has one at least.'
        )
    return {
        'init': init,
        'needs_dense_gradient': spec.is_scored,
        **{
            name: functools.partial(getattr(compact_step, name), spec)
            for name in ('begin', 'train_step', 'evaluate', 'before_step', 'after_step', 'shapes_after')
        },
    }
