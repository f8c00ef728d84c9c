"""Every transformation of optax and optax.contrib, and what becomes of it inside sparsify: tested, and the table of docs/optimizers.md.

.venv/bin/python -m tests.core.optimizers    # writes the table into the page
"""

import inspect
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparse_jax as sj
from sparse_jax.core import inner as inner_lib

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'optimizers.md'
RATE = 0.01
PARAMS = {
    'a': jax.random.normal(jax.random.key(0), (16, 16)),
    'b': jax.random.normal(jax.random.key(1), (16, 16)),
    'bias': jnp.ones(4),
}
MATRICES = {name: PARAMS[name] for name in 'ab'}
contrib = optax.contrib
_never = lambda frozen: {name: name in frozen for name in PARAMS}  # which leaves


class Case(NamedTuple):
    """How a transformation is made, and what a user should know."""

    make: Callable[[], optax.GradientTransformation]
    note: str = ''
    refused: bool = False
    extra: Callable[[Any], dict[str, Any]] = lambda grads: {}  # what its update takes beside gradients and params
    params: Any = PARAMS


def _loss(params) -> jax.Array:
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def _value(grads) -> dict[str, Any]:
    return {'value': jnp.float32(1)}


def _objective(grads) -> dict[str, Any]:
    return {'obj_fn': _loss}


_ADAM = lambda: optax.adam(RATE)
_DISTANCE = 'The distance it measures from the first weights includes those that have moved.'
_OWN_WEIGHTS = 'It computes weights from copies of its own ({}), which exist where the mask has none.'
_LINE_SEARCH = 'A line search evaluates the loss at weights that are not sparse.'
_SINGLE = 'It takes gradients of single examples: `optax.chain(contrib.differentially_private_aggregate(...), sj.sparsify(...))`.'
_LAYERWISE = 'Its own momentum is scaled layer by layer, which says nothing of their shares.'

