"""Many runs from one command: a grid of settings, each run a process of its own; what is done is skipped, what was cut off goes on."""

import concurrent.futures
import copy
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import progress
from rich.console import Console

from sparse_jax import config as config_lib
from sparse_jax.runtime import hosts, records, workdir
from sparse_jax.train import metrics
from sparse_jax.train import run as run_lib
from sparse_jax.train import state as state_lib
from sparse_jax.train.result import headline

_LOG = logging.getLogger('sparse_jax')
_NAME_BYTES = 200
_LONGEST_RANGE = 1000  # of values in a grid

# A run ends with the sweep, however that ends (Linux: PR_SET_PDEATHSIG), and stays on its cores. Done in the child's first moments and not
# between fork and exec, as forking a process with jax's threads is unsafe.
_START = """
import ctypes, os, signal, sys
if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]): sys.exit('the sweep has ended')
    if sys.argv[2]: os.sched_setaffinity(0, [int(sys.argv[2])])
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


def parse(grids: Sequence[str]) -> list[dict[str, str]]:
    """The points of grids, each once, in order.

    Args:
      grids: each ``name=value,value;name=value``: all combinations. Several grids: one after the other. A value ``a:b`` stands for the
        whole numbers from a up to, not including, b; one with commas or semicolons of its own, as a mapping has, stands in braces.

    Returns:
      Settings as text, by name.

    Raises:
      ValueError: for a grid that is not of this form.

    Example:
      >>> parse(['sparsity.density=0.1,0.2;seed=0', 'sparsity.method=dense;seed=0'])[1:]
      [{'sparsity.density': '0.2', 'seed': '0'}, {'sparsity.method': 'dense', 'seed': '0'}]
      >>> [point['seed'] for point in parse(['seed=0:3,10'])]
      ['0', '1', '2', '10']
      >>> parse(['model.options={width=8,depth=2},{width=16,depth=2}'])[1]
      {'model.options': 'width=16,depth=2'}
    """
    points: list[dict[str, str]] = []
    for grid in grids:
        axes = []
        for axis in filter(None, _split(grid, ';')):
            name, equals, values = axis.partition('=')
            parts = [part.strip() for part in _split(values, ',')]
            if not equals or not all(parts):
                raise ValueError(f'--sweep={grid!r}: {axis!r} is not of the form name=value,value, such as seed=0,1,2.')
            axes.append([(name.strip(), value) for part in parts for value in _values(name.strip(), part)])
        if not axes:
            raise ValueError("--sweep is empty: give for instance --sweep='sparsity.density=0.05,0.1;seed=0,1,2'.")
        names = [axis[0][0] for axis in axes]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f'--sweep={grid!r}: {twice} is there twice: give all its values at once, {twice}=a,b.')
        points += [point for point in map(dict, itertools.product(*axes)) if point not in points]
    return points


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that are not within braces."""
    parts, depth = [''], 0
    for character in text:
        depth += {'{': 1, '}': -1}.get(character, 0)
        if depth < 0:
            break
        if character == separator and not depth:
            parts.append('')
        else:
            parts[-1] += character
    if depth:
        raise ValueError(
            f'--sweep: {text!r} has a brace without its other: a value that holds commas stands in braces, {{a=1,b=2}}.'
        )
    return parts


def _values(name: str, text: str) -> list[str]:
    """A value, one in braces, or those of a range."""
    if text.startswith('{') and text.endswith('}'):
        return [text[1:-1]]
    if not (found := re.fullmatch(r'(-?\d{1,10}):(-?\d{1,10})', text)):
        return [text]
    first, stop = map(int, found.groups())
    if not 0 < stop - first <= _LONGEST_RANGE:
        raise ValueError(
            f'--sweep: {name}={text} must have 1 to {_LONGEST_RANGE} numbers: from {first} up to, not including, {stop}.'
        )
    return [str(value) for value in range(first, stop)]


def names(points: Sequence[Mapping[str, str]]) -> list[str]:
    """A folder name for each point, the same in whatever sweep and order it stands, so that a sweep can be made larger.

    >>> names([{'sparsity.density': '0.1', 'seed': '0'}])
    ['seed=0,sparsity.density=0.1']
    """
    clean = lambda value: ''.join('_' if c in '/:*' or not c.isprintable() else c for c in value)
    return [_short(','.join(f'{name}={clean(point[name])}' for name in sorted(point))) for point in points]


def _short(name: str) -> str:
    """A name that file systems take, of 255 bytes with an ending: what is cut off is told apart by a hash."""
    encoded = name.encode()
    if len(encoded) <= _NAME_BYTES:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f'{encoded[: _NAME_BYTES - len(digest) - 1].decode(errors="ignore")}~{digest}'


