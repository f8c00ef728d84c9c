"""The launcher: ``python launch.py`` in a clone, the command ``sparse-jax`` where the package is installed with its extra ``train``."""

import importlib.util
import os
import sys

from sparse_jax.launch import allocator

_NEEDED = ('absl', 'ml_collections')


def run() -> None:
    """Does what the command line says; ends the process."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        print(f"error: the launcher needs {' and '.join(missing)}: pip install 'sparse_jax[train]'.", file=sys.stderr)
        sys.exit(2)
    allocator.keep_memory()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # jaxlib's notes to its developers
    from sparse_jax.launch import main

    main.run()
