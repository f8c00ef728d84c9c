"""The flags of the launcher: what they are, what fits together, and what is told where something does not.

sparse_jax's other modules come later: they import jax, for which help and wrong input should not wait.
"""

import difflib
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

from sparse_jax.launch import usage


class _Mode(NamedTuple):
    does: str
    flags: tuple[str, ...]  # those of _OF_MODES that it takes


MODES = {
    'train': _Mode('Train (the default); resumes from the last checkpoint.', ('config', 'workdir', 'init_from')),
    'evaluate': _Mode('Evaluate the last checkpoint of a run; writes nothing.', ('config', 'workdir')),
    'export': _Mode('Write the network of the last checkpoint into --to=FILE.npz or .safetensors.', ('config', 'workdir', 'to')),
    'sweep': _Mode('Train all combinations of --sweep, then report on them.', ('config', 'workdir', 'sweep', 'jobs')),
    'lottery': _Mode(
        'Train the dense network, then --rounds of pruning, rewinding to --rewind_step and training.',
        ('config', 'workdir', 'rounds', 'rewind_step'),
    ),
    'plan': _Mode(
        'Say which of --devices, which mesh and which density are best for a config; runs nothing.',
        ('config', 'workdir', 'devices', 'vocabulary', 'hardware', 'prices', 'deadline', 'exact'),
    ),
    'report': _Mode('Summarize finished runs in tables, figures and a page.', ('workdir', 'runs')),
}


class _IntegerOrNone(flags.IntegerParser):
    """Whole numbers, and None for the settings that take it; the config's own check refuses it elsewhere."""

    def parse(self, argument):
        if argument is None or str(argument).lower() == 'none':
            return None
        return super().parse(argument)


config_flags.register_flag_parser_for_type(int, _IntegerOrNone())

CONFIG = config_flags.DEFINE_config_file('config', help_string='Config file, FILE or FILE:VARIANT.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, report.')
MODE = flags.DEFINE_string('mode', 'train', f'What to do: {", ".join(MODES)}.')
LIST_SETTINGS = flags.DEFINE_boolean('list_settings', False, 'Print every setting, as --config has it, and exit.')
SWEEP = flags.DEFINE_multi_string(
    'sweep', [], 'All combinations of NAME=VALUE,VALUE;NAME=VALUE, or NAME=0:5 for 0 to 4. Repeatable.'
)
JOBS = flags.DEFINE_integer(
    'jobs',
    None,
    'Runs of a sweep at a time (1), one CPU core each; on one GPU set XLA_PYTHON_CLIENT_PREALLOCATE=false.',
    1,
)
RUNS = flags.DEFINE_multi_string(
    'runs',
    [],
    'Folder of runs to report on, if not --workdir, where the report is written. Repeatable.',
)
TO = flags.DEFINE_string('to', None, 'File that --mode=export writes; its suffix is the format.')
INIT_FROM = flags.DEFINE_string('init_from', None, 'Workdir or exported file whose weights and masks a new run starts with.')
ROUNDS = flags.DEFINE_string(
    'rounds', None, 'Rounds of --mode=lottery (5), the last at sparsity.density; or the density of each, as 0.5,0.2,0.05.'
)
REWIND_STEP = flags.DEFINE_integer('rewind_step', None, 'Step whose weights each round of --mode=lottery starts with (0).', 0)
DEVICES = flags.DEFINE_string('devices', None, 'Devices of --mode=plan, such as 8xH100,16xv5e, or cpu for this machine.')
VOCABULARY = flags.DEFINE_integer('vocabulary', None, 'Tokens or classes of data that --mode=plan does not read.')
HARDWARE = flags.DEFINE_string('hardware', None, 'JSON file with more devices for --mode=plan, or corrections of known ones.')
PRICES = flags.DEFINE_string('prices', None, 'Prices of an hour of a device for --mode=plan, as H100=2.5,A100=1.3.')
DEADLINE = flags.DEFINE_float('deadline', None, 'Hours that the training may take, for --mode=plan.')
EXACT = flags.DEFINE_boolean('exact', False, "Ask the platform's compiler for the memory of the best plan, with --mode=plan.")
LOWER_ONLY = flags.DEFINE_string(
    'lower_only',
    None,
    'cuda or tpu: print kernels, memory and collectives of the training step there; runs nothing.',
)
DISTRIBUTED = flags.DEFINE_boolean('distributed', False, 'Train on many hosts, this command on each of them.')
COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where no cluster is found.')
PROCESSES = flags.DEFINE_integer('num_processes', None, 'With --coordinator: number of processes.')
PROCESS = flags.DEFINE_integer('process_id', None, 'With --coordinator: number of this process, from 0.')
INITIALIZATION = flags.DEFINE_integer('initialization_timeout', 120, 'Seconds to wait for all hosts to come (120).', 1)
HEARTBEAT = flags.DEFINE_integer('heartbeat_timeout', 30, 'Seconds until a silent host counts as dead (30).', 1)
DEBUG = flags.DEFINE_boolean('debug', False, 'Show the tracebacks and notes of libraries where a run fails.')
_OF_PLANS = (DEVICES, VOCABULARY, HARDWARE, PRICES, DEADLINE, EXACT)
_OF_MODES = (CONFIG, WORKDIR, SWEEP, JOBS, RUNS, TO, INIT_FROM, ROUNDS, REWIND_STEP, *_OF_PLANS)
_OF_HOSTS = (COORDINATOR, PROCESSES, PROCESS, INITIALIZATION, HEARTBEAT)
FLAGS = (
    CONFIG,
    WORKDIR,
    MODE,
    LIST_SETTINGS,
    SWEEP,
    JOBS,
    RUNS,
    TO,
    INIT_FROM,
    ROUNDS,
    REWIND_STEP,
    *_OF_PLANS,
    LOWER_ONLY,
    DEBUG,
    DISTRIBUTED,
    *_OF_HOSTS,
)


