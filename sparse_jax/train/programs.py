"""The programs of a run's steps: with and without dense gradients, and with and without an update of the masks.

On an accelerator a step takes milliseconds and compiling one a minute: all that a run will need are compiled while the first one runs.
"""

import concurrent.futures
import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sparse_jax.runtime import memory
from sparse_jax.train import devices as devices_lib
from sparse_jax.train import state as state_lib

_LOG = logging.getLogger('sparse_jax')


class Kind(NamedTuple):
    """Which of the programs a step takes."""

    dense_gradients: bool
    mask_update: bool  # within the step; compact storage moves masks after it


def kind_of(experiment: state_lib.Experiment, step: int) -> Kind:
    """The program of a step, by its number, 1-based."""
    return Kind(experiment.needs_dense_gradient(step), experiment.storage == 'dense' and experiment.is_mask_update(step))


def ahead(experiment: state_lib.Experiment, start: int) -> list[Kind]:
    """The programs of the steps after this one and of the next intervals between updates, in the order in which they are needed."""
    if experiment.storage == 'compact':  # states with scores are not there yet, and rooms may change
        return []
    stop = min(experiment.total_steps, start + 3 * max(1, experiment.update_every))
    return list(dict.fromkeys(kind_of(experiment, step) for step in range(start + 1, stop + 1)))


class Programs:
    """Calls the program of a step; compiled when it is first called, or by :meth:`compile` before."""

    def __init__(self, devices: devices_lib.Devices, experiment: state_lib.Experiment):
        options: dict[str, Any] = dict(donate_argnums=0, static_argnames='dense_gradients')
        out = devices.replicated if devices.mesh is None else (devices.step_shardings, devices.replicated)
        plain, moving = (functools.partial(experiment.train_step, mask_update=moves) for moves in (False, True))
        frugal = memory.frugal_compiler_options()
        self._jitted: dict[bool, Any] = {
            False: devices.jit(plain, out, **options),
            True: devices.jit(moving, out, **options, compiler_options=frugal),
        }
        self._compiled: dict[Kind, concurrent.futures.Future] = {}

    def compile(self, kinds: Sequence[Kind], state: Any, batch: Any, patterns: Any) -> None:
        """Begins to compile programs in a thread, one after the other.

        Args:
          kinds: which, the first one needed first.
          state: as the step takes it, here and below: arrays, of which the shapes and shardings count.
          batch: arrays.
          patterns: arrays, or None.
        """
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, batch, patterns))
        if len(kinds) > 1:
            _LOG.info(
                'compiling %d programs in the background: steps with dense gradients and mask updates among them.', len(kinds)
            )
        pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='compile')
        for kind in kinds:
            self._compiled[kind] = pool.submit(self._compile, kind, arguments)
        pool.shutdown(wait=False)

    def _compile(self, kind: Kind, arguments: Any) -> Any:
        return self._jitted[kind.mask_update].lower(*arguments, dense_gradients=kind.dense_gradients).compile()

    def __call__(self, kind: Kind, state: Any, batch: Any, patterns: Any) -> tuple[Any, dict[str, jax.Array]]:
        """A step: the state after it, and its metrics."""
        if kind in self._compiled:
            try:
                return self._compiled[kind].result()(state, batch, patterns)
            except TypeError:  # of other patterns than it was compiled for: their lists have grown, or their kernels changed
                del self._compiled[kind]
        return self._jitted[kind.mask_update](state, batch, patterns, dense_gradients=kind.dense_gradients)

    def forget(self) -> None:
        """Drops the programs of shapes that will not come again."""
        for jitted in self._jitted.values():
            jitted.clear_cache()

    def close(self) -> None:
        """Gives up what is not compiled yet."""
        for future in self._compiled.values():
            future.cancel()