def run(
    config: config_lib.Config, folder: pathlib.Path, *, grids: Sequence[str], command: Sequence[str], jobs: int = 1
) -> dict[str, Any]:
    """Trains every point of the grids that is not finished; one that fails does not stop the others.

    Args:
      config: the settings that all share.
      folder: of the sweep; each run has a workdir in it.
      grids: see :func:`parse`.
      command: arguments of Python that train the shared settings: the launcher and its flags, without a workdir.
      jobs: runs at a time; with several each has a CPU core of its own.

    Returns:
      As :func:`run_all`; :func:`raise_failed` raises if runs failed.

    Raises:
      ValueError: for anything wrong with the input, before a file is made.
    """
    experiments = {}
    for point in parse(grids):
        settings = _with(config, point)
        flat = config_lib.flatten(settings)
        # the values as they were read, so that 0.1 and 0.10 are one point
        experiments.setdefault(json.dumps(flat), ({name: str(flat[name]) for name in point}, settings))
    points = [point for point, _ in experiments.values()]
    runs = dict(zip((folder / name for name in names(points)), experiments.values(), strict=True))
    if len(runs) != len(points):
        raise ValueError('--sweep: two points have the same name: leave out values that differ in signs only.')
    _check(folder, runs)
    with workdir.locked(folder):
        before = _points(folder)
        all_runs = [*before, *(path.name for path in runs if path.name not in before)]
        records.write(folder / records.SWEEP, {'sweep': list(grids), 'command': list(command), 'runs': all_runs})
        tasks = {}
        for path, (point, _) in runs.items():
            flags = [f'--config.{name}={value}' for name, value in point.items()]
            tasks[path] = [*command, *flags, f'--workdir={path}']
        return run_all(tasks, jobs, folder / 'logs')


def raise_failed(outcome: Mapping[str, Any]) -> None:
    """Raises RuntimeError with a line for each run that failed, if any did; the others are done all the same.

    Args:
      outcome: from :func:`run`.

    Raises:
      NonFiniteError: where each of them would fail again.
      RuntimeError: for others.
    """
    if failed := outcome['failed']:
        total = outcome['done'] + outcome['skipped'] + len(failed)
        kind = state_lib.NonFiniteError if outcome['would_fail_again'] else RuntimeError
        raise kind(f'{len(failed)} of {total} runs failed, the others are done:\n' + '\n'.join(failed))


def _points(folder: pathlib.Path) -> list[str]:
    """Runs that the sweep in a folder has had so far."""
    try:
        return list(records.read(folder / records.SWEEP)['runs'])
    except records.UnreadableError:  # it is written anew; runs that are there show themselves by their workdirs
        return []


def _with(config: config_lib.Config, point: Mapping[str, str]) -> config_lib.Config:
    config = copy.deepcopy(config)
    for name, value in point.items():
        try:
            config_lib.override(config, name, value)
        except ValueError as error:
            raise ValueError(f'--sweep: {error}') from error
    config_lib.validate(config)
    return config


def _check(folder: pathlib.Path, runs: Mapping[pathlib.Path, tuple[Any, config_lib.Config]]) -> None:
    """Everything that can be wrong is found here, before a file is made; of runs that differ in the seed one is tried."""
    workdir.check_name(folder)
    foreign = folder.exists() and (
        not folder.is_dir()
        or (not (folder / records.SWEEP).exists() and any(p.name not in ('.lock', 'sweep.tmp') for p in folder.iterdir()))
    )
    if foreign:
        raise ValueError(f'--workdir={folder} holds something else than a sweep: give a new or an empty folder.')
    data, tried = {}, set()
    for path, (_, config) in runs.items():  # their numbers are in range already
        run_lib.check_names(config)
        workdir.check(config, path)
        metrics.check_tensorboard(config.log)
        settings = {name: value for name, value in config_lib.flatten(config).items() if name != 'seed'}
        if records.is_whole(path / records.RESULT) or json.dumps(settings) in tried:
            continue
        tried.add(json.dumps(settings))
        source = json.dumps({name: value for name, value in settings.items() if name.startswith('data.')})
        if source not in data:
            data = {source: run_lib.load_data(config)}  # one data set at a time
        run_lib.create_experiment(config, data[source])