CASES = {
    'optax.adaptive_grad_clip': Case(lambda: optax.adaptive_grad_clip(0.1)),
    'optax.add_noise': Case(lambda: optax.add_noise(0.01, 0.5, 0)),
    'optax.apply_if_finite': Case(lambda: optax.apply_if_finite(_ADAM(), 3)),
    'optax.chain': Case(lambda: optax.chain(optax.clip(1.0), _ADAM())),
    'optax.clip': Case(lambda: optax.clip(1.0)),
    'optax.clip_by_block_rms': Case(lambda: optax.clip_by_block_rms(1.0)),
    'optax.clip_by_global_norm': Case(lambda: optax.clip_by_global_norm(1.0)),
    'optax.conditionally_mask': Case(lambda: optax.conditionally_mask(_ADAM(), lambda step: step < 100)),
    'optax.conditionally_transform': Case(lambda: optax.conditionally_transform(_ADAM(), lambda step: step < 100)),
    'optax.ema': Case(lambda: optax.ema(0.9)),
    'optax.flatten': Case(lambda: optax.flatten(_ADAM())),
    'optax.freeze': Case(lambda: optax.freeze(_never(['bias'])), 'Refused where it freezes a sparse leaf, as `set_to_zero`.'),
    'optax.inject_hyperparams': Case(lambda: optax.inject_hyperparams(optax.adam)(RATE)),
    'optax.inject_stateful_hyperparams': Case(
        lambda: optax.inject_hyperparams(optax.adam)(RATE), 'Deprecated by optax: `inject_hyperparams`.'
    ),
    'optax.lars': Case(lambda: optax.lars(RATE), _LAYERWISE),
    'optax.lbfgs': Case(
        lambda: optax.lbfgs(RATE, linesearch=None),
        'With `linesearch=None`; otherwise refused. Its memory spans mask updates.',
    ),
    'optax.lookahead': Case(lambda: optax.lookahead(_ADAM(), 5, 0.5), 'Its slow weights are not sparse.', refused=True),
    'optax.masked': Case(lambda: optax.masked(_ADAM(), _never(PARAMS))),
    'optax.measure_with_ema': Case(
        lambda: optax.chain(optax.monitor({'norm': optax.measure_with_ema(optax.tree.norm, 0.9)}), _ADAM()), 'In `optax.monitor`.'
    ),
    'optax.monitor': Case(lambda: optax.chain(optax.monitor({'norm': optax.tree.norm}), _ADAM())),
    'optax.named_chain': Case(lambda: optax.named_chain(('adam', _ADAM()))),
    'optax.novograd': Case(lambda: optax.novograd(RATE), _LAYERWISE),
    'optax.noisy_sgd': Case(lambda: optax.noisy_sgd(RATE, key=0)),
    'optax.optimistic_adam': Case(lambda: optax.optimistic_adam_v2(RATE), 'Deprecated by optax: `optimistic_adam_v2`.'),
    'optax.partition': Case(
        lambda: optax.partition({'x': _ADAM(), 'y': optax.sgd(RATE)}, {'a': 'x', 'b': 'x', 'bias': 'y'}),
    ),
    'optax.polyak_sgd': Case(optax.polyak_sgd, extra=_value),
    'optax.scale': Case(lambda: optax.scale(-RATE)),
    'optax.scale_by_backtracking_linesearch': Case(lambda: optax.scale_by_backtracking_linesearch(5), _LINE_SEARCH, refused=True),
    'optax.scale_by_lbfgs': Case(optax.scale_by_lbfgs, 'Its memory spans mask updates.'),
    'optax.scale_by_novograd': Case(optax.scale_by_novograd, _LAYERWISE),
    'optax.scale_by_polyak': Case(optax.scale_by_polyak, extra=_value),
    'optax.scale_by_schedule': Case(lambda: optax.scale_by_schedule(lambda step: -RATE)),
    'optax.scale_by_zoom_linesearch': Case(lambda: optax.scale_by_zoom_linesearch(5), _LINE_SEARCH, refused=True),
    'optax.selective_transform': Case(lambda: optax.selective_transform(_ADAM(), freeze_mask=_never(['bias'])), 'As `freeze`.'),
    'optax.set_to_zero': Case(
        optax.set_to_zero,
        'Refused where masks move: a frozen leaf is kept dense (`dense=`), or left to `optax.partition`.',
        refused=True,
    ),
    'optax.snapshot': Case(lambda: optax.chain(optax.snapshot('norm', optax.tree.norm), _ADAM())),
    'optax.stateless': Case(lambda: optax.stateless(lambda updates, params: jax.tree.map(lambda u: -RATE * u, updates))),
    'optax.stateless_with_tree_map': Case(lambda: optax.stateless_with_tree_map(lambda u, p: -RATE * u)),
    'optax.trace': Case(lambda: optax.trace(0.9)),
    'optax.with_extra_args_support': Case(lambda: optax.with_extra_args_support(_ADAM())),
    'optax.contrib.cocob': Case(contrib.cocob, _OWN_WEIGHTS.format('`init_particles`'), refused=True),
    'optax.contrib.differentially_private_aggregate': Case(
        lambda: contrib.differentially_private_aggregate(1.0, 0.1, jax.random.key(0)), _SINGLE, refused=True
    ),
    'optax.contrib.dog': Case(contrib.dog, _DISTANCE),
    'optax.contrib.dowg': Case(contrib.dowg, _DISTANCE),
    'optax.contrib.dpsgd': Case(  # what it is made of: dpsgd itself warns of an argument that it passes on
        lambda: optax.chain(contrib.differentially_private_aggregate(1.0, 0.1, jax.random.key(0)), optax.sgd(RATE)),
        _SINGLE,
        refused=True,
    ),
    'optax.contrib.galore': Case(lambda: contrib.galore(RATE, rank=4)),
    'optax.contrib.hutchinson_estimator_diag_hessian': Case(
        lambda: contrib.hutchinson_estimator_diag_hessian(jax.random.key(0)), extra=_objective
    ),
    'optax.contrib.madgrad': Case(lambda: contrib.madgrad(RATE), _OWN_WEIGHTS.format('`x0`'), refused=True),
    'optax.contrib.mechanize': Case(lambda: contrib.mechanize(_ADAM()), _OWN_WEIGHTS.format('`x0`'), refused=True),
    'optax.contrib.momo': Case(contrib.momo, extra=_value),
    'optax.contrib.momo_adam': Case(contrib.momo_adam, extra=_value),
    'optax.contrib.prodigy': Case(contrib.prodigy, _DISTANCE),
    'optax.contrib.reduce_on_plateau': Case(contrib.reduce_on_plateau, extra=_value),
    'optax.contrib.sam': Case(
        lambda: contrib.sam(optax.sgd(RATE), contrib.normalize()),
        'It takes gradients at weights that are not sparse.',
        refused=True,
    ),
    'optax.contrib.scale_by_cocob': Case(contrib.scale_by_cocob, _OWN_WEIGHTS.format('`init_particles`'), refused=True),
    'optax.contrib.scale_by_galore': Case(lambda: contrib.scale_by_galore(rank=4)),
    'optax.contrib.scale_by_madgrad': Case(lambda: contrib.scale_by_madgrad(RATE), _OWN_WEIGHTS.format('`x0`'), refused=True),
    'optax.contrib.scale_by_muon': Case(
        lambda: contrib.scale_by_muon(weight_dimension_numbers=dict.fromkeys(MATRICES, contrib.MuonDimensionNumbers())),
        'For matrices only, as outside; `muon` takes any leaf.',
        params=MATRICES,
    ),
    'optax.contrib.schedule_free': Case(lambda: contrib.schedule_free(_ADAM(), RATE), _OWN_WEIGHTS.format('`z`'), refused=True),
    'optax.contrib.schedule_free_adamw': Case(contrib.schedule_free_adamw, _OWN_WEIGHTS.format('`z`'), refused=True),
    'optax.contrib.schedule_free_sgd': Case(contrib.schedule_free_sgd, _OWN_WEIGHTS.format('`z`'), refused=True),
    'optax.contrib.sophia': Case(lambda: contrib.sophia(RATE), extra=_objective),
    'optax.contrib.split_real_and_imaginary': Case(lambda: contrib.split_real_and_imaginary(_ADAM())),
}
WITH_MOMENTUM = {
    'optax.rmsprop(momentum=0.9)': Case(lambda: optax.rmsprop(RATE, momentum=0.9)),
    'optax.sgd(momentum=0.9)': Case(lambda: optax.sgd(RATE, 0.9)),
}


