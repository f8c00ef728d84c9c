"""A run's trained network as one file."""

import pathlib
from typing import Any

import jax

from sparse_jax import config as config_lib
from sparse_jax.export import files
from sparse_jax.runtime import hosts
from sparse_jax.train import storage
from sparse_jax.train.evaluate import restored


def export(config: config_lib.Config, folder: pathlib.Path, to: pathlib.Path) -> None:
    """Writes the network of a workdir's newest checkpoint into a file, which :func:`sparse_jax.export.load` reads.

    Weights are those that evaluation takes: averages where the run keeps them. Running statistics of normalisation stand beside the
    weights, by the names of their layers. The file's info has the run's settings and the step.

    Args:
      config: the settings, the same as it was trained with.
      folder: the workdir.
      to: path of the file; its suffix picks the format: ``.npz`` or ``.safetensors``.

    Raises:
      ValueError: if the file cannot be written, or there is no checkpoint, or it is damaged, or of another experiment.
    """
    try:
        files.check_path(to, name='--to')
    except ImportError as error:
        raise ValueError(str(error)) from error
    if not to.parent.is_dir():
        raise ValueError(f'--to={to}: the folder {to.parent} does not exist.')
    tree, masks, step = network(config, folder)
    info: dict[str, Any] = {'settings': config_lib.identity(config), 'step': step}
    hosts.run_on_host0(lambda: files.save(to, tree, masks, info, granularity=units(config)))
    if hosts.is_host0():
        print(f'{to} is written: step {step}, {to.stat().st_size:,} bytes.')


def units(config: config_lib.Config) -> str:
    """The units that a file lists: single weights where inputs and outputs are not the last two axes, or nothing is sparse."""
    sparsity = config.sparsity
    return 'unstructured' if sparsity.method == 'dense' or sparsity.matrix_axes else sparsity.granularity


def network(config: config_lib.Config, folder: pathlib.Path) -> tuple[Any, Any, int]:
    """The network of a workdir's newest checkpoint, on the host: weights as evaluation takes them and running statistics in one tree, masks
    like it, and the step. Raises as :func:`sparse_jax.train.evaluate.restored`."""
    run, step, state = restored(config, folder)
    params, model_state = state.average if state.average is not None else (state.params, state.model_state)
    if config.sparsity.method == 'dense':
        masks = jax.tree.map(lambda _: True, params)
    else:
        masks, params = storage.masks(state), storage.whole(state, params)
    return *with_state(*run.devices.host((params, masks, model_state))), step


def with_state(params: Any, masks: Any, model_state: Any) -> tuple[Any, Any]:
    """Weights and running statistics in one tree, and masks like it."""
    return _merged(params, model_state), _merged(masks, jax.tree.map(lambda _: True, model_state))


def _merged(a: Any, b: Any) -> dict[str, Any]:
    """Two nested dictionaries as one; they have no leaf in common."""
    merged = dict(a)
    for name, value in dict(b).items():
        merged[name] = _merged(merged[name], value) if name in merged else value
    return merged
