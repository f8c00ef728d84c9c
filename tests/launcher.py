"""Whether launch.py takes flags, for many commands in one process."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]
_PROGRAM = """
import json, os, sys
sys.argv[0] = 'launch.py'
import launch
for flags in json.loads(sys.stdin.read()):
    child = os.fork()  # flags are parsed once a process; launch.py has imported neither jax nor threads yet
    if child == 0:
        sys.argv[1:] = flags  # config_flags reads it too
        launch._parse(sys.argv)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit('refused: ' + ' '.join(flags))
"""


def check_flags(commands: Sequence[Sequence[str]]) -> None:
    """Asserts that launch.py parses the flags of each command."""
    done = subprocess.run([sys.executable, '-c', _PROGRAM], cwd=ROOT, input=json.dumps(commands), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