def wrong_input(error) -> int:
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


def _missing(name: str, folder: str | None = None) -> str:
    examples = {
        'config': 'configs/mnist_lenet300.py:offline', 'workdir': 'runs/mnist_lenet300', 'sweep': "'seed=0,1,2'", 'to': 'network.npz', 'devices': '8xH100,8xA100',
    }  # fmt: skip
    of_run = ' With the --workdir of a run that exists none is needed.' if name == 'config' else ''
    if of_run and folder and not os.path.lexists(folder):
        of_run = f' --workdir={folder} does not exist: there is no run to go on with.'
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
        stored = pathlib.Path(__file__).parents[1] / 'train' / 'stored.py'
        return [argv[0], f'--config={stored}:{folder}', *argv[1:]]
    return list(argv)


def of_config() -> list[str]:
    """The flags of this command line that give its config again."""
    file = config_flags.get_config_filename(flags.FLAGS['config'])
    overrides = config_flags.get_override_values(flags.FLAGS['config'])
    return [f'--config={file}', *(f'--config.{name}={value}' for name, value in overrides.items())]


def _with_packaged_config(argv: Sequence[str]) -> list[str]:
    """The command line, with the package's own configs/NAME.py where there is no such file here."""
    prefix, argv = '--config=', list(argv)
    for i, argument in enumerate(argv):
        if argument.lstrip('-').startswith('config=') and argument.startswith('-'):
            argv[i] = prefix + usage.find_config(argument.partition('=')[2])
        elif i and argv[i - 1].lstrip('-') == 'config' and argv[i - 1].startswith('-'):
            argv[i] = usage.find_config(argument)
    return argv


def _check_before_parsing(argv: Sequence[str]) -> None:
    """Configs and settings that do not exist, told sooner and better than the flags library does."""
    arguments = dict(_arguments(argv))
    if arguments.get('config'):
        usage.check_config(arguments['config'])
    settings = [name.removeprefix('config.') for name in arguments if name.startswith('config.')]
    if not arguments.get('config') and (settings or 'config' in arguments):
        raise usage.WrongConfig(_missing('config', arguments.get('workdir')))
    if settings:
        from sparse_jax import config as config_lib
        from sparse_jax.core import errors

        defaults = config_lib.flatten(config_lib.Config())
        for name in settings:
            if name not in defaults:
                raise errors.unknown('setting', name, defaults)


