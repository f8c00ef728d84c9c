"""What a run leaves at its end: result.json, run.json, and what the report needs of the masks."""

import datetime
import platform
import resource
import shlex
import socket
import sys
from typing import Any

import jax
import numpy as np

from sparse_jax.models import attention
from sparse_jax.runtime import hosts, records
from sparse_jax.train import state as state_lib
from sparse_jax.train import storage
from sparse_jax.train.evaluate import results
from sparse_jax.train.run import Run

REPORT = 'report.png'  # of a finished run, drawn by the report; one of an earlier end of the run is deleted when it goes on
INPUT_COUNTS = 'input_counts.npy'  # int[height, width]: weights that each pixel of the image kept


def headline(result: dict[str, Any]) -> str:
    """A run's result in a few words.

    >>> headline({'test_accuracy': 0.934}), headline({'eval_loss': 1.5, 'validation_bits_per_byte': 2.164})
    ('93.40% test accuracy', 'validation loss 1.500 nats a token, 2.164 bits a byte')
    """
    if 'eval_loss' in result:
        bits = result.get('validation_bits_per_byte')
        return f'validation loss {result["eval_loss"]:.3f} nats a token' + ('' if bits is None else f', {bits:.3f} bits a byte')
    return f'{result["test_accuracy"]:.2%} test accuracy'


def finish(run: Run, state: state_lib.TrainState, seconds: float, mean_density: dict[str, float], start: int) -> dict[str, Any]:
    """Evaluates the last state, and writes what the run gives, on host 0.

    Args:
      run: that has ended.
      state: after its last step.
      seconds: that training took, over all restarts.
      mean_density: of each layer, on average over the steps.
      start: the step at which this process went on; 0 where it began anew.

    Returns:
      The content of ``result.json``, on all hosts.
    """
    result = _result(run, state, seconds, mean_density)
    hosts.run_on_host0(_write, run, result, _input_counts(run, state), start)
    return records.read(run.folder / records.RESULT)


def _result(run: Run, state: state_lib.TrainState, seconds: float, mean_density: dict[str, float]) -> dict[str, Any]:
    """The content of ``result.json``; computed on all hosts, since it counts sharded masks."""
    config, experiment = run.config, run.experiment
    sizes = state_lib.sizes(experiment, state)
    result = {
        'model': config.model.name,
        'data': config.data.name,
        'method': config.sparsity.method,
        'steps': experiment.total_steps,
        'parameters': sizes.parameters,
        'nonzeros': sizes.nonzeros,
        'density': sizes.density,
        'layers': sizes.layers,
        **({'data_fingerprint': run.data.fingerprint} if run.data.fingerprint else {}),
        **results(run, state),
    }
    masks = None if config.sparsity.method == 'dense' else run.devices.host(storage.masks(state))
    result |= state_lib.operations(experiment, state, mean_density, masks)
    result['operations_training'] *= (experiment.total_steps - experiment.start_step) * config.data.batch_size
    if masks is not None and (explored := storage.exploration_rate(state)) is not None:
        result['exploration_rate'] = explored
    steps = experiment.total_steps - experiment.start_step
    return result | {'seconds': round(seconds, 3), 'steps_per_second': round(steps / max(seconds, 1e-9), 3)}


def _write(run: Run, result: dict[str, Any], input_counts: np.ndarray | None, start: int) -> None:
    if input_counts is not None:
        with records.replacing(run.folder / INPUT_COUNTS, '.tmp.npy') as partial:
            np.save(partial, input_counts)
    records.write(run.folder / records.MACHINE, _machine(run, start))
    records.write(run.folder / records.RESULT, result)  # last: its presence says that the run is finished


def _machine(run: Run, start: int) -> dict[str, Any]:
    """The content of ``run.json``: when, where and on what the run ended, which may differ between runs with the same result."""
    mesh = run.devices.mesh
    return {
        'finished': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'command': shlex.join(sys.argv),
        'resumed_at': start,
        'host': socket.gethostname(),
        'platform': platform.platform(),
        'device': jax.devices()[0].device_kind,
        'devices': jax.device_count() if mesh else 1,
        'processes': jax.process_count(),
        'mesh': dict(mesh.shape) if mesh else None,
        'kernels': run.config.sparsity.kernels,
        **({'attention': _attention(run)} if run.config.model.name == 'transformer' else {}),
        'jax': jax.__version__,
        'python': sys.version.split()[0],
        'max_memory_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **_device_memory(),
    }


def _device_memory() -> dict[str, int]:
    """The most memory that one of this host's devices has held, where devices count it; a CPU's is the process's."""
    counted = [
        stats['peak_bytes_in_use'] for x in jax.local_devices() if (stats := x.memory_stats()) and 'peak_bytes_in_use' in stats
    ]
    return {'max_device_memory_mib': max(counted) // 2**20} if counted else {}


def _attention(run: Run) -> str:
    """What computed attention in the training step."""
    config, length = run.config, run.experiment.example.shape[1]
    shape = (
        config.data.batch_size // config.train.accumulate,
        length,
        config.model.heads,
        config.model.features // config.model.heads,
    )
    return attention.choose(shape, config.model.dtype).implementation


def _input_counts(run: Run, state: state_lib.TrainState) -> np.ndarray | None:
    """Weights that each pixel of the image kept, where the first layer takes the image as a vector."""
    if run.config.model.name != 'lenet300' or run.config.sparsity.method == 'dense':
        return None
    mask = storage.masks(state)['fc1']['kernel']
    if mask.ndim == 0:
        return None
    return run.devices.host(mask.sum(axis=1)).reshape(run.data.input_shape).sum(axis=-1)
