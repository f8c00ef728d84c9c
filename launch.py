"""Trains or evaluates an experiment, trains a grid of them, or reports on any number.

    python launch.py --config=configs/mnist_lenet300.py:offline --workdir=runs/mnist_lenet300
    python launch.py --mode=sweep --config=configs/mnist_lenet300.py:offline --workdir=runs/sweep \\
        --sweep='sparsity.density=0.05,0.1;sparsity.method=sparse_momentum,rigl;seed=0,1,2' --sweep='sparsity.method=dense;seed=0,1,2'
    python launch.py --mode=report --workdir=runs
    python launch.py --distributed --config=... --workdir=...   # on every host: SLURM, Open MPI, Kubernetes, TPU and xpk are detected

    python launch.py --config=... --lower_only=cuda   # or tpu: what its step becomes there; runs nothing and needs no such device

Any setting can be changed on the command line, such as --config.sparsity.density=0.1; sparse_jax/config.py lists them. The same
command goes on where it stopped; in a finished workdir it prints the result. Exit codes: 0 done, 2 wrong input (do not restart), 70
failed, 75 stopped by SIGTERM, and saved (restart).
"""

import difflib
import glob
import logging
import os
import pathlib
import sys
import traceback

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # jaxlib's notes to its developers

# What glibc's malloc is told: keep freed memory, in one heap, in large pages. By default each large array is mapped anew, and the system
# clears its pages when they are first touched: a quarter of the time of a sparse step on CPU (docs/training_step.md).
MALLOC = ':'.join(f'glibc.malloc.{name}' for name in ('mmap_max=0', 'trim_threshold=1000000000000', 'arena_max=1', 'hugetlb=1'))

MODES = ('train', 'evaluate', 'sweep', 'report')


class _IntegerOrNone(flags.IntegerParser):
    """Whole numbers, and None for the settings that take it; the config's own check refuses it elsewhere."""

    def parse(self, argument):
        if argument is None or str(argument).lower() == 'none':
            return None
        return super().parse(argument)