# functions whose signature does not say what they return
_SAY_NOTHING = 'scale_by_factored_rms', 'monitor', 'dog', 'dowg', 'hutchinson_estimator_diag_hessian'


def public() -> dict[str, Callable]:
    """All functions of optax and optax.contrib that make a transformation, by name."""
    found = {}
    for prefix, module in (('optax', optax), ('optax.contrib', contrib)):
        for name, function in vars(module).items():
            if name.startswith('_') or not inspect.isfunction(function) or name == 'multi_transform':  # partition's old name
                continue
            returns = str(inspect.signature(function).return_annotation)
            if 'GradientTransformation' in returns or name in _SAY_NOTHING:
                found[f'{prefix}.{name}'] = function
    return found


def _default(function: Callable) -> Case:
    """A transformation that needs nothing but a learning rate or a decay."""
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return Case(lambda: function(*[RATE] * len(required)))


def cases() -> dict[str, Case]:
    """All of them, in alphabetical order."""
    made = {name: CASES.get(name) or _default(function) for name, function in public().items()} | WITH_MOMENTUM
    return dict(sorted(made.items()))


def momentum_of(case: Case) -> str:
    """What growth reads: the optimizer's own momentum, or an average of the gradients."""
    tx = optax.with_extra_args_support(case.make())
    option, state = inner_lib.facts(tx, case.params).momentum, tx.init(case.params)
    if sj.momentum.find(state, jax.tree.structure(case.params), option) is None:
        return 'average of gradients'
    named = {field for node in jax.tree.leaves(state, is_leaf=_has_fields) if _has_fields(node) for field in node._fields}
    if 'trace' in named:
        return '`trace`'
    return '`mu`' if option == 'mu' or 'nu' not in named else '`mu / sqrt(nu)`'


def _has_fields(node: Any) -> bool:
    return hasattr(node, '_fields') and {'trace', 'mu'} & set(node._fields) != set()


def table() -> str:
    """The page's table."""
    lines = ['| transformation | inside `sparsify` | momentum that growth reads | note |', '|---|---|---|---|']
    for name, case in cases().items():
        verdict = '**refused**' if case.refused else 'works'
        momentum = '' if case.refused else momentum_of(case)
        lines.append(f'| `{name}` | {verdict} | {momentum} | {case.note} |'.replace('  |', ' |'))
    return '\n'.join(lines)


def page_with(text: str) -> str:
    """The page with this table in place of its own."""
    start, end = '<!-- table -->\n', '\n<!-- end of table -->'
    page = PAGE.read_text()
    return page[: page.index(start) + len(start)] + text + page[page.index(end) :]


if __name__ == '__main__':
    PAGE.write_text(page_with(table()))
