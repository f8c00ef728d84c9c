"""Trains or evaluates an experiment, trains a grid of experiments, or reports on any number of runs.

    python launch.py --config=configs/mnist_lenet300.py:offline --workdir=runs/mnist_lenet300
    python launch.py --mode=sweep --config=configs/mnist_lenet300.py:offline --workdir=runs/sweep \\
        --sweep='sparsity.density=0.05,0.1;sparsity.method=sparse_momentum,rigl;seed=0,1,2' --sweep='sparsity.method=dense;seed=0,1,2'
    python launch.py --mode=report --workdir=runs
    python launch.py --workdir=runs/mnist_lenet300                                # goes on with the run that is there
    python launch.py --mode=export --workdir=runs/mnist_lenet300 --to=lenet.npz   # its network, as one file
    python launch.py --distributed --config=... --workdir=...   # on every host; finds SLURM, Open MPI, Kubernetes, TPU and xpk clusters

    python launch.py --config=... --lower_only=cuda   # or tpu: shows what the step compiles to there; runs nothing, needs no such device

    python launch.py --help            # modes, configs and flags
    python launch.py --list_settings   # every setting, with --config=... as that config has it

Any setting can be changed on the command line, for example --config.sparsity.density=0.1. Rerunning the same command resumes from the
last checkpoint; in a finished workdir it prints the result. Exit codes: 0 done; 2 wrong input (do not restart); 70 failed (restart);
75 stopped by SIGTERM or Ctrl-C after saving (restart); 78 failed and would fail again, as with a loss of NaN (do not restart).
"""

import difflib
import glob
import logging
import os
import pathlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

import usage  # sparse_jax comes later: it imports jax, for which help and wrong input should not wait

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # jaxlib's notes to its developers

# Options of glibc's malloc: keep freed memory, in one heap, in large pages. By default each large array is mapped anew, and the system
# clears its pages when they are first touched: a quarter of the time of a sparse step on CPU (docs/training_step.md).
MALLOC = ':'.join(f'glibc.malloc.{name}' for name in ('mmap_max=0', 'trim_threshold=1000000000000', 'arena_max=1', 'hugetlb=1'))


class _Mode(NamedTuple):
    does: str
    flags: tuple[str, ...]  # those of _OF_MODES that it takes


MODES = {
    'train': _Mode('Train (the default); resumes from the last checkpoint.', ('config', 'workdir', 'init_from')),
    'evaluate': _Mode('Evaluate the last checkpoint of a run; writes nothing.', ('config', 'workdir')),
    'export': _Mode('Write the network of the last checkpoint into --to=FILE.npz or .safetensors.', ('config', 'workdir', 'to')),
    'sweep': _Mode('Train all combinations of --sweep, then report on them.', ('config', 'workdir', 'sweep', 'jobs')),
    'report': _Mode('Summarize finished runs in tables, figures and a page.', ('workdir', 'runs')),
}


class _IntegerOrNone(flags.IntegerParser):
    """Whole numbers, and None for the settings that take it; the config's own check refuses it elsewhere."""

    def parse(self, argument):
        if argument is None or str(argument).lower() == 'none':
            return None
        return super().parse(argument)


config_flags.register_flag_parser_for_type(int, _IntegerOrNone())

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Config file, FILE or FILE:VARIANT.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, report.')
_MODE = flags.DEFINE_string('mode', 'train', f'What to do: {", ".join(MODES)}.')
_LIST_SETTINGS = flags.DEFINE_boolean('list_settings', False, 'Print every setting, as --config has it, and exit.')
_SWEEP = flags.DEFINE_multi_string(
    'sweep', [], 'All combinations of NAME=VALUE,VALUE;NAME=VALUE, or NAME=0:5 for 0 to 4. Repeatable.'
)
_JOBS = flags.DEFINE_integer(
    'jobs',
    None,
    'Runs of a sweep at a time (1), one CPU core each; on one GPU set XLA_PYTHON_CLIENT_PREALLOCATE=false.',
    1,
)
_RUNS = flags.DEFINE_multi_string(
    'runs',
    [],
    'Folder of runs to report on, if not --workdir, where the report is written. Repeatable.',
)
_TO = flags.DEFINE_string('to', None, 'File that --mode=export writes; its suffix is the format.')
_INIT_FROM = flags.DEFINE_string('init_from', None, 'Workdir or exported file whose weights and masks a new run starts with.')
_LOWER_ONLY = flags.DEFINE_string(
    'lower_only',
    None,
    'cuda or tpu: print kernels, memory and collectives of the training step there; runs nothing.',
)
_DISTRIBUTED = flags.DEFINE_boolean('distributed', False, 'Train on many hosts, this command on each of them.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where no cluster is found.')
_PROCESSES = flags.DEFINE_integer('num_processes', None, 'With --coordinator: number of processes.')
_PROCESS = flags.DEFINE_integer('process_id', None, 'With --coordinator: number of this process, from 0.')
_INITIALIZATION = flags.DEFINE_integer('initialization_timeout', 120, 'Seconds to wait for all hosts to come (120).', 1)
_HEARTBEAT = flags.DEFINE_integer('heartbeat_timeout', 30, 'Seconds until a silent host counts as dead (30).', 1)
_DEBUG = flags.DEFINE_boolean('debug', False, 'Show the tracebacks and notes of libraries where a run fails.')
_OF_MODES = (_CONFIG, _WORKDIR, _SWEEP, _JOBS, _RUNS, _TO, _INIT_FROM)
_OF_HOSTS = (_COORDINATOR, _PROCESSES, _PROCESS, _INITIALIZATION, _HEARTBEAT)
_FLAGS = (
    _CONFIG,
    _WORKDIR,
    _MODE,
    _LIST_SETTINGS,
    _SWEEP,
    _JOBS,
    _RUNS,
    _TO,
    _INIT_FROM,
    _LOWER_ONLY,
    _DEBUG,
    _DISTRIBUTED,
    *_OF_HOSTS,
)


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