def _check_mode() -> None:
    """The flags that a mode needs are there, and none that it does not take."""
    name = MODE.value
    if name not in MODES:
        near = difflib.get_close_matches(name, MODES, n=1, cutoff=0.4)
        hint = f' Did you mean {near[0]}?' if near else ''
        raise ValueError(f'--mode={name} does not exist.{hint} Known: {", ".join(MODES)}.')
    if LOWER_ONLY.value is not None and (name != 'train' or DISTRIBUTED.value):
        other = '--distributed' if DISTRIBUTED.value else f'--mode={name}'
        raise ValueError(f'--lower_only has no meaning with {other}: leave one of them out.')
    if LOWER_ONLY.value not in (None, 'cuda', 'tpu'):
        raise ValueError(f'--lower_only={LOWER_ONLY.value!r}: must be cuda or tpu.')
    takes = MODES[name].flags
    if 'config' in takes and not CONFIG.value:
        raise usage.WrongConfig(
            _missing('config', WORKDIR.value).partition(' With the')[0] if name == 'plan' else _missing('config', WORKDIR.value)
        )
    for flag in (WORKDIR, SWEEP, TO, DEVICES):
        is_optional = LOWER_ONLY.value or (flag is WORKDIR and name == 'plan')
        if flag.name in takes and not flag.value and not is_optional:
            raise ValueError(_missing(flag.name))
    for flag in _OF_MODES:
        if flag.value and flag.name not in takes:
            raise ValueError(f'--{flag.name} has no meaning with --mode={name}: leave it out.')


def _check_hosts() -> None:
    """The flags of many hosts fit together, and the mode."""
    if not DISTRIBUTED.value:
        for flag in _OF_HOSTS:
            if flag.present:
                raise ValueError(f'--{flag.name} has a meaning with --distributed only: give that too, or leave it out.')
        return
    if MODE.value not in ('train', 'evaluate'):
        raise ValueError(f'--distributed has no meaning with --mode={MODE.value}: leave it out.')
    from sparse_jax.runtime import hosts

    hosts.arguments(os.environ, coordinator=COORDINATOR.value, num_processes=PROCESSES.value, process_id=PROCESS.value)


def _help() -> str:
    meanings = {flag.name: flags.FLAGS[flag.name].help.partition(';\n')[0] for flag in FLAGS}  # without absl's note on repeating
    return usage.help_page({name: mode.does for name, mode in MODES.items()}, meanings)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses and checks the flags; answers requests for help, and ends the process with exit code 2 where something is wrong."""
    if len(argv) == 1 or any(name in ('help', 'helpshort', 'helpfull', 'h', '?') for name, _ in _arguments(argv[1:])):
        print(_help(), file=sys.stderr)
        sys.exit(
            0 if len(argv) > 1 else wrong_input('nothing to do: give at least --config and --workdir, as in the example above.')
        )
    try:
        argv = _with_stored_config(argv)
        _check_before_parsing(argv[1:])
        rest = flags.FLAGS(_with_packaged_config(argv))
        if len(rest) > 1:
            raise ValueError(f'{rest[1]!r} is not a flag: flags begin with --.')
        if LIST_SETTINGS.value:
            print(usage.settings_page(CONFIG.value))
            sys.exit(0)
        _check_mode()
        _check_hosts()
        if LOWER_ONLY.value or MODE.value == 'plan':
            os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing runs, on no accelerator
    except usage.WrongConfig as error:
        wrong_input(error)
        print(f'\n{usage.after_wrong_config()}', file=sys.stderr)
        sys.exit(2)
    except Exception as error:  # a config file may raise anything; its own message is the last line
        sys.exit(wrong_input(str(error).strip().rsplit('\n', 1)[-1].removeprefix('ValueError: ')))
    return rest
