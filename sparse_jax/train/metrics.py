"""Where numbers go while a run trains: metrics.jsonl always, a progress bar or log lines, TensorBoard if asked for."""

import datetime
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from rich import progress
from rich.table import Column

from sparse_jax import config as config_lib
from sparse_jax.core import errors, references
from sparse_jax.runtime import records
from sparse_jax.train import console

_LOG = logging.getLogger('sparse_jax')


class Writer:
    """Appends dictionaries with a ``step`` to metrics.jsonl; on resume drops what is after the checkpoint.

    The file is for people: nothing that a run computes depends on it. One that is damaged is told and kept aside, and its good lines go on.
    """

    def __init__(self, workdir: pathlib.Path, settings: config_lib.Log, *, step: int, logged: int):
        """Args: step: of the checkpoint, 0 for a new run. logged: the last step up to it that the log has a line of."""
        self._callback = callback(settings)
        path = workdir / records.METRICS
        kept = _kept(path, step, logged) if step else []
        with records.replacing(path) as partial:
            partial.write_text(''.join(line + '\n' for line in kept))
        self._file = path.open('a', buffering=1)
        self._events = _summary_writer(workdir) if settings.tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line; values are numbers or dictionaries of numbers by layer."""
        self._file.write(json.dumps({'step': step, **values}) + '\n')
        if self._callback is not None:
            self._callback(step, values)
        if self._events is not None:
            for name, value in values.items():
                named = value.items() if isinstance(value, dict) else [('', value)]
                for layer, number in named:
                    self._events.add_scalar(f'{name}/{layer}' if layer else name, number, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _kept(path: pathlib.Path, step: int, logged: int) -> list[str]:
    """The lines up to a step; says so where some are missing."""
    rows, wrong = records.read_rows(path)
    kept = [row for row in rows if row.values['step'] <= step]
    last = max((row.values['step'] for row in kept), default=0)
    if wrong:
        _LOG.warning('%s: %s. It was put aside as %s; what can be read of it goes on.', path, wrong, records.put_aside(path))
    elif last < logged:
        _LOG.warning('%s: its lines of the steps from %d to %d are lost.', path, last + 1, step)
    return [row.text for row in kept]


def _summary_writer(workdir: pathlib.Path):
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(workdir / 'tensorboard'))


def check_tensorboard(settings: config_lib.Log) -> None:
    """Raises ValueError where TensorBoard is asked for and the extra is not installed."""
    if not settings.tensorboard:
        return
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise ValueError("log.tensorboard=True needs tensorboardX: pip install 'sparse_jax[tensorboard]'.") from error


def callback(settings: config_lib.Log) -> Callable[[int, dict[str, Any]], Any] | None:
    """The function of the user's that gets each line of metrics; ValueError where it is none. None: none is named."""
    if not settings.callback:
        return None
    if not references.is_reference(settings.callback):
        raise ValueError(f'config.log.callback={settings.callback!r}: must be mypackage.module:function.')
    function = references.load('config.log.callback', settings.callback)
    if not callable(function):
        raise ValueError(
            f'config.log.callback={settings.callback!r}: must be a function (step, values), got {type(function).__name__}.'
        )
    errors.check_takes(f'config.log.callback={settings.callback!r}', function, '(step, values)')
    return function


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl, as far as they can be read."""
    return [row.values for row in records.read_rows(workdir / records.METRICS)[0]]


_WIDE = 110  # letters of a terminal that has room for all numbers beside the bar
_BAR = 8


def numbers(values: dict[str, float], *, wide: bool = True) -> str:
    """The latest numbers in a few words; those that matter most where there is little room.

    >>> numbers({'loss': 0.3221, 'accuracy': 0.91, 'test_accuracy': 0.9, 'steps_per_second': 123.4})
    'loss 0.322  accuracy 91.0%  test 90.0%  123 steps/s'
    >>> numbers({'loss': 0.3221, 'accuracy': 0.91, 'test_accuracy': 0.9, 'steps_per_second': 123.4}, wide=False)
    'loss 0.322  test 90.0%  123 steps/s'
    """
    words = {'loss': f'loss {values["loss"]:#.3g}'} if 'loss' in values else {}
    for name in sorted(values):  # of training first
        if name.endswith('accuracy'):
            words[name] = f'{name.removesuffix("_accuracy")} {values[name]:.1%}'
    if 'steps_per_second' in values:
        speed = values['steps_per_second']
        words['steps_per_second'] = f'{speed:,.0f} steps/s' if speed >= 100 else f'{speed:.3g} steps/s'
    if not wide and len(words) > 3:
        words.pop('accuracy', None)
    return '  '.join(words.values())


class Progress:
    """A bar on a terminal, a log line every tenth of the run otherwise."""

    def __init__(self, total: int, start: int):
        self._total = total
        self._interval = max(1, total // 10)
        self._shown = self._start = start
        self._begin = time.perf_counter()
        self._bar = None
        if sys.stderr.isatty():
            terminal = console.stderr()
            self._wide = terminal.width >= _WIDE
            columns = (
                progress.BarColumn(bar_width=None if self._wide else _BAR),
                progress.MofNCompleteColumn(),
                progress.TextColumn('{task.fields[numbers]}', table_column=Column(no_wrap=True)),
                progress.TimeRemainingColumn(compact=True),
            )
            self._bar = progress.Progress(*columns, console=terminal, refresh_per_second=4, expand=self._wide)
            self._task = self._bar.add_task('', total=total, completed=start, numbers='compiling')
            self._bar.start()
        elif start < total:
            _LOG.info('compiling the training step.')

    def show(self, step: int, values: dict[str, float]) -> None:
        """The latest numbers, at the given step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers(values, wide=self._wide))
        elif step // self._interval > self._shown // self._interval or step == self._total:
            self._shown = step
            left = (time.perf_counter() - self._begin) / (step - self._start) * (self._total - step)
            ahead = f'  {datetime.timedelta(seconds=round(left))} left' if step < self._total else ''
            _LOG.info('step %d/%d  %s%s', step, self._total, numbers(values), ahead)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Silent:
    """In place of :class:`Writer` and :class:`Progress` on hosts that write and show nothing."""

    def write(self, step: int, values: dict[str, Any]) -> None: ...

    def show(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...