def _keep_programs() -> None:
    """Compiled programs are kept in this user's cache folder, for the next start; unless the environment names another folder, or none."""
    import jax

    from sparse_jax.kernels.cpu import compiler

    if 'JAX_COMPILATION_CACHE_DIR' in os.environ or 'JAX_ENABLE_COMPILATION_CACHE' in os.environ:
        return
    try:
        folder = compiler.make_cache_folder() / f'programs-{zlib.crc32(compiler.processor().encode()):08x}'
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:  # then they are compiled anew
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)  # of the runs of a sweep


def _sweep(folder: pathlib.Path) -> None:
    """Trains a grid of experiments, and reports on them."""
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


def main(argv) -> int:
    del argv
    absl_logging.set_verbosity(absl_logging.WARNING)  # of jax, orbax and matplotlib
    logging.getLogger('sparse_jax').setLevel(logging.INFO)
    from sparse_jax import train  # after the flags: a wrong flag is told at once
    from sparse_jax.runtime import failures, hosts
    from sparse_jax.train import console

    console.show_log()
    _keep_programs()
    folder = pathlib.Path(_WORKDIR.value or '')
    failures.prepare(debug=_DEBUG.value)
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
            _sweep(folder)
        elif _MODE.value == 'evaluate':
            train.evaluate(_CONFIG.value, folder)
        elif _MODE.value == 'export':
            train.export(_CONFIG.value, folder, pathlib.Path(_TO.value or ''))
        else:
            from sparse_jax.report import run_report

            if _INIT_FROM.value:
                _CONFIG.value.train.init_from = _INIT_FROM.value
            train.train(_CONFIG.value, folder)
            hosts.run_on_host0(run_report.show, folder)
    except ValueError as error:
        _wrong_input(error)
        # At once: where a damaged checkpoint was read, orbax's abandoned reads would otherwise add pages to that line.
        hosts.exit_now(2)
    except hosts.Preempted as error:
        print(error, file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        print('interrupted: nothing was saved since the last checkpoint.', file=sys.stderr)
        hosts.exit_now(130)
    except train.NonFiniteError as error:
        print(f'error: {error}', file=sys.stderr)
        hosts.exit_now(78)
    except Exception as error:
        failures.show(error, debug=_DEBUG.value)
        hosts.exit_now(70)  # not waiting for a peer that may be dead, nor for what libraries print at their end
    return 0


def _wrong_input(error) -> int:
    print(f'error: {str(error) or type(error).__name__}', file=sys.stderr)
    return 2


def _arguments(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The flags of a command line, not yet parsed, by their names."""
    for argument, following in zip(argv, [*argv[1:], ''], strict=True):
        if argument == '--':
            return
        if argument.startswith('-'):
            name, equals, value = argument.lstrip('-').partition('=')
            yield name, value if equals else following


def _missing(name: str) -> str:
    examples = {
        'config': 'configs/mnist_lenet300.py:offline', 'workdir': 'runs/mnist_lenet300', 'sweep': "'seed=0,1,2'", 'to': 'network.npz',
    }  # fmt: skip
    of_run = ' With the --workdir of a run that exists none is needed.' if name == 'config' else ''
    if of_run and _WORKDIR.value and not os.path.lexists(_WORKDIR.value):
        of_run = f' --workdir={_WORKDIR.value} does not exist: there is no run to go on with.'
    return f'--{name} is missing: give for instance --{name}={examples[name]}.{of_run}'


def _with_stored_config(argv: Sequence[str]) -> list[str]:
    """The command line, with the settings of the run in --workdir as its config where it names none."""
    arguments = dict(_arguments(argv[1:]))
    folder = arguments.get('workdir', '')
    is_of_run = arguments.get('mode', 'train') in ('train', 'evaluate', 'export') and not arguments.keys() & {
        'config',
        'lower_only',
    }
    if is_of_run and folder and any((pathlib.Path(folder) / name).is_file() for name in ('settings.json', 'config.json')):
        stored = pathlib.Path(__file__).parent / 'sparse_jax' / 'train' / 'stored.py'
        return [argv[0], f'--config={stored}:{folder}', *argv[1:]]
    return list(argv)


def _check_before_parsing(argv: Sequence[str]) -> None:
    """Configs and settings that do not exist, told sooner and better than the flags library does."""
    arguments = dict(_arguments(argv))
    if arguments.get('config'):
        usage.check_config(arguments['config'])
    settings = [name.removeprefix('config.') for name in arguments if name.startswith('config.')]
    if not arguments.get('config') and (settings or 'config' in arguments):
        raise usage.WrongConfig(_missing('config'))
    if settings:
        from sparse_jax import config as config_lib
        from sparse_jax.core import errors

        defaults = config_lib.flatten(config_lib.Config())
        for name in settings:
            if name not in defaults:
                raise errors.unknown('setting', name, defaults)


def _check_mode() -> None:
    """The flags that a mode needs are there, and none that it does not take."""
    name = _MODE.value
    if name not in MODES:
        near = difflib.get_close_matches(name, MODES, n=1, cutoff=0.4)
        hint = f' Did you mean {near[0]}?' if near else ''
        raise ValueError(f'--mode={name} does not exist.{hint} Known: {", ".join(MODES)}.')
    if _LOWER_ONLY.value is not None and (name != 'train' or _DISTRIBUTED.value):
        other = '--distributed' if _DISTRIBUTED.value else f'--mode={name}'
        raise ValueError(f'--lower_only has no meaning with {other}: leave one of them out.')
    if _LOWER_ONLY.value not in (None, 'cuda', 'tpu'):
        raise ValueError(f'--lower_only={_LOWER_ONLY.value!r}: must be cuda or tpu.')
    takes = MODES[name].flags
    if 'config' in takes and not _CONFIG.value:
        raise usage.WrongConfig(_missing('config'))
    for flag in (_WORKDIR, _SWEEP, _TO):
        if flag.name in takes and not flag.value and not _LOWER_ONLY.value:
            raise ValueError(_missing(flag.name))
    for flag in _OF_MODES:
        if flag.value and flag.name not in takes:
            raise ValueError(f'--{flag.name} has no meaning with --mode={name}: leave it out.')


def _check_hosts() -> None:
    """The flags of many hosts fit together, and the mode."""
    if not _DISTRIBUTED.value:
        for flag in _OF_HOSTS:
            if flag.present:
                raise ValueError(f'--{flag.name} has a meaning with --distributed only: give that too, or leave it out.')
        return
    if _MODE.value not in ('train', 'evaluate'):
        raise ValueError(f'--distributed has no meaning with --mode={_MODE.value}: leave it out.')
    from sparse_jax.runtime import hosts

    hosts.arguments(os.environ, coordinator=_COORDINATOR.value, num_processes=_PROCESSES.value, process_id=_PROCESS.value)


def _help() -> str:
    meanings = {flag.name: flags.FLAGS[flag.name].help.partition(';\n')[0] for flag in _FLAGS}  # without absl's note on repeating
    return usage.help_page({name: mode.does for name, mode in MODES.items()}, meanings)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses and checks the flags; answers requests for help, and ends the process with exit code 2 where something is wrong."""
    if len(argv) == 1 or any(name in ('help', 'helpshort', 'helpfull', 'h', '?') for name, _ in _arguments(argv[1:])):
        print(_help(), file=sys.stderr)
        sys.exit(
            0 if len(argv) > 1 else _wrong_input('nothing to do: give at least --config and --workdir, as in the example above.')
        )
    try:
        argv = _with_stored_config(argv)
        _check_before_parsing(argv[1:])
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f'{rest[1]!r} is not a flag: flags begin with --.')
        if _LIST_SETTINGS.value:
            print(usage.settings_page(_CONFIG.value))
            sys.exit(0)
        _check_mode()
        _check_hosts()
        if _LOWER_ONLY.value:
            os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing runs, on no accelerator
    except usage.WrongConfig as error:
        _wrong_input(error)
        print(f'\n{usage.after_wrong_config()}', file=sys.stderr)
        sys.exit(2)
    except Exception as error:  # a config file may raise anything; its own message is the last line
        sys.exit(_wrong_input(str(error).strip().rsplit('\n', 1)[-1].removeprefix('ValueError: ')))
    return rest


if __name__ == '__main__':
    keep_memory()
    app.run(main, flags_parser=_parse)
