"""Trains or evaluates an experiment.

    python launch.py --config=configs/mnist_lenet300.py:offline --workdir=runs/mnist_lenet300

Any setting can be changed on the command line, such as --config.sparsity.density=0.1; sparse_jax/config.py lists them. The same
command goes on where it stopped; in a finished workdir it prints the result. Exit codes: 0 done, 2 wrong input, 70 failed.
"""

import difflib
import logging
import os
import pathlib
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # jaxlib's notes to its developers

MODES = ('train', 'evaluate')

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Config file, and after a colon its variant.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of this run: checkpoints, metrics, result, report.')
_MODE = flags.DEFINE_string('mode', 'train', f'What to do: {" or ".join(MODES)}.')


def main(argv) -> int:
    del argv
    absl_logging.set_verbosity(absl_logging.WARNING)  # of jax, orbax and matplotlib
    logging.getLogger('sparse_jax').setLevel(logging.INFO)
    from sparse_jax import train  # after the flags: a wrong flag is told at once

    try:
        train.MODES[_MODE.value](_CONFIG.value, pathlib.Path(_WORKDIR.value))
    except ValueError as error:
        return _wrong_input(error)
    except train.NonFiniteLossError as error:
        print(f'error: {error}', file=sys.stderr)
        return 70
    return 0


def _wrong_input(error) -> int:
    print(f'error: {error}', file=sys.stderr)
    return 2


def _parse(argv):
    """Parses and checks the flags; wrong ones end the process with one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv, known_only=False)
        if len(rest) > 1:
            raise ValueError(f'{rest[1]!r} is not a flag: flags begin with --.')
        for flag, example in ((_CONFIG, 'configs/mnist_lenet300.py:offline'), (_WORKDIR, 'runs/mnist_lenet300')):
            if not flag.value:
                raise ValueError(f'--{flag.name} is missing: give for instance --{flag.name}={example}.')
        if _MODE.value not in MODES:
            near = difflib.get_close_matches(_MODE.value, MODES, n=1, cutoff=0.4)
            raise ValueError(f'--mode={_MODE.value} does not exist.{f" Did you mean {near[0]}?" if near else ""} Known: {", ".join(MODES)}.')
    except Exception as error:
        sys.exit(_wrong_input(error))
    return rest


if __name__ == '__main__':
    app.run(main, flags_parser=_parse)
