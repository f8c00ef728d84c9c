"""Training: state, step, loop, checkpoints, metrics, report."""

from sparse_jax.train.loop import MODES, NonFiniteError, evaluate, train
from sparse_jax.train.state import Experiment, TrainState, create

__all__ = ['MODES', 'Experiment', 'NonFiniteError', 'TrainState', 'create', 'evaluate', 'train']
