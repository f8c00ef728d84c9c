"""Numbers to look at: density, exploration, flips, shares, dead neurons, memory, operations. For logging, on concrete arrays."""

from sparse_jax.stats.memory import memory
from sparse_jax.stats.operations import LayerOperations, Operations, operations
from sparse_jax.stats.tables import (
    dead_neurons,
    dense_leaves,
    density,
    exploration_rate,
    flip_rate,
    layer_nonzeros,
    nonzeros,
    summary,
    table,
)

__all__ = [
    'LayerOperations',
    'Operations',
    'dead_neurons',
    'dense_leaves',
    'density',
    'exploration_rate',
    'flip_rate',
    'layer_nonzeros',
    'memory',
    'nonzeros',
    'operations',
    'summary',
    'table',
]
