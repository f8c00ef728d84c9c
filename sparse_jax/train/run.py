"""What a run is made of, and everything that can be wrong with its input: found before a file is made, on every host or on none."""

import functools
import pathlib
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_jax import config as config_lib
from sparse_jax import data as data_lib
from sparse_jax.runtime import hosts, workdir
from sparse_jax.train import devices as devices_lib
from sparse_jax.train import experiment as experiment_lib
from sparse_jax.train import kernel_choice, metrics
from sparse_jax.train import state as state_lib


class Run(NamedTuple):
    """The settings of a run, its workdir, and what they make."""

    config: config_lib.Config
    folder: pathlib.Path
    data: data_lib.Dataset
    experiment: state_lib.Experiment
    devices: devices_lib.Devices
    initial: Any = None  # the network that it starts with: see initial.py; None: a random one


def load_data(config: config_lib.Config) -> data_lib.Dataset:
    """The data set that a config names."""
    d = config.data
    own: dict[str, Any] = {name: getattr(d, name) for name in ('pattern', 'tokenizer', 'length', 'size', 'skip_unreadable')}
    try:
        return data_lib.load(d.name, d.dir, download=d.download, validation=d.validation, augment=d.augment, **own)
    except OSError as error:
        raise ValueError(f'config.data.dir={d.dir!r} cannot be read ({error.strerror}): give another folder.') from error


def create_experiment(config: config_lib.Config, data: data_lib.Dataset) -> state_lib.Experiment:
    """The experiment that a config, of checked settings, describes on its data."""
    shapes: dict[str, Any] = dict(input_shape=data.input_shape, num_outputs=data.num_outputs)
    return experiment_lib.build(config, num_examples=len(data.train.labels), **shapes)


def experiment_of_shapes(config: config_lib.Config) -> state_lib.Experiment:
    """The experiment that a config, of checked settings, describes; its data is read only where their name does not tell their shapes."""
    known = data_lib.known_shapes(config.data.name)
    if known is None:
        return create_experiment(config, load_data(config))
    count = known.num_train - round(config.data.validation * known.num_train)
    return experiment_lib.build(config, num_examples=count, input_shape=known.input_shape, num_outputs=known.num_outputs)


def check_identity(config: config_lib.Config, folder: pathlib.Path) -> None:
    """Raises ValueError for numbers out of range, and where the workdir holds anything but this experiment.

    This is all that is asked of a finished run, whose result may be shown where it could not run.
    """
    config_lib.validate(config)
    workdir.check(config, folder)


def check_names(config: config_lib.Config) -> None:
    """Raises ValueError for names that do not exist or do not run here, of settings in range; needs no data."""
    experiment_lib.check_names(config)
    kernel_choice.check(config)
    devices_lib.check(config)


def check_settings(config: config_lib.Config) -> None:
    """Raises ValueError for what is wrong with the settings, whatever the data and the workdir."""
    config_lib.validate(config)
    check_names(config)


def prepare(config: config_lib.Config, folder: pathlib.Path) -> Run:
    """Loads and makes all that a run needs, after :func:`check_identity`; makes no file.

    Raises:
      ValueError: on all hosts, for whatever is wrong on one of them, or differs between them.
    """
    run = hosts.run_on_all_hosts(_prepare, config, folder)
    settings = {f'config.{name}': value for name, value in config_lib.flatten(config).items()}
    hosts.assert_equal_on_all_hosts(settings | {'the code': _code(), 'the data': _content(run.data)})
    return run


def _prepare(config: config_lib.Config, folder: pathlib.Path) -> Run:
    check_names(config)
    metrics.check_tensorboard(config.log)
    metrics.callback(config.log)
    data = load_data(config)
    workdir.check_data(folder, data.fingerprint)
    config = workdir.extended(config, folder, len(data.train.labels) // config.data.batch_size)
    experiment = create_experiment(config, data)
    devices = devices_lib.Devices(config, experiment)
    return Run(config=config, folder=folder, data=data, experiment=experiment, devices=devices)


def _code() -> str:
    """The versions of jax and of this package's code."""
    package = pathlib.Path(__file__).parents[1]
    sources = sorted(package.rglob('*.py'))
    return f'{jax.__version__} {zlib.crc32(b"".join(path.read_bytes() for path in sources)):08x}'


def _content(data: data_lib.Dataset) -> int:
    """A checksum of the data, where there are other hosts to compare it with."""
    parts = (data.train, data.validation, data.test) if jax.process_count() > 1 else ()
    return functools.reduce(lambda crc, x: zlib.crc32(np.ascontiguousarray(x).data, crc), [x for part in parts for x in part], 0)
