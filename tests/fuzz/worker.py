"""Runs the programs of one kind, one after the other, and says of each what became of it. A process of its own, which may die of one."""

import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings

from absl import flags

from sparse_jax import train
from tests.fuzz import cases, environment

ROOT = pathlib.Path(__file__).parents[2]
_PACKAGE = str(ROOT / 'sparse_jax')
_ALLOWED = (ValueError, TypeError, NotImplementedError)
_CASES = 150  # until a new process takes over, since JAX keeps what it has compiled


def judge(program: str, error: Exception | None, folder: pathlib.Path) -> tuple[str, str]:
    """Whether a program ended as it may: ``right``, ``told`` or ``failed``, and in the last case why.

    Args:
      program: that was run.
      error: what it raised; None: nothing.
      folder: that it was given to work in.

    Returns:
      The outcome, and a reason that is the same for programs that fail at the same place.
    """
    if error is None:
        return 'right', ''
    if isinstance(error, train.NonFiniteError):
        return 'told', ''
    frame, message = traceback.extract_tb(error.__traceback__)[-1], str(error)
    where = f'{type(error).__name__} at {os.path.relpath(frame.filename, ROOT)}:{frame.lineno}'
    if not isinstance(error, _ALLOWED):
        return 'failed', f'{where}: {message[:200]}'
    if not frame.filename.startswith(_PACKAGE):
        return 'failed', f'{where}, which is not ours: {message[:200]}'
    if '\n' in message.strip() or not message:
        return 'failed', f'{where} does not say it in a line: {message[:200]!r}'
    names = {name for name in cases.names_in(program) if name not in ('jax', 'jnp', 'np')}
    if str(folder) not in message and str(folder.parent) not in message and not names & set(re.findall(r'\w+', message)):
        return 'failed', f'{where} names no argument: {message[:200]}'
    if 'prepare(config' in program and folder.exists():
        return 'failed', f'{where}, after a folder was made'
    return 'told', ''


def run(program: str, folder: pathlib.Path) -> tuple[str, str]:
    """Runs a program in an empty place, and judges it."""
    work = pathlib.Path(tempfile.mkdtemp(dir=folder)) / 'run'
    error: Exception | None = None
    try:
        exec(compile(program, 'program', 'exec'), environment.namespace(work))  # noqa: S102: that is what it is for
    except Exception as raised:
        error = raised
    outcome = judge(program, error, work)
    shutil.rmtree(work.parent, ignore_errors=True)
    return outcome


def main() -> None:
    kind, seed, number, count, seconds = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
    told = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # programs print
    warnings.simplefilter('ignore')
    flags.FLAGS(['fuzz'])
    environment.prepare()
    say = lambda **values: told.write(json.dumps(values) + '\n')
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for case in range(number, min(count, number + _CASES)):
            if time.monotonic() > end:
                break
            program = cases.program(kind, seed, case)
            say(number=case, program=program)
            outcome, reason = run(program, pathlib.Path(folder))
            say(number=case, outcome=outcome, reason=reason)
    environment.clean()
    say(done=True)


if __name__ == '__main__':
    main()
