"""Training: state, step, loop, checkpoints, metrics, report."""

from sparse_jax.train.loop import MODES, NonFiniteLossError, evaluate, train
from sparse_jax.train.state import Experiment, TrainState, create

__all__ = ['MODES', 'Experiment', 'NonFiniteLossError', 'TrainState', 'create', 'evaluate', 'train']
