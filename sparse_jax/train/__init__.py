"""Training: state, step, loop, checkpoints, metrics, sweeps, reports."""

from sparse_jax.train.loop import NonFiniteError, evaluate, train
from sparse_jax.train.state import Experiment, TrainState, create

__all__ = ['Experiment', 'NonFiniteError', 'TrainState', 'create', 'evaluate', 'train']
