"""Kernels for a training loop of one's own: which layer takes which, chosen by measurement, and patterns that follow the masks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core import errors
from sparse_jax.core import layers as layers_lib
from sparse_jax.core import masks as masks_lib
from sparse_jax.core.granularity import Granularity
from sparse_jax.core.schedules import Timing
from sparse_jax.kernels import backend, builder, measure
from sparse_jax.kernels.pattern import is_pattern, with_dense_gradients

_MUCH = 1.5  # a density that has changed by this factor since a layer's choice is measured anew
_SPARSE = 0.9  # above this density no sparse kernel is tried


def products(apply: Callable[..., Any], example: Sequence[Any], patterns: Any, inputs: int) -> dict[str, measure.Call]:
    """The product that a network makes with each of these patterns, by its layer's name, found by tracing it.

    Args:
      apply: takes the example's parts, then patterns.
      example: arrays or their shapes.
      patterns: of all sparse layers.
      inputs: elements of the network's own input, whose gradient nobody wants.
    """
    calls = measure.products_of(apply, *example, patterns)
    if calls and math.prod(calls[0].x) == inputs:
        calls[0] = calls[0]._replace(input_gradient=False)
    return {call.name: call for call in calls}


def choose(call: measure.Call | None, density: float, dense_share: float) -> dict[str, Any]:
    """What is fastest for a layer, measured: its density, the implementation, and the seconds of each.

    Args:
      call: its product; None where it makes none, which is dense.
      density: of its mask.
      dense_share: share of the steps whose weight gradient is wanted at all positions.
    """
    row: dict[str, Any] = {'density': density, 'implementation': 'dense', 'seconds': {}}
    if call is not None and density <= _SPARSE and len(measure.candidates(call)) > 1:
        row['seconds'] = measure.measured(call, density, dense_share=dense_share)
        row['implementation'] = backend.fastest(row['seconds']).implementation
    return row


def is_settled(row: Mapping[str, Any] | None, density: float) -> bool:
    """Whether a layer's choice still holds at this density."""
    return bool(row) and 1 / _MUCH < density / row['density'] < _MUCH


def densities(masks: Any) -> dict[str, float]:
    """Density of each sparse leaf, by its path."""
    counts = {path: (mask.sum(dtype='int32'), mask.size) for path, mask in layers_lib.leaf_paths(masks) if np.ndim(mask)}
    return {path: int(count) / size for path, (count, size) in counts.items()}


