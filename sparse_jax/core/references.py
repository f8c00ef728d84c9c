"""Things that a setting names by where they are: ``package.module:name``."""

import importlib
import os
import sys
from typing import Any

from sparse_jax.core import errors


def is_reference(text: str) -> bool:
    """Whether a setting's value is ``package.module:name``.

    >>> is_reference('mypackage.nets:MyNet'), is_reference('lenet300')
    (True, False)
    """
    return ':' in text


def load(setting: str, reference: str) -> Any:
    """What a setting names; modules are looked for in the working directory too.

    Args:
      setting: its name, for messages.
      reference: ``package.module:name``.

    Returns:
      The attribute.

    Raises:
      ValueError: with the reason why it cannot be imported.

    Example:
      >>> load('config.log.callback', 'json:dumpss')
      Traceback (most recent call last):
      ...
      ValueError: config.log.callback='json:dumpss': the module json has no 'dumpss'. Did you mean 'dumps' or 'dump'?
    """
    module_name, _, name = reference.partition(':')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module does when it is imported
        reason = ' '.join(str(error).split()) or type(error).__name__
        where = f' Modules are looked for in {os.getcwd()} and in PYTHONPATH.' if isinstance(error, ModuleNotFoundError) else ''
        raise ValueError(f'{setting}={reference!r} cannot be imported ({type(error).__name__}: {reason}).{where}') from error
    if not hasattr(module, name):
        raise ValueError(
            f'{setting}={reference!r}: the module {module_name} has no {name!r}.{errors.did_you_mean(name, vars(module))}'
        )
    return getattr(module, name)
