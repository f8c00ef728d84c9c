"""The config of a run that exists, from its workdir: what launch.py takes where no --config is given."""

import pathlib

from sparse_jax import config as config_lib
from sparse_jax.runtime import records


def get_config(workdir: str) -> config_lib.Config:
    """The settings that a workdir's run was started with last.

    Where that file is lost or cannot be read, those that make up the experiment, and the defaults of all others.

    Raises:
      ValueError: if there are none, or they are of another version.
    """
    folder, config = pathlib.Path(workdir), config_lib.Config()
    known = config_lib.flatten(config)
    try:
        stored = records.read(folder / records.SETTINGS)
    except records.UnreadableError:
        stored = records.read(folder / records.CONFIG)
    if unknown := sorted(stored.keys() - known.keys()):
        raise ValueError(f'--workdir={workdir} has settings of another version ({", ".join(unknown[:3])}): give --config.')
    for name, value in stored.items():
        section, _, field = name.rpartition('.')
        setattr(getattr(config, section) if section else config, field, value)
    return config