config_flags.register_flag_parser_for_type(int, _IntegerOrNone())

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Config file, and after a colon its variant.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of this run: checkpoints, metrics, result, report.')
_MODE = flags.DEFINE_string('mode', 'train', f'What to do: {", ".join(MODES)}.')
_SWEEP = flags.DEFINE_multi_string('sweep', [], 'name=value,value;name=value: all combinations; may be given several times.')
_JOBS = flags.DEFINE_integer(
    'jobs',
    None,
    'Runs of a sweep at a time (1), each on a CPU core of its own; on one GPU set XLA_PYTHON_CLIENT_PREALLOCATE=false.',
    1,
)
_RUNS = flags.DEFINE_multi_string(
    'runs', [], 'Folders with runs to report on, in place of --workdir, which the report is written to.'
)
_LOWER_ONLY = flags.DEFINE_string(
    'lower_only',
    None,
    'With --mode=train: cuda or tpu. Prints kernels, memory and collectives of the step on that platform; runs nothing.',
)
_DISTRIBUTED = flags.DEFINE_boolean('distributed', False, 'Train on many hosts, this command running on each.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'With --distributed, where no cluster is detected: host:port of process 0.')
_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Likewise: how many processes there are.')
_PROCESS = flags.DEFINE_integer('process_id', None, 'Likewise: which one this is, from 0.')
_INITIALIZATION = flags.DEFINE_integer('initialization_timeout', 120, 'With --distributed: seconds for all hosts to come.', 1)
_HEARTBEAT = flags.DEFINE_integer(
    'heartbeat_timeout', 30, 'With --distributed: seconds after which a silent host counts as dead, and all end (70).', 1
)
_OF_HOSTS = (_COORDINATOR, _PROCESSES, _PROCESS, _INITIALIZATION, _HEARTBEAT)


def _has_accelerator() -> bool:
    patterns = ('/dev/nvidia[0-9]*', '/dev/accel*', '/dev/vfio/[0-9]*')
    return os.environ.get('JAX_PLATFORMS') != 'cpu' and any(map(glob.glob, patterns))


def keep_memory() -> None:
    """Starts this program anew, as the same process, with MALLOC in its environment; nothing where that is set, not on Linux, or where
    an accelerator does the work."""
    if sys.platform.startswith('linux') and 'GLIBC_TUNABLES' not in os.environ and not _has_accelerator():
        os.environ['GLIBC_TUNABLES'] = MALLOC
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(argv) -> int:
    del argv
    absl_logging.set_verbosity(absl_logging.WARNING)  # of jax, orbax and matplotlib
    logging.getLogger('sparse_jax').setLevel(logging.INFO)
    from sparse_jax import train  # after the flags: a wrong flag is told at once
    from sparse_jax.runtime import hosts

    folder = pathlib.Path(_WORKDIR.value or '')
    try:
        if _DISTRIBUTED.value:
            cluster = hosts.arguments(
                os.environ, coordinator=_COORDINATOR.value, num_processes=_PROCESSES.value, process_id=_PROCESS.value
            )
            hosts.initialize(cluster, initialization_timeout=_INITIALIZATION.value, heartbeat_timeout=_HEARTBEAT.value)
            if not hosts.is_host0():
                logging.getLogger('sparse_jax').setLevel(logging.WARNING)
        if _LOWER_ONLY.value:
            from sparse_jax.aot import lowering

            lowering.run(_CONFIG.value, _LOWER_ONLY.value)
        elif _MODE.value == 'report':
            from sparse_jax.report.write import write_report

            write_report(folder, [pathlib.Path(path) for path in _RUNS.value])
        elif _MODE.value == 'sweep':
            import jax

            from sparse_jax.report.write import write_report
            from sparse_jax.train import sweep

            jax.config.update('jax_platforms', 'cpu')  # of this process, which checks only: the accelerator is the runs'
            file = config_flags.get_config_filename(flags.FLAGS['config'])
            overrides = config_flags.get_override_values(flags.FLAGS['config'])
            shared = [f'--config={file}', *(f'--config.{name}={value}' for name, value in overrides.items())]
            command = [str(pathlib.Path(__file__).resolve()), *shared]
            outcome = sweep.run(_CONFIG.value, folder, grids=_SWEEP.value, command=command, jobs=_JOBS.value or 1)
            write_report(folder)
            sweep.raise_failed(outcome)
        elif _MODE.value == 'evaluate':
            train.evaluate(_CONFIG.value, folder)
        else:
            from sparse_jax.report import run_report

            train.train(_CONFIG.value, folder)
            hosts.run_on_host0(run_report.show, folder)
    except ValueError as error:
        _wrong_input(error)
        # At once: where a damaged checkpoint was read, orbax's abandoned reads would otherwise add pages to that line.
        hosts.exit_now(2)
    except hosts.Preempted as error:
        print(error, file=sys.stderr)
        return 75
    except Exception as error:
        if not isinstance(error, train.NonFiniteError | hosts.Unreachable):
            traceback.print_exc()
        print(f'error: {error}', file=sys.stderr)
        if _DISTRIBUTED.value:
            hosts.exit_now(70)  # not waiting for a peer that may be dead
        return 70
    return 0


def _wrong_input(error) -> int:
    print(f'error: {error}', file=sys.stderr)
    return 2


def _check_names(argv):
    """Settings and config files that do not exist, told better than by the flags library."""
    from sparse_jax import config as config_lib
    from sparse_jax.core import errors

    known = config_lib.flatten(config_lib.Config())
    for argument, following in zip(argv, [*argv[1:], ''], strict=True):
        name, equals, value = argument.lstrip('-').partition('=')
        value = value if equals else following
        if argument.startswith('-') and name.startswith('config.') and name.removeprefix('config.') not in known:
            raise errors.unknown('setting', name.removeprefix('config.'), known)
        path = pathlib.Path(value.partition(':')[0])
        if argument.startswith('-') and name == 'config' and value and not path.is_file():
            raise errors.unknown('--config', str(path), [str(p) for p in path.parent.glob('*.py')])


def _parse(argv):
    """Parses and checks the flags; wrong ones end the process with one line and exit code 2."""
    try:
        _check_names(argv[1:])
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f'{rest[1]!r} is not a flag: flags begin with --.')
        if _MODE.value not in MODES:
            near = difflib.get_close_matches(_MODE.value, MODES, n=1, cutoff=0.4)
            hint = f' Did you mean {near[0]}?' if near else ''
            raise ValueError(f'--mode={_MODE.value} does not exist.{hint} Known: {", ".join(MODES)}.')
        wanted = ((_CONFIG, 'configs/mnist_lenet300.py:offline'), (_WORKDIR, 'runs/mnist_lenet300'), (_SWEEP, "'seed=0,1,2'"))
        if _LOWER_ONLY.value is not None:
            if _MODE.value != 'train' or _DISTRIBUTED.value:
                other = '--distributed' if _DISTRIBUTED.value else f'--mode={_MODE.value}'
                raise ValueError(f'--lower_only has no meaning with {other}: leave one of them out.')
            if _LOWER_ONLY.value not in ('cuda', 'tpu'):
                raise ValueError(f'--lower_only={_LOWER_ONLY.value!r}: must be cuda or tpu.')
            os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing runs, on no accelerator
        unwanted = {'report': ('config', 'sweep', 'jobs'), 'sweep': ('runs',)}.get(_MODE.value, ('sweep', 'jobs', 'runs'))
        for flag, example in wanted:
            if not flag.value and flag.name not in unwanted and (flag is _CONFIG or not _LOWER_ONLY.value):
                raise ValueError(f'--{flag.name} is missing: give for instance --{flag.name}={example}.')
        for flag in (_CONFIG, _SWEEP, _JOBS, _RUNS):
            if flag.value and flag.name in unwanted:
                raise ValueError(f'--{flag.name} has no meaning with --mode={_MODE.value}: leave it out.')
        if _DISTRIBUTED.value and _MODE.value not in ('train', 'evaluate'):
            raise ValueError(f'--distributed has no meaning with --mode={_MODE.value}: leave it out.')
        for flag in _OF_HOSTS:
            if flag.present and not _DISTRIBUTED.value:
                raise ValueError(f'--{flag.name} has a meaning with --distributed only: give that too, or leave it out.')
        if _DISTRIBUTED.value:
            from sparse_jax.runtime import hosts

            hosts.arguments(os.environ, coordinator=_COORDINATOR.value, num_processes=_PROCESSES.value, process_id=_PROCESS.value)
    except Exception as error:  # a config file may raise anything; its own message is the last line
        sys.exit(_wrong_input(str(error).strip().rsplit('\n', 1)[-1].removeprefix('ValueError: ')))
    return rest


if __name__ == '__main__':
    keep_memory()
    app.run(main, flags_parser=_parse)
