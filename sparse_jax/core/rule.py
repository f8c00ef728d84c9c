"""What a method does, apart from the optimizer that it wraps: one frozen, validated value."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.core import allocation, arguments, criteria, distributions, errors, matrix_axes, schedules
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.core.criteria import Criterion
from sparse_jax.core.granularity import Granularity
from sparse_jax.core.layers import Layer, PathPredicate
from sparse_jax.core.matrix_axes import MatrixAxes
from sparse_jax.core.momentum import MomentumOption
from sparse_jax.core.schedules import Timing

_MASK_STREAM = 0x6D61736B  # 'mask' in ASCII


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rule:
    """The rule of a method: which weights exist at first, when weights move, and what decides which.

    It says what the keywords of :func:`sparse_jax.sparsify` say, and is validated when it is made. Names of criteria, distributions and
    granularities are accepted in place of what they name. :func:`sparse_jax.methods.rule` makes the rule of a published method.

    Args:
      density: share of the sparse leaves' weights that exist, in (0, 1], or a schedule of the step.
      timing: when masks are updated.
      prune: scores of the active weights, of which the smallest are pruned.
      grow: scores of the missing weights, of which the largest are grown; None: nothing is grown.
      redistribute: a layer's share of the growth; None: each layer regrows what it pruned; ``'default'``: by mean momentum, and None where the
        granularity fixes how many weights each layer has.
      prune_rate: part of a layer's weights that an update prunes: the start of a cosine that ends at 0.005, or a schedule of the step.
      prune_scope: ``'layer'`` or ``'global'``.
      distribution: nonzeros of each layer at first.
      granularity: what one unit of selection is.
      sparsifiable: which leaves are sparse; None: the default choice.
      dense: path patterns of leaves that stay dense.
      stacked: which leaves hold layers along their first axis; None: none.
      matrix_axes: which axes of a leaf are inputs and outputs; None: the last two.
      ablation: with ``'fan_in'``: the part of a layer's inputs that must be salient, or an output loses all of its own; 0: outputs stay.
      keep_outputs: path patterns of leaves whose outputs stay in any case; None: the last layer.
      enters_with: what a grown weight starts at: ``'zero'``, or ``'value'``: what the optimizer's step makes of it.
      backward_density: share of the weights that are trained, in the forward pass or not; those that are not keep their values beside the
        params. None: only those of the forward pass.
      momentum: where the optimizer's state keeps its momentum; None: it is found.
      track_exploration: whether to keep which weights have ever been active.
      seed: of the first masks and of random criteria: an integer, or a typed random key.

    Raises:
      ValueError: for an argument out of range, or arguments that do not go together.

    Example:
      >>> rule = Rule(density=0.1, timing=Timing(update_every=100, total_steps=1000), grow='gradient', redistribute=None)
      >>> rule.grow is criteria.gradient, rule.timing.is_update(200)
      (True, True)
    """

    density: optax.ScalarOrSchedule
    timing: Timing
    prune: Criterion = criteria.magnitude
    grow: Criterion | None = criteria.momentum
    redistribute: Criterion | None = 'default'  # pyright: ignore[reportAssignmentType]  # names become what they name
    prune_rate: optax.ScalarOrSchedule = 0.5
    prune_scope: str = 'layer'
    distribution: distributions.Distribution = distributions.uniform
    granularity: Granularity = dataclasses.field(default_factory=granularity_lib.Unstructured)
    sparsifiable: PathPredicate | None = None
    dense: Sequence[str] = ()
    stacked: PathPredicate | None = None
    matrix_axes: MatrixAxes | None = None
    ablation: float = 0.0
    keep_outputs: Sequence[str] | None = None
    enters_with: str = 'zero'
    backward_density: float | None = None
    momentum: MomentumOption = None
    track_exploration: bool = False
    seed: int | jax.Array = 0

    def __post_init__(self):
        arguments.check_type('timing', self.timing, Timing)
        arguments.check_numbers(self.density, self.prune_rate, self.seed)
        units = granularity_lib.get(self.granularity)
        if isinstance(self.redistribute, str) and self.redistribute == 'default':
            fixed = isinstance(units, granularity_lib.NOfM) or self.ablation
            object.__setattr__(self, 'redistribute', None if fixed else criteria.mean_momentum)
        named: dict[str, Any] = {name: criteria.get(name, getattr(self, name)) for name in ('prune', 'grow', 'redistribute')}
        if named['grow'] is None:  # nothing is grown: nothing is shared out
            named['redistribute'] = None
        named['distribution'] = distributions.get(self.distribution)
        named['granularity'], named['matrix_axes'] = units, matrix_axes.get(self.matrix_axes)
        for name, value in named.items():
            object.__setattr__(self, name, value)
        arguments.check_functions(sparsifiable=self.sparsifiable, stacked=self.stacked)
        arguments.check_momentum(self.momentum)
        arguments.check_criteria(prune=self.prune, grow=self.grow, redistribute=self.redistribute)
        arguments.check_together(self)
        arguments.check_structure(self)
        arguments.check_values(self)
        if callable(self.prune_rate):
            schedules.check_rate(self.prune_rate, self.timing)
        if callable(self.density):
            arguments.check_density_schedule(self.density, self.timing, can_grow=self.grow is not None)

    @property
    def is_fixed(self) -> bool:
        """Whether the first masks stay."""
        return self.grow is None and not callable(self.density)

    def first_key(self) -> jax.Array:
        """The random key of a new state."""
        if arguments.is_key(self.seed):
            return jnp.copy(self.seed)
        # folded with a constant: masks drawn from the very bits of the weights would keep the largest ones
        return jax.random.fold_in(jax.random.key(self.seed), _MASK_STREAM)

    def key_of(self, rng_key: jax.Array) -> jax.Array:
        """The typed random key of a state, which holds its data; states of older versions hold the key itself."""
        if arguments.is_key(rng_key):
            return rng_key
        impl = jax.random.key_impl(self.seed) if isinstance(self.seed, jax.Array) else None
        return jax.random.wrap_key_data(rng_key, impl=impl)

    @functools.cached_property
    def needs(self) -> criteria.Needs:
        """What the criteria read."""
        return criteria.requirements(*([] if self.is_fixed else [self.prune, self.grow, self.redistribute]))

    @property
    def shares_after_pruning(self) -> bool:
        """Whether shares depend on how many units each layer prunes."""
        return criteria.requirements(self.redistribute).amount

    def kept_outputs(self, layers: Sequence[Layer]) -> list[bool]:
        """Of each layer whether its outputs stay whatever is salient."""
        names = layers_lib.names_of(layers)
        if self.keep_outputs is None:
            return [i == len(names) - 1 for i in range(len(names))]
        return [i is not None for i in distributions.matching(self.keep_outputs, names, 'keep_outputs')]

    @property
    def is_global(self) -> bool:
        """Whether one threshold over all layers decides what is pruned."""
        return self.prune_scope == 'global'

    @functools.cached_property
    def prune_rate_schedule(self) -> optax.Schedule:
        """The prune rate by step."""
        rate = self.prune_rate
        return rate if callable(rate) else schedules.cosine(rate, self.timing.total_steps)

    def densities(self) -> np.ndarray:
        """The density at step 0 and at each mask update, float64."""
        return schedules.densities(self.density, self.timing.steps()) if callable(self.density) else np.array([float(self.density)])

    def counts(self, layers: Sequence[Layer], density: float) -> list[int]:
        """Units of each layer at a density, as the distribution says; ValueError where that cannot be."""
        sizes = layers_lib.unit_counts(self.granularity, layers)
        if density == 1:  # whatever the distribution
            return sizes
        shapes = [layer.shape for layer in layers for _ in range(layer.depth or 1)]
        if isinstance(self.granularity, granularity_lib.NOfM):
            return [size // self.granularity.m * self.granularity.n for size in sizes]
        width = [self.granularity.selected_per_unit(shape) for shape in shapes]
        weights = [n * k for n, k in zip(sizes, width, strict=True)]
        rows = zip(layers_lib.names_of(layers), shapes, weights, strict=True)
        counts = distributions.counts(self.distribution, [distributions.Layer(*row) for row in rows], density)
        if not isinstance(self.granularity, granularity_lib.FanIn):
            return counts
        units = [max(1, (2 * n + k) // (2 * k)) for n, k in zip(counts, width, strict=True)]
        total = sum(n * k for n, k in zip(units, width, strict=True))
        if layers and total != sum(counts):
            errors.say_once(
                f"granularity='fan_in': density={density:g} asks for {sum(counts):,} of {sum(weights):,} weights; with the same number of inputs "
                f'for every output of a layer it is {total:,} ({total / sum(weights):.5g}).'
            )
        return units

    def initial_counts(self, layers: Sequence[Layer]) -> list[int]:
        """Units that each layer starts with; ValueError where a density of the schedule leaves a layer without one."""
        if not callable(self.density):
            return self.counts(layers, self.density)  # pyright: ignore[reportArgumentType]  # a number
        densities = self.densities()
        if layers:
            self.counts(layers, float(densities[-1]))
            sizes = layers_lib.unit_counts(self.granularity, layers)
            distributions.budget([distributions.Layer('', (), n) for n in sizes], float(densities.min()))
        return self.counts(layers, float(densities[0]))

    def final_counts(self, layers: Sequence[Layer]) -> list[int]:
        """Units of each layer after the last update, towards which a falling density moves it; with redistribution none is set, as the
        layers keep the proportions that they have found."""
        if self.redistribute is not None:
            return [0] * len(layers_lib.unit_counts(self.granularity, layers))
        return self.counts(layers, float(self.densities()[-1]))

    def sparse_layers(self, params) -> list[Layer]:
        """The layers of params that are trained sparse; ValueError where there are none, or too many."""
        arguments.check_leaves(params)
        layers = layers_lib.layer_table(
            params, layers_lib.sparse_leaves(params, self.sparsifiable, self.dense), self.stacked, self.matrix_axes
        )
        if jax.tree.leaves(params) and not layers:
            if self.dense and layers_lib.layer_table(params, layers_lib.sparse_leaves(params, self.sparsifiable, ()), self.stacked):
                raise ValueError(
                    f'dense={self.dense!r} leaves no leaf of params sparse: they are {_listed(params)}. Name fewer of them.'
                )
            raise ValueError(
                f'no leaf of params is sparsifiable: they are {_listed(params)}. By default that takes a floating-point leaf with two or '
                "more axes, and no word in its path that begins with 'embed', ends in 'norm', or is 'bias' or 'scale'; "
                'sparsifiable=lambda path, leaf: ... chooses others.'
            )
        if self.ablation:
            self.kept_outputs(layers)
        if layers and layers[-1].stop > allocation.MAX_LAYERS:
            raise ValueError(f'params has {layers[-1].stop} sparse layers; at most {allocation.MAX_LAYERS} are supported.')
        return layers


def _listed(params: Any) -> str:
    """The first leaves of params by path, dtype and shape."""
    leaves = [f'{path} ({jnp.result_type(leaf)}{list(jnp.shape(leaf))})' for path, leaf in layers_lib.leaf_paths(params)]
    return ', '.join(leaves[:8]) + (f' and {len(leaves) - 8} more' if len(leaves) > 8 else '')
