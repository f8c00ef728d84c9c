"""The weights and masks of another run, or of a file, as a run's first ones."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_jax import config as config_lib
from sparse_jax.core import errors
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import layers as layers_lib
from sparse_jax.export import files, leaves
from sparse_jax.train import devices as devices_lib
from sparse_jax.train import state as state_lib
from sparse_jax.train import storage


class Network(NamedTuple):
    """Values and masks of a trained network on the host, running statistics beside the weights, by their paths."""

    values: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]  # a scalar True where a leaf is dense


def of_trees(params: Any, masks: Any) -> Network:
    """From trees as files hold them."""
    return Network(*({path: np.asarray(leaf) for path, leaf in layers_lib.leaf_paths(tree)} for tree in (params, masks)))


def of_file(path: pathlib.Path) -> Network:
    """From a file that an export wrote; ValueError where it cannot be read."""
    try:
        params, masks, _ = files.load(path)
    except (OSError, ImportError) as error:
        raise ValueError(f'--init_from={path} cannot be read ({error}).') from error
    return of_trees(params, masks)


def check(network: Network, config: config_lib.Config, experiment: state_lib.Experiment, shapes: state_lib.TrainState) -> None:
    """Raises ValueError where a network cannot be the first one of an experiment.

    Args:
      network: to begin with.
      config: the settings.
      experiment: its functions.
      shapes: of its state.
    """
    what = f'--init_from={config.train.init_from}'
    whole = storage.shapes(shapes), shapes.model_state
    wanted = {path: tuple(leaf.shape) for tree in whole for path, leaf in layers_lib.leaf_paths(tree)}
    errors.check_names(what, {path: value.shape for path, value in network.values.items()}, wanted)
    if config.sparsity.method == 'dense':
        return
    layers = layers_lib.decode(storage.masks(shapes), experiment.layer_codes)
    of_leaf = {layer.name: (layer, granularity) for layer, granularity in layers}
    nonzeros = slack = 0
    for path, mask in layers_lib.leaf_paths(storage.masks(shapes)):
        found = network.masks[path]
        if bool(mask.ndim) != bool(found.ndim):
            is_there, is_here = ('sparse', 'dense') if found.ndim else ('dense', 'sparse')
            raise ValueError(
                f'{what}: {path} is {is_there} there and {is_here} here: give a network that is sparse in the same layers, or name '
                'those that are to be dense in config.sparsity.dense.'
            )
        if found.ndim:
            nonzeros += int(np.count_nonzero(found))
            layer, granularity = of_leaf[path]
            for row in layer.rows(found):
                leaves.compress(row, row, granularity_lib.of_products(granularity), path)
                if wrong := granularity_lib.departure(granularity, np.asarray(row)):
                    raise ValueError(
                        f'{what}: {path} does not have {granularity}: {wrong}. Give another network, or sparsity.granularity.'
                    )
                slack += granularity.selected_per_unit(layer.shape) - 1
    size = sum(int(np.prod(layer.shape)) * (layer.depth or 1) for layer in experiment.layers)
    budget = round(config.sparsity.density * size)
    if abs(nonzeros - budget) > slack:
        raise ValueError(
            f'{what} has {nonzeros:,} weights in its sparse layers, and config.sparsity.density={config.sparsity.density} makes '
            f'{budget:,}: give config.sparsity.density={nonzeros / size!r}, or another network.'
        )


def begin(
    network: Network, state: state_lib.TrainState, experiment: state_lib.Experiment, devices: devices_lib.Devices
) -> state_lib.TrainState:
    """A first state with the weights and masks of a network that :func:`check` has passed."""
    pick = lambda tree, values: jax.tree.unflatten(
        jax.tree.structure(tree), [values[path] for path, _ in layers_lib.leaf_paths(tree)]
    )
    params, model_state = (pick(tree, network.values) for tree in (state.params, state.model_state))
    masks = pick(state.params, network.masks) if storage.has_masks(state) else None
    state = devices.first(experiment.begin, state, params, model_state, masks)
    return state._replace(step=state.step + experiment.start_step)
