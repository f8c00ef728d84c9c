"""Where a run's numbers go while it trains, and that they are finite."""

import collections
import math
import time
from typing import Any

import jax

from sparse_jax.runtime import hosts
from sparse_jax.train import metrics, storage
from sparse_jax.train import state as state_lib
from sparse_jax.train.run import Run


class Log:
    """Where a run's numbers go while it trains: metrics.jsonl and the progress shown on host 0, nowhere on the others."""

    def __init__(self, run: Run, state: state_lib.TrainState, start: int, *, is_new: bool):
        self._experiment = experiment = run.experiment
        sizes = state_lib.sizes(experiment, state)
        self._layers = sizes.layers
        self._writer = self._progress = metrics.Silent()
        if hosts.is_host0():
            logged = 0 if is_new else start // run.config.log.every * run.config.log.every
            self._writer = metrics.Writer(run.folder, run.config.log, step=0 if is_new else start, logged=logged)
            self._progress = metrics.Progress(experiment.total_steps, start)
        self._step_metrics = _StepMetrics()
        self._shown: dict[str, float] = {}
        self._last_step, self._last_time = start, 0.0
        if is_new and run.config.sparsity.method != 'dense':
            self._density(start, sizes, {})

    def begin(self) -> None:
        """Starts the clock."""
        self._last_time = time.perf_counter()

    def step(self, step: int, values: dict[str, jax.Array]) -> None:
        """Metrics of a step."""
        self._step_metrics.add(step, values)

    def mask_update(self, step: int, state: state_lib.TrainState, sizes: state_lib.Sizes) -> None:
        """What an update of the masks did."""
        updates = jax.device_get(state.opt_state.stats)
        by_layer = {
            name: dict(zip(self._layers, getattr(updates, name).tolist(), strict=True)) for name in ('share', 'pruned', 'grown')
        }
        numbers: dict[str, Any] = {**by_layer, 'flips': int(updates.flipped.sum())}
        if (explored := storage.exploration_rate(state)) is not None:
            numbers['exploration_rate'] = explored
        self._density(step, sizes, numbers)

    def _density(self, step: int, sizes: state_lib.Sizes, values: dict[str, Any]) -> None:
        density = {name: count / size for name, (count, size) in sizes.layers.items()}
        self._writer.write(step, {'density': density, **values})

    def means(self, step: int) -> None:
        """Means of the steps since the last call, and the rates of now."""
        experiment, means = self._experiment, self._step_metrics.means()
        now = time.perf_counter()
        numbers = {**means, 'learning_rate': _number(experiment.learning_rate(step - 1))}
        if experiment.prune_rate is not None:
            numbers['prune_rate'] = _number(experiment.prune_rate(step))
        speed = (step - self._last_step) / (now - self._last_time)
        self._writer.write(step, {**numbers, 'steps_per_second': speed})
        self._last_step, self._last_time = step, now
        self._shown |= {**means, 'steps_per_second': speed}
        self._progress.show(step, self._shown)

    def evaluation(self, step: int, part: str, values: dict[str, float]) -> None:
        """Loss and accuracy of a part of the data."""
        named = {f'{part}_{name}': value for name, value in values.items()}
        self._writer.write(step, named)
        self._shown |= {f'{part}_accuracy': named[f'{part}_accuracy']}

    def close(self) -> None:
        self._progress.close()
        self._writer.close()


def _number(x: Any) -> float:
    return float(x)


_QUEUED = 8  # steps on an accelerator whose metrics are not there yet, until the oldest are waited for; on CPU one


class _StepMetrics:
    """Collects each step's metrics, fetched after later steps have been dispatched, so that fetching never stalls the device."""

    def __init__(self):
        self._pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._collected: list[dict[str, float]] = []
        self._most = 1 if jax.default_backend() == 'cpu' else _QUEUED

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        self._fetch(self._most - 1)
        for value in values.values():
            value.copy_to_host_async()
        self._pending.append((step, values))

    def _fetch(self, left: int) -> None:
        """Waits for all but the last so many."""
        while len(self._pending) > left:
            step, values = self._pending.popleft()
            fetched = {k: float(v) for k, v in jax.device_get(values).items()}
            if not math.isfinite(fetched['loss']):
                raise state_lib.NonFiniteError(f'the loss is {fetched["loss"]} at step {step}: lower optimizer.learning_rate.')
            self._collected.append(fetched)

    def means(self) -> dict[str, float]:
        """Means since the last call."""
        self._fetch(0)
        rows, self._collected = self._collected, []
        return {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}
