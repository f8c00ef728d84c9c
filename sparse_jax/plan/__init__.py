"""Which hardware, which parallelism, which density: arithmetic on a config, before anything runs. See :mod:`sparse_jax.plan.answers`."""
