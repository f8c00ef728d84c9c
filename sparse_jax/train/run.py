"""What a run is made of, and everything that can be wrong with its input: found before a file is made, on every host or on none."""

import functools
import pathlib
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

import sparse_jax as sj
from sparse_jax import config as config_lib
from sparse_jax import data as data_lib
from sparse_jax.runtime import hosts, workdir
from sparse_jax.train import devices as devices_lib
from sparse_jax.train import kernel_choice, metrics
from sparse_jax.train import state as state_lib


def load_data(config: config_lib.Config) -> data_lib.Dataset:
    """The data set that a config names."""
    d = config.data
    text: dict[str, Any] = dict(pattern=d.pattern, tokenizer=d.tokenizer, length=d.length)
    return data_lib.load(d.name, d.dir, download=d.download, validation=d.validation, augment=d.augment, **text)


def create_experiment(config: config_lib.Config, data: data_lib.Dataset) -> state_lib.Experiment:
    """The experiment that a config describes, on its data."""
    return state_lib.create(config, num_examples=len(data.train.labels), input_shape=data.input_shape, num_outputs=data.num_outputs)


def check_settings(config: config_lib.Config) -> None:
    """What can be told to be wrong from the settings alone; ValueError."""
    config_lib.validate(config)
    state_lib.check_names(config)
    kernel_choice.check(config)
    devices_lib.check(config)


def check(config: config_lib.Config, folder: pathlib.Path) -> None:
    """What can be told to be wrong without the data; ValueError."""
    check_settings(config)
    workdir.check(config, folder)
    if config.log.tensorboard:
        metrics.check_tensorboard()


class Run(NamedTuple):
    """The settings of a run, where it is, and what they make."""

    config: config_lib.Config
    folder: pathlib.Path
    data: data_lib.Dataset
    experiment: state_lib.Experiment
    devices: devices_lib.Devices


def prepare(config: config_lib.Config, folder: pathlib.Path) -> Run:
    """Everything that can be wrong with the input is found here, before a file is made in the workdir; on every host, or on none."""
    hosts.together(check, config, folder)
    data = hosts.together(load_data, config)
    hosts.together(workdir.check_data, folder, data.fingerprint)
    experiment = hosts.together(create_experiment, config, data)
    devices = hosts.together(devices_lib.Devices, config, experiment)
    hosts.check_same(
        {f'config.{k}': v for k, v in config_lib.flatten(config).items()} | {'the code': _code(), 'the data': _content(data)}
    )
    return Run(config, folder, data, experiment, devices)


def _code() -> str:
    sources = sorted(pathlib.Path(sj.__file__).parent.rglob('*.py'))
    return f'{jax.__version__} {zlib.crc32(b"".join(path.read_bytes() for path in sources)):08x}'


def _content(data: data_lib.Dataset) -> int:
    parts = (data.train, data.validation, data.test) if jax.process_count() > 1 else ()
    return functools.reduce(lambda crc, x: zlib.crc32(np.ascontiguousarray(x).data, crc), [x for part in parts for x in part], 0)
