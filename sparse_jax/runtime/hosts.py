"""Many hosts: how they find each other, agree on what is wrong, and stop together. One host is the case of one."""

import json
import logging
import os
import signal
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_LOG = logging.getLogger('sparse_jax')
_TEXT = 2**14  # bytes that hosts tell each other at a time
T = TypeVar('T')


class Preempted(RuntimeError):
    """The run was told to stop (SIGTERM), and has saved where it is."""


class Unreachable(RuntimeError):
    """The hosts did not find each other."""


def arguments(
    environ: Mapping[str, str], *, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> dict[str, Any]:
    """What ``jax.distributed.initialize`` is to be told: by flags, else by xpk's variables, else nothing, and JAX looks by itself.

    JAX knows SLURM, Open MPI, Kubernetes, GKE and Cloud TPU. xpk's variables it misreads: the address has no port.

    Args:
      environ: the environment.
      coordinator: host:port of process 0.
      num_processes: how many processes there are.
      process_id: of this one.

    Returns:
      Keyword arguments.

    Raises:
      ValueError: where only some of the flags are given, or numbers do not fit together.

    Example:
      >>> arguments({'JAX_COORDINATOR_ADDRESS': 'a', 'JAX_COORDINATOR_PORT': '6002', 'NNODES': '2', 'NODE_RANK': '1'})
      {'coordinator_address': 'a:6002', 'num_processes': 2, 'process_id': 1}
    """
    flags = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
    if any(value is not None for value in flags.values()):
        if missing := [f'--{name}' for name, value in flags.items() if value is None]:
            raise ValueError(
                f'{", ".join(missing)} is missing: give --coordinator, --num_processes and --process_id together, or none.'
            )
        return _checked(coordinator, num_processes, process_id, '--coordinator, --num_processes, --process_id')
    if 'JAX_COORDINATOR_ADDRESS' in environ and ('NNODES' in environ or 'JAX_PROCESS_COUNT' in environ):
        address = environ['JAX_COORDINATOR_ADDRESS']
        if ':' not in address:
            address += ':' + environ.get('JAX_COORDINATOR_PORT', '1234')
        try:
            if 'NNODES' in environ:  # on GPU
                count, index = int(environ['NNODES']), int(environ['NODE_RANK'])
            else:
                count = int(environ['JAX_PROCESS_COUNT'])
                each = int(environ.get('PROCESSES_IN_JOB', '1'))
                index = int(environ.get('JOB_INDEX', '0')) * each + int(environ['JOB_COMPLETION_INDEX'])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"xpk's variables are incomplete ({error}): NNODES and NODE_RANK, or JAX_PROCESS_COUNT and JOB_COMPLETION_INDEX."
            ) from error
        return _checked(address, count, index, "xpk's variables")
    found: dict[str, Any] = {}
    per_node = environ.get('SLURM_STEP_TASKS_PER_NODE', environ.get('SLURM_TASKS_PER_NODE', ''))
    visible = [gpu for gpu in environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if gpu.strip()]
    if 'SLURM_PROCID' in environ and per_node.partition('(')[0] == '1' and len(visible) > 1:
        found['local_device_ids'] = list(range(len(visible)))  # JAX would take one GPU a task
    return found


def _checked(address, count, index, source: str) -> dict[str, Any]:
    host, colon, port = (address or '').rpartition(':')
    if not (host and colon and port.isdigit()):
        raise ValueError(f'the coordinator {address!r} ({source}) must be host:port, such as 10.0.0.1:1234.')
    if count < 1 or not 0 <= index < count:
        raise ValueError(f'process {index} of {count} ({source}) does not exist: they are 0 to {max(count, 1) - 1}.')
    return {'coordinator_address': address, 'num_processes': count, 'process_id': index}


