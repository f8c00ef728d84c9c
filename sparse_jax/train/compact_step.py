"""A training with compact storage: its step as a pure function, and what is done on the host before and after it.

The values are ordinary params of an ordinary optimizer, and the layout in the state takes the place of patterns. In the steps whose
gradients growth reads, the state holds scores: a decayed sum of the gradients of probes, of one group of leaves. The mask update after the
step is on the host, as room may run out: plan, fits, reserve, move.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax import compact
from sparse_jax.compact import tree
from sparse_jax.compact.move import with_capacities
from sparse_jax.compact.prepare import with_lists
from sparse_jax.core.masks import UpdateStats
from sparse_jax.core.rule import Rule
from sparse_jax.runtime import memory
from sparse_jax.train import optimizer as optimizer_lib
from sparse_jax.train import step as step_lib
from sparse_jax.train.state import TrainState
from sparse_jax.train.storage import CompactState


class CompactSpec(NamedTuple):
    """What the functions of a training with compact storage are made from; static."""

    step: step_lib.StepSpec  # its optimizer trains values
    rule: Rule  # moves one group at each of its updates
    window: int | None  # steps up to an update that score units; None: all of them; 0: no criterion reads scores
    decay: float  # of the scores' sum from step to step
    groups: int  # that the sparse leaves are divided into, which take turns
    implementation: str | None  # the backend that multiplies; None: the platform's

    def is_scored(self, step: int) -> bool:
        """Whether a step scores units, by its number, 1-based: those before an update that is to come."""
        update = None if self.rule.is_fixed else self.rule.timing.next_update(step)
        return update is not None and (self.window is None or update - step < self.window)

    def group(self, step: int) -> int:
        """Which group the next update moves, a step's own included."""
        update = self.rule.timing.next_update(step) or step
        return (update // self.rule.timing.update_every - 1) % self.groups

    def scores(self, layout: Any, step: int) -> Any:
        """Zeros for the scores of the group whose turn it is: every so many-th sparse leaf."""
        chosen = set(tree.compact_leaves(layout).paths[self.group(step) :: self.groups])
        return compact.probes(layout, leaves=lambda path: path in chosen)


def _layers(layout: Any) -> list[int]:
    """Number of layers in each compact leaf."""
    return [x.pointers.shape[0] if tree.is_stacked(x) else 1 for x in tree.compact_leaves(layout).layouts]


def init(spec: CompactSpec, key: jax.Array) -> TrainState:
    """The state before the first step, bit for bit that of dense storage; a leaf at a time, so that no dense network is ever there.

    To be called on the host, or by ``jax.eval_shape``.
    """
    params_key, rng_key = jax.random.split(key)
    make = lambda: spec.step.model.init(params_key)[0]
    model_state = jax.jit(lambda: spec.step.model.init(params_key)[1])()
    values, layout = compact.init(make, spec.rule, implementation=spec.implementation)
    return _first(spec, values, layout, model_state, rng_key)


def begin(spec: CompactSpec, state: TrainState, params: Any, model_state: Any, masks: Any) -> TrainState:
    """A first state with the weights and masks of another network, given as whole arrays on the host."""
    values, layout = compact.compress(
        jax.tree.map(lambda p, m: np.where(m, p, np.zeros((), p.dtype)), params, masks),
        masks,
        granularity=spec.rule.granularity,
        stacked=spec.rule.stacked,
        capacity_factor=tree.factor_for(spec.rule),
        implementation=spec.implementation,
    )
    first = dict(tree.compact_leaves(state.opt_state.layout).named)
    room = {path: max(leaf.capacity, first[path].capacity) for path, leaf in tree.compact_leaves(layout).named}
    values, layout = with_capacities(values, layout, room)  # which shapes_after relies on
    return _first(spec, values, layout, jax.tree.map(jnp.asarray, model_state), state.rng_key)


def _first(spec: CompactSpec, values: Any, layout: Any, model_state: Any, rng_key: jax.Array) -> TrainState:
    layers = sum(_layers(layout))
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=values,
        model_state=model_state,
        opt_state=CompactState(
            layout=layout,
            inner_state=jax.jit(spec.step.tx.init)(values),
            scores=None,
            stats=UpdateStats(*(jnp.zeros(layers, dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32, jnp.int32))),
        ),
        rng_key=rng_key,
        average=jax.tree.map(jnp.copy, (values, model_state)) if spec.step.average_decay else None,
    )


def before_step(spec: CompactSpec, step: int, state: TrainState) -> TrainState:
    """Makes room for the scores where the step is the first of those that score units."""
    own = state.opt_state
    if own.scores is not None or not spec.is_scored(step):
        return state
    return state._replace(opt_state=own._replace(scores=spec.scores(own.layout, step)))


