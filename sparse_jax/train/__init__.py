"""Training: state, step, loop, evaluation, optimizers, metrics, sweeps."""

from sparse_jax.train.evaluate import evaluate
from sparse_jax.train.experiment import create
from sparse_jax.train.exporting import export
from sparse_jax.train.loop import train
from sparse_jax.train.state import Experiment, NonFiniteError, TrainState

__all__ = ['Experiment', 'NonFiniteError', 'TrainState', 'create', 'evaluate', 'export', 'train']
