"""The types of a training: its state, its experiment, and how large the network is."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax import stats
from sparse_jax.core import layers as layers_lib
from sparse_jax.train import storage


class NonFiniteError(RuntimeError):
    """The loss or a parameter is NaN or infinite: the run cannot go on."""


class TrainState(NamedTuple):
    """Everything that a training step changes; a pytree of arrays."""

    step: jax.Array  # int32, batches drawn so far: the position in the data
    params: Any
    model_state: Any
    opt_state: Any
    rng_key: jax.Array  # constant; folded with the step
    average: Any = None  # exponential average of (params, model_state), not masked; None where there is none


class Experiment(NamedTuple):
    """The pure functions of one experiment, and its lengths in steps."""

    init: Callable[[jax.Array], TrainState]  # of a random key; in compact storage to be called on the host, elsewhere under jit
    begin: Callable[..., TrainState]  # (state, whole params, model_state, masks or None): a first state with these
    first_network: Callable[..., tuple[Any, Any, Any]] | None  # (key, batch): params, model_state and masks; None: those of init
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # (state, batch, patterns=None, *, dense_gradients)
    evaluate: Callable[..., dict[str, jax.Array]]  # (state, batch, patterns=None): sums over the batch
    apply: Callable[..., Any]  # (params, model_state, inputs, patterns=None, train=False): logits
    before_step: Callable[[int, TrainState], TrainState]  # on the host, of a step's number, 1-based
    after_step: Callable[[int, TrainState], TrainState]  # likewise: updates the masks of compact storage
    shapes_after: Callable[[TrainState, int, dict[str, str]], TrainState]  # of a saved state: (first shapes, step, its arrays)
    storage: str  # of the weights that are trained sparse: 'dense' or 'compact'
    learning_rate: optax.Schedule
    prune_rate: optax.Schedule | None  # None where nothing is pruned and grown
    is_mask_update: Callable[[int], bool]  # of a step's number, 1-based
    dense_gradient_steps: int | None  # up to a mask update, whose gradients off the masks are computed; None: all
    needs_dense_gradient: Callable[[int], bool]  # of a step's number, 1-based
    layers: list[layers_lib.Layer]  # that are trained sparse (in the dense twin: that would be)
    layer_codes: np.ndarray  # the same as a sparse optimizer's state holds it, int32[leaves, 4]
    stacked: Callable[[str, Any], bool] | None  # which leaves hold a layer in each row
    example: jax.ShapeDtypeStruct  # one input
    start_step: int  # steps that count as done where the training begins
    total_steps: int
    steps_per_epoch: int
    update_every: int


class Sizes(NamedTuple):
    """How large a network is."""

    parameters: int  # all
    sparse_size: int  # weights of the leaves that are trained sparse (in the dense twin: that would be)
    nonzeros: int  # of those, how many exist
    layers: dict[str, tuple[int, int]]  # nonzeros and size of each of those leaves

    @property
    def density(self) -> float:
        return self.nonzeros / self.sparse_size


def sizes(experiment: Experiment, state: TrainState) -> Sizes:
    """Counts the parameters of a concrete state, as Python integers."""
    names = layers_lib.names_of(experiment.layers)
    full = [math.prod(layer.shape) for layer in experiment.layers for _ in range(layer.depth or 1)]
    counts = full
    if storage.has_masks(state):
        counts = storage.layer_nonzeros(state, experiment.layers)
    return Sizes(
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(storage.shapes(state))),
        sparse_size=sum(full),
        nonzeros=sum(counts),
        layers=dict(zip(names, zip(counts, full, strict=True), strict=True)),
    )


class NonzeroSums:
    """Each layer's nonzeros summed over the steps, in whole numbers: the run's mean density. Saved with each checkpoint."""

    def __init__(self, sizes: Sizes, step: int, sums: dict[str, int] | None):
        """Args: sizes: after `step`. sums: as saved with that step's checkpoint; None: the nonzeros have always been what they are."""
        self._sizes, self._step = sizes, step
        self._sums = {name: nonzeros * step for name, (nonzeros, _) in sizes.layers.items()} if sums is None else dict(sums)

    def after(self, step: int) -> dict[str, int]:
        """The sums over all steps up to this one."""
        for name, (nonzeros, _) in self._sizes.layers.items():
            self._sums[name] += nonzeros * (step - self._step)
        self._step = step
        return dict(self._sums)

    def update(self, step: int, sizes: Sizes) -> None:
        """From the step after this one on, the network has other sizes."""
        self.after(step)
        self._sizes = sizes

    def mean_density(self) -> dict[str, float]:
        """Of each layer, on average over the steps so far; of none, what it is."""
        sums = {name: nonzeros for name, (nonzeros, _) in self._sizes.layers.items()} if self._step == 0 else self._sums
        return {name: sums[name] / (size * max(self._step, 1)) for name, (_, size) in self._sizes.layers.items()}


def operations(experiment: Experiment, state: TrainState, mean_density: dict[str, float], masks: Any = None) -> dict[str, float]:
    """Multiply-adds of one example, sparse and against dense: for inference now, for training on average over the run.

    Args:
      experiment: its functions.
      state: concrete.
      mean_density: density of each layer, on average over the training's steps; empty for the dense twin.
      masks: the state's, whole on this host; None: it has none, and all is dense.

    Returns:
      Numbers for ``result.json``: what sparse products take, with gradients off the masks in those steps only that compute them.
    """
    params = storage.shapes(state)
    if masks is None:
        masks = jax.tree.map(lambda _: jnp.array(True), params)
    count = functools.partial(stats.operations, lambda p, x: experiment.apply(p, state.model_state, x), params, masks)
    window = experiment.dense_gradient_steps
    now = count(experiment.example, update_every=experiment.update_every, dense_gradient_window=window)
    layers = {}
    for layer in experiment.layers if storage.has_masks(state) else ():
        row, names = now.layers[layer.name], layers_lib.names_of([layer])
        density = sum(mean_density[name] for name in names) / len(names)
        forward, back = round(row.forward_dense * density), round(row.input_gradient_dense * density)
        layers[layer.name] = row._replace(forward=forward, input_gradient=back)
    # a step has a batch, and the masks are updated for all of it
    average = now._replace(layers=layers, mask_updates=0.0)
    return {
        'operations_inference': now.inference,
        'operations_inference_against_dense': now.inference / now.inference_dense,
        'operations_training': average.training,
        'operations_training_against_dense': average.training / average.training_dense,
    }
