"""One message for every name that does not exist."""

import difflib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable


def unknown(setting: str, value: object, choices: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest ones that do.

    Example:
      >>> unknown('model.name', 'lenet30', ['lenet300', 'lenet5'])
      ValueError("model.name='lenet30' does not exist. Did you mean 'lenet300' or 'lenet5'? Known: lenet300, lenet5.")
    """
    choices = sorted(choices)
    return ValueError(f'{setting}={value!r} does not exist.{did_you_mean(value, choices)} Known: {", ".join(choices)}.')


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """The question after a wrong name, with the nearest right ones, or nothing.

    >>> did_you_mean('fc3', ['fc1', 'conv'])
    " Did you mean 'fc1'?"
    """
    near = difflib.get_close_matches(str(value), list(choices), n=3, cutoff=0.4)
    return f' Did you mean {" or ".join(map(repr, near))}?' if near else ''


def check_takes(setting: str, function: Callable, signature: str) -> None:
    """Refuses a function that cannot be called with the arguments of a signature.

    >>> check_takes('sparsifiable', lambda path: True, '(path, leaf) -> bool')
    Traceback (most recent call last):
    ...
    ValueError: sparsifiable: must be a function (path, leaf) -> bool, but <lambda> has the signature (path).
    """
    arguments = signature.partition(')')[0].split(',')
    try:
        given = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin tells no signature
        return
    try:
        given.bind(*arguments)
    except TypeError:
        name = getattr(function, '__name__', repr(function))
        raise ValueError(f'{setting}: must be a function {signature}, but {name} has the signature {given}.') from None


def check_names(what: str, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """ValueError that lists which names are missing, not wanted, or of another shape."""
    problems = [f'{name} is missing' for name in wanted if name not in found]
    problems += [f'{name} is not wanted' for name in found if name not in wanted]
    problems += [
        f'{name} has shape {found[name]} instead of {shape}' for name, shape in wanted.items() if found.get(name, shape) != shape
    ]
    if problems:
        more = f', and {len(problems) - 6} more' if len(problems) > 6 else ''
        raise ValueError(f'{what} is of another network: {"; ".join(problems[:6])}{more}.')


@functools.cache
def say_once(message: str) -> None:
    """Logs what works, but not as its user may think, once a process."""
    logging.getLogger('sparse_jax').warning('%s', message)