class Runner:
    """The kernels of a training loop: patterns to pass into the jitted step, and when to make them anew.

    It is a host object over pure functions. What it has decided are :attr:`patterns`, a tree that never changes in place: give it to the
    step as an argument. On one process; several need one choice for all, which ``implementations`` names.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sparse_jax as sj
      >>> params = {'w': jax.random.normal(jax.random.key(0), (64, 32))}
      >>> timing = sj.Timing(update_every=4, total_steps=12)
      >>> tx = sj.sparsify(optax.sgd(0.1, momentum=0.9), density=0.1, timing=timing)
      >>> opt_state = tx.init(params)
      >>> params = sj.apply_masks(params, sj.get_masks(opt_state))
      >>> apply = lambda params, x, patterns: sj.kernels.sparse_dot(x, params['w'], patterns['w'])
      >>> x = jnp.ones((16, 64))
      >>> runner = sj.kernels.Runner(opt_state, timing, apply=apply, example=(params, x), window=2, implementations='reference')
      >>> @jax.jit
      ... def train_step(params, opt_state, patterns):
      ...     grads = jax.grad(lambda params: jnp.mean(apply(params, x, patterns) ** 2))(params)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     return optax.apply_updates(params, updates), opt_state
      >>> for step in range(12):
      ...     params, opt_state = train_step(params, opt_state, runner.patterns_at(step))
      ...     runner.update(step + 1, opt_state)
      >>> [step for step in range(12) if runner.dense_gradients(step)], runner.patterns['w'].name
      ([2, 3, 6, 7], 'w')
    """

    def __init__(
        self,
        masks: Any,
        timing: Timing,
        *,
        apply: Callable[..., Any],
        example: Sequence[Any],
        window: int | None = 22,
        granularity: str | Granularity = builder.NOT_GIVEN,
        stacked: Callable[[str, Any], bool] | None = None,
        matrix_axes: Any = None,
        implementations: str | Mapping[str, str] = 'auto',
    ):
        """Chooses and makes the first patterns.

        Args:
          masks: state of an optimizer with one ``sparsify``, or masks as ``sj.get_masks`` gives them; concrete.
          timing: of the mask updates, as ``sparsify`` has it.
          apply: ``apply(*example, patterns)`` is the network, traced and not run: what it multiplies with which pattern is measured.
          example: what it takes before the patterns, arrays or their shapes: first the params, then a batch as in training.
          window: steps of dense gradients up to each mask update; 0: none; None: all steps (see :func:`needs_dense_gradient`).
          granularity: with masks only: as in :func:`make_patterns`.
          stacked: likewise.
          matrix_axes: likewise.
          implementations: ``'auto'``: each layer takes what is measured to be fastest at its shape, batch and density, ``'dense'``
            among them; one of them for all layers; or one for each path.

        Raises:
          ValueError: for an example that is empty, an implementation that does not exist, ``'auto'`` on several processes, and as
            :func:`make_patterns`.
          NotImplementedError: if an implementation that is named does not run here.
        """
        if not isinstance(timing, Timing):
            raise ValueError(f'Runner: timing must be a sj.Timing, got {type(timing).__name__}: the one that sparsify takes.')
        if not isinstance(example, Sequence) or len(example) < 2:
            raise ValueError('Runner: example must be what apply takes before the patterns: (params, batch).')
        self._timing, self._window = timing, window
        timing.needs_dense_gradient(0, window)
        self._options: dict[str, Any] = dict(granularity=granularity, stacked=stacked, matrix_axes=matrix_axes)
        self._apply, self._example = apply, tuple(jax.eval_shape(lambda *x: x, *example))
        self._named = implementations
        self._check(implementations, masks)
        self._rows: dict[str, dict[str, Any]] = {}
        self._calls: dict[str, measure.Call] | None = None
        self._patterns: Any = None
        self._make(masks)

    @property
    def patterns(self) -> Any:
        """A tree like the masks: a :class:`Pattern` where a layer takes a sparse kernel, None where it is dense."""
        return self._patterns

    def dense_gradients(self, step: int) -> bool:
        """Whether the step after so many wants gradients at missing weights too.

        Args:
          step: steps done before, a Python integer.
        """
        return self._timing.needs_dense_gradient(step, self._window)

    def patterns_at(self, step: int) -> Any:
        """:attr:`patterns` for the step after so many: with dense gradients where these are wanted. There are two compiled steps."""
        return with_dense_gradients(self._patterns) if self.dense_gradients(step) else self._patterns

    def update(self, step: int, masks: Any) -> None:
        """Makes the patterns anew where a step has updated the masks. To be called after each step.

        Args:
          step: steps done, this one included.
          masks: state or masks, as at the beginning.
        """
        if self._timing.is_update(step):
            self._make(masks)

    def table(self) -> list[dict[str, Any]]:
        """A row for each sparse layer: its name, density, implementation, and the measured seconds of an average step by implementation."""
        return [
            {'layer': path} | {key: row[key] for key in ('density', 'implementation', 'seconds')}
            for path, row in self._rows.items()
        ]

    def _check(self, implementations: str | Mapping[str, str], masks: Any) -> None:
        known = ('dense', *backend.IMPLEMENTATIONS)
        if implementations == 'auto':
            if jax.process_count() > 1:
                raise ValueError(
                    "Runner: implementations='auto' measures on each process, and they may choose differently: name them, such as those "
                    'of table() of a run on one process.'
                )
            return
        for name in (implementations,) if isinstance(implementations, str) else implementations.values():
            if name not in known:
                raise errors.unknown('Runner: implementations', name, ('auto', *known))
            for unit in self._units(masks) if name != 'dense' else ():
                if reason := backend.unsupported(name, self._dtype(), unit):
                    raise NotImplementedError(
                        f"Runner: implementations={name!r} does not run here: {reason}. Take 'auto' or 'reference'."
                    )

    def _units(self, masks: Any) -> set[Granularity]:
        return builder.units_of('Runner', masks, **self._options)

    def _dtype(self) -> Any:
        batch = [leaf.dtype for leaf in jax.tree.leaves(self._example[1:]) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return batch[0] if batch else jnp.float32

    def _make(self, masks: Any) -> None:
        tree = masks_lib.masks_in(masks)
        on_host = jax.device_get(tree)
        masks = on_host if tree is masks else masks_lib.find_state(masks)._replace(masks=on_host)
        found = densities(on_host)
        for path, density in found.items():
            if self._named != 'auto':
                name = self._named if isinstance(self._named, str) else self._named.get(path, 'dense')
                self._rows[path] = {'density': density, 'implementation': name, 'seconds': {}}
            elif not is_settled(self._rows.get(path), density):
                self._calls = self._products(masks, found) if self._calls is None else self._calls
                share = 1.0 if self._window is None else min(1.0, self._window / self._timing.update_every)
                self._rows[path] = choose(self._calls.get(path), density, share)
        chosen = {path: row['implementation'] for path, row in self._rows.items()}
        made = builder.make_patterns(masks, implementations=chosen, previous=self._patterns, **self._options)
        self._patterns = jax.device_put(made)

    def _products(self, masks: Any, found: Mapping[str, float]) -> dict[str, measure.Call]:
        """What apply multiplies with each pattern, by tracing it once."""
        names = {backend.of_platform(self._dtype(), unit).implementation for unit in self._units(masks)}
        implementation = names.pop() if len(names) == 1 and 'dense' not in names else 'reference'
        patterns = builder.make_patterns(masks, implementations=dict.fromkeys(found, implementation), **self._options)
        inputs = [math.prod(leaf.shape) for leaf in jax.tree.leaves(self._example[1:])]
        calls = products(self._apply, self._example, patterns, inputs[0] if inputs else 0)
        made = [pattern.name for pattern in jax.tree.leaves(patterns, is_leaf=is_pattern) if pattern is not None]
        if missing := [name for name in made if name not in calls]:
            errors.say_once(
                f'Runner: apply multiplies with no pattern of {", ".join(missing)}: such layers stay dense. Pass patterns to sparse_dot and '
                'sparse_conv, or to layers of sj.nnx.'
            )
        return calls
