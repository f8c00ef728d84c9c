"""One folder, one experiment: the lock, and the experiment's identity."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from sparse_jax import config as config_lib
from sparse_jax.runtime import records

# What settings that did not exist yet stood at, where that is not their default.
_BEFORE = {'sparsity.dense_gradient_window': None}


def differences(config: config_lib.Config, workdir: pathlib.Path) -> list[str]:
    """What distinguishes an experiment from the one in a workdir, one line a setting; empty for the same, or a new workdir."""
    old = _read(workdir / records.CONFIG)
    if old is None:
        return []
    new = config_lib.identity(config)
    old = config_lib.identity(config_lib.Config()) | _BEFORE | old
    if isinstance(remat := old['model.remat'], bool):  # as it was before there were three
        old['model.remat'] = 'all' if remat else 'none'
    began = old['train.schedule_steps'] or old['train.steps']  # 0: what its epochs make
    if new['train.schedule_steps'] in (0, began) or not began:  # of epochs: what these make is known with the data
        old['train.schedule_steps'] = new['train.schedule_steps']
    if new['train.steps'] > old['train.steps']:  # more steps: see extended
        old['train.steps'] = new['train.steps']
    if config.sparsity.method == 'dense':  # has no effect there
        old['sparsity.dense_gradient_window'] = new['sparsity.dense_gradient_window']
    notes = {'train.steps': ', of which a run that exists can be given more, not fewer'}
    return [
        f'{k}: {old.get(k)!r} there, {new.get(k)!r} given{notes.get(k, "")}'
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k)
    ]


def extended(config: config_lib.Config, workdir: pathlib.Path, steps_per_epoch: int) -> config_lib.Config:
    """The settings of a run with the length that its schedules began with, where it is given more steps than these.

    Raises:
      ValueError: if it is given fewer steps than it had.
    """
    old = _read(workdir / records.CONFIG)
    if old is None:
        return config
    before = old['train.steps'] or old['train.epochs'] * steps_per_epoch
    began = old.get('train.schedule_steps') or before
    if config.train.schedule_steps not in (0, began):
        raise ValueError(
            f'--workdir={workdir} holds a run whose schedules began with {began} steps: config.train.schedule_steps='
            f'{config.train.schedule_steps} must be that, or 0.'
        )
    total = config.train.steps or config.train.epochs * steps_per_epoch
    if total < before:
        raise fewer_steps(workdir, before, total)
    if config.train.schedule_steps or total == began:
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, schedule_steps=began))


def fewer_steps(workdir: pathlib.Path, before: int, total: int) -> ValueError:
    """The error of a run that is given fewer steps than it has."""
    return ValueError(
        f'--workdir={workdir} holds a run of {before} steps, which can be given more, not fewer: config.train.steps={total}. Give at '
        'least as many, or another --workdir.'
    )


def _read(path: pathlib.Path) -> Any:
    """What tells whose workdir this is, which nothing else can say; None where the file is not there."""
    if not os.path.lexists(path):
        return None
    try:
        return records.read(path)
    except records.UnreadableError as error:
        raise ValueError(f'{error}: put back what it was, or give another --workdir.') from error


def check_data(workdir: pathlib.Path, fingerprint: str) -> None:
    """Raises ValueError where a workdir's run was begun on other data, which the settings do not tell."""
    before = _read(workdir / records.DATA)
    if before is not None and before['fingerprint'] != fingerprint:
        raise ValueError(
            f'--workdir={workdir} was begun on another text (its files, or the version of Python, have changed): give another --workdir.'
        )


def check_name(workdir: pathlib.Path) -> None:
    """Raises ValueError where no folder can have this name, or it cannot be looked at."""
    try:
        str(workdir).encode()
        workdir.stat()
    except UnicodeEncodeError as error:
        raise ValueError(f'--workdir={str(workdir)!a} is not UTF-8, which checkpoints need: give another name.') from error
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # such as one that is too long, or has a zero in it
        reason = getattr(error, 'strerror', None) or error
        raise ValueError(f'--workdir={str(workdir)!a} cannot be used ({reason}): give another folder.') from error


def check(config: config_lib.Config, workdir: pathlib.Path) -> None:
    """Raises ValueError where a workdir cannot be used for this experiment. Makes nothing."""
    check_name(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f'--workdir={workdir} is a file: give a folder, or a name that does not exist yet.')
    if different := differences(config, workdir):
        raise ValueError(f'--workdir={workdir} holds another experiment ({"; ".join(different)}): give another --workdir.')
    foreign = (
        workdir.exists()
        and not (workdir / records.CONFIG).exists()
        and any(p.name not in ('.lock', 'config.tmp') for p in workdir.iterdir())
    )
    if foreign:
        raise ValueError(f'--workdir={workdir} holds files but no experiment: give a new or an empty folder.')


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[Callable[[], bool]]:
    """Takes the folder for this process; the lock goes with the process, however it ends.

    Args:
      workdir: the folder; made if need be.

    Yields:
      A function that tells whether the folder is still what it was: False where it was removed, renamed or replaced.

    Raises:
      ValueError: if another process has it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = (workdir / '.lock').open('w')
    except OSError as error:
        raise ValueError(f'--workdir={workdir} cannot be written ({error}): give another folder.') from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f'--workdir={workdir} is in use by another process: wait for it, or give another --workdir.'
            ) from error
        handle.write(f'{socket.gethostname()} {os.getpid()} {time.time_ns()}\n')
        handle.flush()
        os.fsync(handle.fileno())
        yield lambda: _is_there(workdir / '.lock', os.fstat(handle.fileno()))


def _is_there(path: pathlib.Path, before: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), before)
    except OSError:
        return False


def holder(workdir: pathlib.Path) -> str:
    """Who took the folder last: by this hosts see whether they share it."""
    path = workdir / '.lock'
    return path.read_text() if path.exists() else ''
