"""What the launcher says about itself: its help, the configs there are, and every setting.

Config files are read, not run, and jax is imported for the list of settings only: help and a wrong config take no seconds.
"""

import ast
import contextlib
import difflib
import itertools
import os
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sparse_jax import config as config_lib

PROGRAM = 'sparse-jax' if pathlib.Path(sys.argv[0]).name == 'sparse-jax' else 'python launch.py'
_EXAMPLE = f'{PROGRAM} --config=configs/mnist_lenet300.py:offline --workdir=runs/mnist_lenet300'
_CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


class WrongConfig(ValueError):
    """A config that is missing or does not exist: the launcher lists those that do."""


class ConfigFile(NamedTuple):
    """What a config file says about itself."""

    title: str  # the first line of its docstring
    variants: tuple[str, ...] | None  # its constant VARIANTS; None where it has none: only running it tells


def _source(path: pathlib.Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _describe(module: ast.Module) -> ConfigFile | None:
    """None where the file has no ``get_config``, neither its own nor an imported one."""
    attributes = ('asname', 'name', 'id')  # of imports, of functions, of variables
    names = {getattr(node, attribute, None) for node in ast.walk(module) for attribute in attributes}
    if not names & {'get_config', '*'}:
        return None
    variants = None
    for node in module.body:
        if isinstance(node, ast.Assign) and [getattr(target, 'id', None) for target in node.targets] == ['VARIANTS']:
            with contextlib.suppress(ValueError):  # not a literal
                variants = tuple(ast.literal_eval(node.value))
    return ConfigFile((ast.get_docstring(module) or '').partition('\n')[0], variants)


def find_configs(folder: pathlib.Path = _CONFIGS) -> dict[str, ConfigFile]:
    """The configs in a folder, by their paths from here; helper modules are left out."""
    modules = {_shown(path): _source(path) for path in sorted(folder.glob('*.py'))}
    described = {path: _describe(module) for path, module in modules.items() if module is not None}
    return {path: config for path, config in described.items() if config is not None}


def _shown(path: pathlib.Path) -> str:
    """A config's path from here; that of one of the package's own, where it is nowhere here, is configs/NAME.py: see find_config."""
    path = path.resolve()
    return (
        os.path.relpath(path)
        if path.parent != _CONFIGS.resolve() or path.is_relative_to(pathlib.Path.cwd())
        else f'configs/{path.name}'
    )


def find_config(value: str) -> str:
    """The value of ``--config``, with the package's own file for configs/NAME.py where there is no such file here."""
    name, colon, variant = value.partition(':')
    path = pathlib.Path(name)
    packaged = _CONFIGS / path.name
    is_packaged = path.parent == pathlib.Path('configs') and not path.exists() and packaged.is_file()
    return f'{packaged}{colon}{variant}' if is_packaged else value


def check_config(value: str) -> None:
    """Checks, without running it, that a config exists and has the variant asked for.

    Args:
      value: of ``--config``: a path, which a colon and a variant may follow.

    Raises:
      WrongConfig: saying which ones are near.
    """
    name, _, variant = value.partition(':')
    path = pathlib.Path(find_config(name))
    if not path.is_file():
        hint = ' or '.join(_nearest(path))
        problem = 'is a folder' if path.is_dir() else 'does not exist'
        raise WrongConfig(f'--config={name!r} {problem}.' + (f' Did you mean {hint}?' if hint else ''))
    module = _source(path)
    if module is None:
        return  # a mistake in it is told when it runs
    config = _describe(module)
    if config is None:
        raise WrongConfig(f'--config={name!r} has no function get_config: it is not a config.')
    if variant and config.variants is not None and variant not in config.variants:
        choices = ' or '.join([name, *(f'{name}:{choice}' for choice in config.variants)])
        raise WrongConfig(f'--config={value!r}: the variant {variant!r} does not exist. Give {choices}.')


def _nearest(path: pathlib.Path) -> list[str]:
    """Up to three configs whose names contain the given one, else those spelled most like it."""
    configs = find_configs() | (find_configs(path.parent) if path.parent != pathlib.Path() else {})
    stems = {pathlib.Path(config).stem: config for config in configs}
    name = path.stem.lower()
    near = [stem for stem in stems if name and name in stem.lower()] or difflib.get_close_matches(name, stems, n=3)
    return [stems[stem] for stem in near[:3]]


def help_page(modes: Mapping[str, str], flags: Mapping[str, str]) -> str:
    """The launcher's help: an example, the modes, the configs, the flags, and how to list the settings.

    Args:
      modes: what each one does.
      flags: what each one means.

    Returns:
      The page, as wide as the terminal.
    """
    settings = '--config.sparsity.density=0.1 changes one; --list_settings lists all: type, default, range or choices, meaning.'
    return '\n\n'.join(
        [
            _fill(f'{PROGRAM} --config=FILE[:VARIANT] --workdir=FOLDER [--config.NAME=VALUE ...] [--mode=MODE] ...', 'usage: '),
            f'Example, less than a minute on two CPU cores:\n  {_EXAMPLE}',
            f'Modes:\n{_table({f"--mode={mode}": does for mode, does in modes.items()})}',
            configs_page(),
            f'Settings:\n{_fill(settings, 2 * " ")}',
            f'Flags:\n{_table({f"--{flag}": meaning for flag, meaning in flags.items()})}',
        ]
    )


def configs_page() -> str:
    """The configs there are, each with its variants and what it is."""
    lines = ['Configs, each with its variants:']
    for path, config in find_configs().items():
        lines += ['  ' + ' '.join([path, *(f':{variant}' for variant in config.variants or ())]), _fill(config.title, 6 * ' ')]
    return '\n'.join(lines)


def after_wrong_config() -> str:
    """What follows the message about a wrong config: the configs there are, an example, and where to read on."""
    more = {f'{PROGRAM} --help': 'Modes and flags.', f'{PROGRAM} --list_settings': 'Every setting.'}
    return f'{configs_page()}\n\nExample:\n  {_EXAMPLE}\n\nMore:\n{_table(more)}'


def settings_page(config: 'config_lib.Config | None' = None) -> str:
    """Every setting: its value, type, range or choices, and what it does.

    Args:
      config: its values are listed, and those that differ from the library's defaults are marked; None: the defaults are.
    """
    from sparse_jax import config as config_lib

    lines = ['Settings and their defaults, changed on the command line by --config.NAME=VALUE.']
    if config is not None:
        lines = ['Settings of this config, changed on the command line by --config.NAME=VALUE.', '* differs from the default.']
    values, choices = config_lib.flatten(config or config_lib.Config()), _choices()
    for _, section in itertools.groupby(config_lib.describe(), lambda setting: setting.name.partition('.')[0]):
        lines += ['', *(_setting(setting, values[setting.name], choices.get(setting.name, ())) for setting in section)]
    return '\n'.join(lines)


def _setting(setting: 'config_lib.Setting', value: object, choices: Iterable[str]) -> str:
    is_changed = value != setting.default
    notes = [f'{setting.type}, {setting.allowed}' if setting.allowed else setting.type]
    if is_changed:
        notes.append(f'default {setting.default!r}')
    head = _fill(f'{setting.name} = {value!r}  ({"; ".join(notes)})', '* ' if is_changed else '  ')
    sentences = [setting.description]
    if choices:
        sentences.append(f'One of: {", ".join(choices)}.')
    if setting.only_with:
        sentences.append(f'Only with {setting.only_with}.')
    return f'{head}\n{_fill(" ".join(sentences), 6 * " ")}'


def _choices() -> dict[str, Iterable[str]]:
    from sparse_jax import data, models, sharding
    from sparse_jax.core import criteria
    from sparse_jax.train import experiment, optimizer

    return {
        'model.name': models.names(),
        'model.dtype': models.DTYPES,
        'model.layout': models.LAYOUTS,
        'data.name': data.NAMES,
        'optimizer.name': optimizer.OPTIMIZERS,
        'optimizer.schedule': optimizer.SCHEDULES,
        'sparsity.method': experiment.METHODS,
        'sparsity.prune': criteria.PRUNE,
        'sparsity.grow': (*criteria.GROW, 'none'),
        'sparsity.redistribute': (*criteria.REDISTRIBUTE, 'none'),
        'sparsity.kernels': experiment.KERNELS,
        'mesh.layout': sharding.LAYOUTS,
    }


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, 60), 100)


def _fill(text: str, before: str) -> str:
    """Text in lines as wide as the terminal, the first after ``before``, the others indented as deep, by 6 at least."""
    indent = ' ' * max(len(before), 6)
    return textwrap.fill(
        text, _width(), initial_indent=before, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _table(rows: Mapping[str, str]) -> str:
    """Two columns: terms, and what they mean."""
    column = max(map(len, rows)) + 2
    return '\n'.join(_fill(meaning, f'  {term:<{column}}') for term, meaning in rows.items())
