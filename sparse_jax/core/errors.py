"""One message for every name that does not exist."""

import difflib
from collections.abc import Iterable


def unknown(setting: str, value: object, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest ones that do.

    Example:
      >>> unknown('model.name', 'lenet30', ['lenet300', 'lenet5'])
      ValueError("model.name='lenet30' does not exist. Did you mean 'lenet300' or 'lenet5'? Known: lenet300, lenet5.")
    """
    known = sorted(known)
    return ValueError(f'{setting}={value!r} does not exist.{did_you_mean(value, known)} Known: {", ".join(known)}.')


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """The question after a wrong name, with the nearest right ones, or nothing.

    >>> did_you_mean('fc3', ['fc1', 'conv'])
    " Did you mean 'fc1'?"
    """
    near = difflib.get_close_matches(str(value), list(known), n=3, cutoff=0.4)
    return f' Did you mean {" or ".join(map(repr, near))}?' if near else ''
