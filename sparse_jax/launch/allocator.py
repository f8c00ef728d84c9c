"""Memory that a program on CPU keeps; the standard library only, as it restarts Python before anything is imported."""

import glob
import os
import sys

from sparse_jax._malloc import MALLOC as MALLOC


def _has_accelerator() -> bool:
    patterns = ('/dev/nvidia[0-9]*', '/dev/accel*', '/dev/vfio/[0-9]*')
    return os.environ.get('JAX_PLATFORMS') != 'cpu' and any(map(glob.glob, patterns))


def keep_memory() -> None:
    """Restarts this program in the same process with MALLOC in its environment.

    Does nothing where that is set, off Linux, or where an accelerator does the work.
    """
    if sys.platform.startswith('linux') and 'GLIBC_TUNABLES' not in os.environ and not _has_accelerator():
        os.environ['GLIBC_TUNABLES'] = MALLOC
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
