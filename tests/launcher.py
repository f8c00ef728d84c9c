"""launch.py for many commands in little time: one process imports everything once and forks for each of them.

A fork is a process of its own, with its own flags, backend and exit code; it saves the seconds that importing JAX takes. What happens
before that import (help, memory, a fresh interpreter) is tested by starting `python launch.py` itself.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]
_SERVER = """
import gc, json, os, sys, warnings
warnings.filterwarnings('ignore', 'os.fork', RuntimeWarning)  # JAX's: there is no backend yet, and so no thread of its
sys.argv[:] = ['launch.py']
from absl import app
from sparse_jax.launch import command_line, main
import sparse_jax.report.run_report, sparse_jax.report.write, sparse_jax.train.sweep, sparse_jax.aot.lowering, sparse_jax.plan.run
gc.collect()
gc.freeze()  # or each child would touch, and so copy, every page of this process when it ends
for line in sys.stdin:
    mode, flags, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv[1:] = flags  # config_flags reads it too
        if mode == 'run':
            app.run(main.main, flags_parser=command_line.parse)
        command_line.parse(sys.argv)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache  # ends with this process, which holds the other end of its stdin
def _server() -> subprocess.Popen:
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen(
        [sys.executable, '-c', _SERVER], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _ask(mode: str, flags: Sequence[str]) -> subprocess.CompletedProcess:
    server = _server()
    with tempfile.NamedTemporaryFile('r') as out, tempfile.NamedTemporaryFile('r') as err:
        server.stdin.write(json.dumps([mode, [str(flag) for flag in flags], out.name, err.name]) + '\n')
        server.stdin.flush()
        code = server.stdout.readline()
        assert code, 'the process that starts launch.py has died'
        return subprocess.CompletedProcess(['launch.py', *flags], int(code), out.read(), err.read())


def launch(*flags: str) -> subprocess.CompletedProcess:
    """What `python launch.py` with these flags ends with and prints."""
    return _ask('run', flags)


def check_flags(commands: Sequence[Sequence[str]]) -> None:
    """Asserts that launch.py parses the flags of each command."""
    for flags in commands:
        done = _ask('parse', flags)
        assert done.returncode == 0, (flags, done.stderr)
