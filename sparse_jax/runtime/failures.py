"""How a failure is told: in one line, whatever the libraries below print of their own."""

import io
import logging
import os
import re
import sys
import threading
import traceback

# tensorstore's messages name the array, the database and the file before they come to what the system said
_SYSTEM = re.compile(r"\bos_error_code='(\d+)'")


def reason(error: BaseException) -> str:
    """What went wrong, in a line: what the system said where it is that, else the first line of the message.

    >>> reason(ValueError("RESOURCE_EXHAUSTED: Failed writing 'd/a': ... [os_error_code='28']"))
    'No space left on device'
    """
    text = str(error).strip()
    if said := _SYSTEM.search(text):
        return os.strerror(int(said.group(1)))
    if isinstance(error, OSError) and error.strerror:
        return f'{error.strerror}: {error.filename}' if error.filename else error.strerror
    return text.split('\n')[0][:200] or type(error).__name__


def show(error: Exception, *, debug: bool) -> None:
    """Prints an error as one line. A fault of the program, which somebody has to find, comes with its traceback."""
    is_told = isinstance(error, OSError | RuntimeError)
    if debug or not is_told:
        traceback.print_exception(error)
    ours = type(error).__module__.startswith('sparse_jax') or type(error) is RuntimeError  # may have several lines
    text = str(error) if ours else reason(error) if isinstance(error, OSError) else f'{type(error).__name__}: {reason(error)}'
    print(f'error: {text}' + ('' if debug or not is_told or ours else ' (--debug shows more.)'), file=sys.stderr)


def prepare(*, debug: bool) -> None:
    """Makes sure that one line is all there is of a failure, and that any name can be printed.

    Args:
      debug: whether tracebacks of other threads, and errors that orbax logs before it raises them, are shown too.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # as stderr: half a character in a path is no reason to fail
    if debug:
        return
    logging.getLogger('absl').addFilter(lambda record: record.levelno < logging.ERROR)
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    threading.excepthook = sys.unraisablehook = lambda arguments: None  # of tensorstore's C++ threads, where writing fails