def train_step(
    spec: CompactSpec,
    state: TrainState,
    batch: Any,
    patterns: Any = None,
    *,
    dense_gradients: bool = True,
    mask_update: bool = True,
):
    """One training step; what it scores is told by the state. Arguments and results as those of :func:`sparse_jax.train.step.train_step`.

    Patterns are what kernels read beside the layout of the state, as :func:`sparse_jax.compact.prepare.lists_by_output` makes it.
    """
    del dense_gradients, mask_update
    own: CompactState = state.opt_state
    layout = with_lists(own.layout, patterns)
    rng = jax.random.fold_in(state.rng_key, state.step)
    probes = None if own.scores is None else jax.tree.map(jnp.zeros_like, own.scores)
    trained = step_lib.Trained(state.params, probes)
    (grads, scores), model_state, metrics = step_lib.mean_gradients(spec.step, trained, state.model_state, batch, rng, layout)
    if spec.step.clip_norm:
        factor = optimizer_lib.clip_factor(grads, None, spec.step.clip_norm)
        grads, scores = optimizer_lib.scaled((grads, scores), factor)
    updates, inner_state = spec.step.tx.update(grads, own.inner_state, state.params)
    params = optax.apply_updates(state.params, updates)
    own = own._replace(inner_state=inner_state, scores=_summed(spec.decay, own.scores, scores))
    return step_lib.advanced(spec.step, state, params, model_state, own), metrics


def _summed(decay: float, before: Any, scores: Any) -> Any:
    if decay == 0:
        return scores
    add = lambda a, b: (decay * a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)
    return jax.tree.map(add, before, scores)


def evaluate(spec: CompactSpec, state: TrainState, batch: Any, patterns: Any = None) -> dict[str, jax.Array]:
    """As :func:`sparse_jax.train.step.evaluate`."""
    return step_lib.evaluate(spec.step, state, batch, with_lists(state.opt_state.layout, patterns))


@functools.cache
def _planner(rule: Rule) -> Any:
    plan = lambda values, layout, scores, step: compact.plan(values, layout, scores, step, rule.first_key(), rule)
    return jax.jit(plan, compiler_options=memory.frugal_compiler_options())


_move: Any = jax.jit(compact.move, donate_argnums=0)


def after_step(spec: CompactSpec, step: int, state: TrainState) -> TrainState:
    """Updates the masks where it is time to, and drops the scores."""
    rule, own = spec.rule, state.opt_state
    if rule.is_fixed or not rule.timing.is_update(step):
        return state
    average, averaged_state = (None, None) if state.average is None else state.average
    moved, layout = (state.params, own.inner_state, average), own.layout
    memory.release()  # a plan makes large arrays, and its program is large
    plan = _planner(rule)(state.params, layout, own.scores, step)
    if not compact.fits(plan, layout):
        moved, layout = compact.reserve(moved, layout, plan)
        for program in (_planner(rule), _move):  # of shapes that will not come again
            program.clear_cache()
        plan = _planner(rule)(moved[0], layout, own.scores, step)
    params, inner_state, average = _move(moved, plan)
    memory.release()
    own = CompactState(plan.layout, inner_state, None, _stats(spec, own, plan.stats, step))
    return state._replace(params=params, opt_state=own, average=None if average is None else (average, averaged_state))


def _stats(spec: CompactSpec, own: CompactState, of_group: UpdateStats, step: int) -> UpdateStats:
    """Statistics of all layers from those of the group that took part."""
    if spec.groups == 1:
        return of_group
    leaves = _layers(own.layout)
    number = np.repeat(np.arange(len(leaves)), leaves)
    members = np.flatnonzero(number % spec.groups == spec.group(step))
    return UpdateStats(*(jnp.zeros(len(number), x.dtype).at[members].set(x) for x in of_group))


def shapes_after(spec: CompactSpec, shapes: TrainState, step: int, arrays: dict[str, str]) -> TrainState:
    """Shapes of a saved state.

    Args:
      spec: of the training.
      shapes: of the first state.
      step: after which the state was saved.
      arrays: type and shape of what was saved, by path: leaves may have more room by then.
    """
    own = shapes.opt_state
    saved = {path: _last_side(arrays.get(f'opt_state/layout/{path}/indices', '')) for path in tree.compact_leaves(own.layout).paths}
    if all(saved.values()):
        resize = functools.partial(with_capacities, capacities=saved)
        average, averaged_state = shapes.average or (None, None)
        (params, inner_state, average), layout = jax.eval_shape(resize, (shapes.params, own.inner_state, average), own.layout)
        own = own._replace(layout=layout, inner_state=inner_state)
        shapes = shapes._replace(params=params, average=None if average is None else (average, averaged_state))
    if spec.is_scored(step) and step and not spec.rule.timing.is_update(step):
        own = own._replace(scores=jax.eval_shape(lambda layout: spec.scores(layout, step), own.layout))
    return shapes._replace(opt_state=own)


def _last_side(described: str) -> int:
    """The last side of an array's shape.

    >>> _last_side('int32[4, 120]'), _last_side('')
    (120, 0)
    """
    return int(described.rpartition('[')[2].rstrip(']').split(',')[-1] or 0)
