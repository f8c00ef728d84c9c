"""Many hosts: how they find each other, agree on what is wrong, and stop together. All of it works on one host too."""

import ipaddress
import json
import logging
import os
import signal
import socket
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
_TEXT_BYTES = 2**14  # of one message between hosts
T = TypeVar('T')


class Preempted(RuntimeError):
    """The run was told to stop (SIGTERM), and has saved where it is."""


class Unreachable(RuntimeError):
    """The hosts did not find each other."""


def arguments(
    environ: Mapping[str, str], *, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> dict[str, Any]:
    """Keyword arguments for ``jax.distributed.initialize``: from flags, else from xpk's variables, else none, so that JAX detects the cluster.

    JAX detects SLURM, Open MPI, Kubernetes, GKE and Cloud TPU. It misreads xpk's variables, whose address has no port.

    Args:
      environ: the environment variables.
      coordinator: host:port of process 0.
      num_processes: the number of processes.
      process_id: the index of this process.

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
    options: dict[str, Any] = {}
    per_node = environ.get('SLURM_STEP_TASKS_PER_NODE', environ.get('SLURM_TASKS_PER_NODE', ''))
    visible = [gpu for gpu in environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if gpu.strip()]
    if 'SLURM_PROCID' in environ and per_node.partition('(')[0] == '1' and len(visible) > 1:
        options['local_device_ids'] = list(range(len(visible)))  # JAX would take one GPU a task
    return options


def bind_address(coordinator: str) -> str | None:
    """Where process 0 should listen, so that only those reach it who reach the address that was given; JAX alone would take all interfaces.

    Args:
      coordinator: host:port of process 0.

    Returns:
      IP address and port; None where the host is no address of this machine, as behind a translation of addresses, or is a name that
      means other machines on them (many give their own name the address 127.0.1.1): then on all interfaces.

    Example:
      >>> bind_address('127.0.0.1:6002'), bind_address('192.0.2.1:6002')
      ('127.0.0.1:6002', None)
    """
    host, _, port = coordinator.rpartition(':')
    host = host.strip('[]')
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.bind(where)
    except OSError:
        return None
    address = str(where[0])
    if ipaddress.ip_address(address.partition('%')[0]).is_loopback and host not in ('localhost', address):
        return None
    return f'[{address}]:{port}' if family == socket.AF_INET6 else f'{address}:{port}'


def _checked(address, count, index, source: str) -> dict[str, Any]:
    host, colon, port = (address or '').rpartition(':')
    if not (host and colon and port.isdigit()):
        raise ValueError(f'the coordinator {address!r} ({source}) must be host:port, such as 10.0.0.1:1234.')
    if count < 1 or not 0 <= index < count:
        raise ValueError(f'process {index} of {count} ({source}) does not exist: they are 0 to {max(count, 1) - 1}.')
    return {'coordinator_address': address, 'num_processes': count, 'process_id': index}


def initialize(cluster: dict[str, Any], *, initialization_timeout: int = 120, heartbeat_timeout: int = 30) -> None:
    """Joins the other hosts. From then on this process ends soon after one of them does.

    Args:
      cluster: keyword arguments from :func:`arguments`.
      initialization_timeout: seconds within which all hosts must join.
      heartbeat_timeout: seconds of silence after which a host counts as dead, and all others end.

    Raises:
      ValueError: if no cluster is detected and none is given.
      Unreachable: if process 0 cannot be reached. If hosts do not join in time, the process prints one line and exits with code 70.
    """
    options: dict[str, Any] = dict(
        initialization_timeout=initialization_timeout + 60,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
    )
    if 'coordinator_address' in cluster:
        options['cluster_detection_method'] = 'deactivate'
        if cluster.get('process_id') == 0:
            options['coordinator_bind_address'] = bind_address(cluster['coordinator_address'])
    where = cluster.get('coordinator_address', 'the coordinator')
    # When time is up, jaxlib aborts the process with a page of C++: this timer is earlier, and prints one line.
    in_time = threading.Timer(initialization_timeout, _not_in_time, (where, initialization_timeout))
    in_time.daemon = True
    in_time.start()
    try:
        jax.distributed.initialize(**cluster, **options)
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
    exit_now(70)


def _end(kind, error, trace) -> None:
    traceback.print_exception(kind, error, trace)
    exit_now(70)


def exit_now(code: int) -> None:
    """Ends this process without the barriers in which it would wait for peers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_host0() -> bool:
    """Whether this is process 0, the one that writes files and prints."""
    return jax.process_index() == 0


def allgather_text(text: str) -> list[str]:
    """Each host's text, on all hosts, in the order of their process indices."""
    encoded = text.encode()[:_TEXT_BYTES]
    row = np.zeros(_TEXT_BYTES, np.uint8)
    row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, _TEXT_BYTES)
    return [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in rows]


def run_on_all_hosts(function: Callable[..., T], *args) -> T:
    """Calls a function on every host. A ValueError on one host is raised on all, so that no host waits for one that has stopped.

    Args:
      function: is called on every host; it must not communicate with other hosts.
      *args: its arguments.

    Returns:
      What the function returned on this host.
    """
    if jax.process_count() == 1:
        return function(*args)
    message, result = '', None
    try:
        result = function(*args)
    except ValueError as error:
        message = str(error) or 'ValueError'
    for host, reported in enumerate(allgather_text(message)):
        if reported:
            raise ValueError(reported if reported == message else f'{reported} (on host {host})')
    return result  # type: ignore[return-value]


def run_on_host0(function: Callable[..., T], *args) -> T | None:
    """Calls a function on host 0 only, and waits for it on all hosts. Its ValueError is raised on all."""
    return run_on_all_hosts(lambda: function(*args) if is_host0() else None)


def broadcast_from_host0(function: Callable[..., T], *args) -> T:
    """Calls a function on host 0 only, and returns its result, sent as JSON, on all hosts."""
    if jax.process_count() == 1:
        return function(*args)
    return json.loads(allgather_text(json.dumps(function(*args)) if is_host0() else '')[0])


def assert_equal_on_all_hosts(values: Mapping[str, Any]) -> None:
    """Raises ValueError, on all hosts, naming those values that are not the same on every host."""
    if jax.process_count() == 1:
        return
    # Digests, so that all of them fit into one message.
    digests = {name: zlib.crc32(json.dumps(value, default=str).encode()) for name, value in values.items()}
    first, *others = map(json.loads, allgather_text(json.dumps(digests)))
    for host, other in enumerate(others, start=1):
        if different := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
            raise ValueError(
                f'host {host} was started otherwise than host 0: {", ".join(different)} differ. Start all with the same command.'
            )


class Preemption:
    """Whether the run was told to stop, by SIGTERM to any host. All hosts ask after each step, and get the same answer.

    One process alone stops at Ctrl-C too; at a second one at once.
    """

    def __init__(self, told: str = 'stopping after this step, which is saved; Ctrl-C once more ends at once.', act=lambda: None):
        """Args: told: what Ctrl-C is answered. act: called at each signal."""
        self._told, self._act = told, act

    def __enter__(self):
        self.signal, self._signalled, self._before = 'SIGTERM', False, {}
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            # a process in the background, which a shell has told to ignore Ctrl-C, goes on ignoring it
            numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number, frame) -> None:
        del frame
        if number == signal.SIGINT and self._signalled:
            raise KeyboardInterrupt
        self.signal, self._signalled = signal.Signals(number).name, True
        if number == signal.SIGINT:
            print(self._told, file=sys.stderr)
        self._act()

    def reached(self, step: int) -> bool:
        """Whether to stop after this step, which must be the same on all hosts."""
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self._signalled

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