def initialize(known: dict[str, Any], *, initialization_timeout: int = 120, heartbeat_timeout: int = 30) -> None:
    """Joins the other hosts; from then on this process ends soon after one of them does.

    Args:
      known: from :func:`arguments`.
      initialization_timeout: seconds for all hosts to come.
      heartbeat_timeout: seconds after which a host that is not heard of counts as dead, and all others end.

    Raises:
      ValueError: where nothing tells which hosts there are.
      Unreachable: where the first one cannot be reached. Where they do not come in time, the process ends with a line and exit code 70.
    """
    options: dict[str, Any] = dict(
        initialization_timeout=initialization_timeout + 60,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
    )
    if 'coordinator_address' in known:
        options['cluster_detection_method'] = 'deactivate'
    where = known.get('coordinator_address', 'the coordinator')
    # jaxlib ends the process with a page of C++ when time is over: we are quicker, with a line.
    in_time = threading.Timer(initialization_timeout, _not_in_time, (where, initialization_timeout))
    in_time.daemon = True
    in_time.start()
    try:
        jax.distributed.initialize(**known, **options)
    except ValueError as error:
        raise ValueError(
            f'--distributed: no cluster was found ({str(error).splitlines()[0]}): start it under SLURM, Open MPI, Kubernetes or on TPU, '
            'or give --coordinator=HOST:PORT --num_processes=N --process_id=I.'
        ) from error
    except Exception as error:  # of several kinds, as jaxlib's releases go
        reason = str(error).strip().splitlines()[0][:200] or type(error).__name__
        raise Unreachable(f'{where} was not reached ({reason}): is process 0 running there, and the port free and open?') from error
    finally:
        in_time.cancel()
    # Where a peer dies, the collective raises here, and this process is to end: not to wait in barriers for the dead.
    sys.excepthook = _end


def _not_in_time(where: str, seconds: int) -> None:
    print(
        f'error: {where} was not reached, or not all hosts came, within --initialization_timeout={seconds} s: start all of them, '
        'with the same --coordinator and --num_processes.',
        file=sys.stderr,
    )
    leave(70)


def _end(kind, error, trace) -> None:
    traceback.print_exception(kind, error, trace)
    leave(70)


def leave(code: int) -> None:
    """Ends this process without the barriers in which it would wait for peers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def _told(text: str) -> list[str]:
    """What each host says."""
    encoded = text.encode()[:_TEXT]
    row = np.zeros(_TEXT, np.uint8)
    row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, _TEXT)
    return [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in rows]


def together(function: Callable[..., T], *args) -> T:
    """Calls a function on every host; where it raises ValueError on one, it raises on all, so that none is waited for."""
    if jax.process_count() == 1:
        return function(*args)
    message, result = '', None
    try:
        result = function(*args)
    except ValueError as error:
        message = str(error) or 'ValueError'
    for host, told in enumerate(_told(message)):
        if told:
            raise ValueError(told if told == message else f'{told} (on host {host})')
    return result  # type: ignore[return-value]


def first(function: Callable[..., T], *args) -> T | None:
    """Calls a function on the first host only; its ValueError is raised on all."""
    return together(lambda: function(*args) if is_first() else None)


def from_first(function: Callable[..., T], *args) -> T:
    """What a function gives on the first host, told to all; JSON."""
    if jax.process_count() == 1:
        return function(*args)
    return json.loads(_told(json.dumps(function(*args)) if is_first() else '')[0])


def check_same(named: Mapping[str, Any]) -> None:
    """Raises ValueError, on all hosts, where these are not the same everywhere."""
    if jax.process_count() == 1:
        return
    # each by its digest: all of them fit into one message
    digests = {name: zlib.crc32(json.dumps(value, default=str).encode()) for name, value in named.items()}
    texts = _told(json.dumps(digests))
    for host, text in enumerate(texts):
        other = json.loads(text)
        if different := sorted(name for name in digests.keys() | other.keys() if json.loads(texts[0]).get(name) != other.get(name)):
            raise ValueError(
                f'host {host} was started otherwise than host 0: {", ".join(different)} differ. Start all with the same command.'
            )


class Preemption:
    """Whether the run was told to stop: SIGTERM to any host; asked after each step, by all, and answered alike."""

    def __enter__(self):
        self._told, self._before = False, None
        self._alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._alone:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number, frame) -> None:
        del number, frame
        self._told = True

    def reached(self, step: int) -> bool:
        """Args: step: the same on all hosts."""
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self._told

    def __exit__(self, *_) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)
