"""The sparse algorithm as one optax transformation; jax and optax only.

Read it in this order: :mod:`~sparse_jax.core.sparsify`, :mod:`~sparse_jax.core.masks`, :mod:`~sparse_jax.core.criteria`,
:mod:`~sparse_jax.core.allocation`, :mod:`~sparse_jax.core.selection`.
"""