def run_all(
    tasks: Mapping[pathlib.Path, Sequence[str]], jobs: int, logs: pathlib.Path, result: str = records.RESULT
) -> dict[str, Any]:
    """Runs what has no result yet, a few at a time, and shows what is left and how long it will take.

    Args:
      tasks: workdir to arguments of Python.
      jobs: at a time; with several each has a CPU core of its own.
      logs: folder for what the runs print.
      result: file of a workdir that says that it is done.

    Returns:
      ``done`` and ``skipped``, numbers of runs, ``failed``, a message for each that did, and ``would_fail_again``, whether a restart
      would change nothing about any of those.

    Raises:
      Preempted: at SIGTERM or Ctrl-C, which are passed on to the runs as SIGTERM, after they have ended.
    """
    left = [path for path in tasks if not records.is_whole(path / result)]
    logs.mkdir(parents=True, exist_ok=True)
    failed, futures, processes = [], [], _Processes(jobs)

    def stop(end: Callable[[], None] = processes.terminate) -> None:
        for future in futures:
            future.cancel()
        end()

    preemption = hosts.Preemption('stopping the runs, which save where they are; Ctrl-C once more ends at once.', stop)
    with preemption, concurrent.futures.ThreadPoolExecutor(jobs) as pool, _Progress(len(tasks), len(left)) as show:
        futures += [pool.submit(processes.run, path, tasks[path], logs / f'{path.name}.txt') for path in left]
        try:
            for future in concurrent.futures.as_completed(futures):
                if future.cancelled() or preemption.reached(0):
                    continue
                path, error = future.result()
                failed += [error] if error else []
                of = lambda path: headline(records.read(path / result)) if result == records.RESULT else 'done'
                show(error or f'{path.name}: {of(path)}')
        except BaseException:
            stop(processes.kill)
            raise
    if preemption.reached(0):
        done = sum(records.is_whole(path / result) for path in tasks)
        raise hosts.Preempted(
            f'stopped by {preemption.signal}: {done} of {len(tasks)} runs are done, and what was running has saved where it was: the same '
            'command goes on from there.'
        )
    final = all(code in (0, 2, 78) for code in processes.codes)
    return {'done': len(left) - len(failed), 'skipped': len(tasks) - len(left), 'failed': failed, 'would_fail_again': final}


class _Processes:
    """The runs that are going on, each a process of its own; with several at a time each has a CPU core."""

    def __init__(self, jobs: int):
        self.codes: list[int] = []  # that runs have ended with
        self._running: set[subprocess.Popen] = set()
        self._is_stopping = False
        self._cores: list[int | None] = [None] * jobs
        if jobs > 1 and hasattr(os, 'sched_getaffinity'):
            mine = sorted(os.sched_getaffinity(0))
            self._cores = [mine[i % len(mine)] for i in range(jobs)]

    def run(self, path: pathlib.Path, arguments: Sequence[str], log: pathlib.Path) -> tuple[pathlib.Path, str | None]:
        """Runs Python with these arguments to its end; gives the workdir back, and a message where that is not a good one."""
        core = self._cores.pop()
        try:
            with log.open('w') as file:
                first = [sys.executable, '-c', _START, str(os.getpid()), '' if core is None else str(core)]
                process = subprocess.Popen([*first, *arguments], stdout=file, stderr=subprocess.STDOUT)
                self._running.add(process)
                if self._is_stopping:  # while it was being started
                    process.terminate()
                code = process.wait()
                self._running.discard(process)
        finally:
            self._cores.append(core)
        self.codes.append(code)
        if code == 0:
            return path, None
        lines = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
        return path, f'{path.name} ended with {code}: {lines[-1] if lines else "it printed nothing"} (see {log})'

    def terminate(self) -> None:
        """Tells all of them to save and end."""
        self._is_stopping = True
        for process in list(self._running):
            process.terminate()

    def kill(self) -> None:
        """Ends all of them at once."""
        for process in list(self._running):
            process.kill()


class _Progress:
    """A bar on a terminal, a line for each run otherwise; both tell what is left and about how long it takes."""

    def __init__(self, total: int, left: int):
        self._total, self._left, self._done = total, left, 0
        self._bar = progress.Progress(
            progress.TextColumn('[bold]runs'), progress.BarColumn(bar_width=None), progress.MofNCompleteColumn(),
            progress.TextColumn('{task.fields[left]}'), console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def __enter__(self) -> Callable[[str], None]:
        self._begin = time.monotonic()
        self._bar.start()
        self._task = self._bar.add_task('', total=self._total, completed=self._total - self._left, left=f'{self._left} left')
        if self._bar.disable:
            _LOG.info('%d runs, %d of them done already', self._total, self._total - self._left)
        return self._show

    def _show(self, message: str) -> None:
        self._done += 1
        left = self._left - self._done
        seconds = (time.monotonic() - self._begin) / self._done * left
        hint = f'{left} left, about {seconds / 60:.0f} min' if left else 'all done'
        self._bar.update(self._task, advance=1, left=hint)
        if self._bar.disable:
            _LOG.info('run %d/%d  %s  (%s)', self._total - left, self._total, message, hint)
        else:
            self._bar.console.print(message)

    def __exit__(self, *error) -> None:
        self._bar.stop()
