"""Lottery tickets by iterative magnitude pruning: train, prune, rewind, again; each round a run of its own.

    start/           the dense network, trained to the step that weights are rewound to; none where that is 0
    start.npz        its weights
    round_0/         the dense network, trained to its end
    round_1.npz      the weights of start.npz under the mask of the first pruning, and so on
    round_1/         that network, trained from that step to the end under its fixed mask
    lottery.json     the table of all rounds; lottery_settings.json: what they are made of

Every part is a function of what stands before it, and what is there is not made again: a run that was stopped or killed, within a round or
between two, goes on by the same command and ends with the same bits.
"""

import dataclasses
import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from sparse_jax import config as config_lib
from sparse_jax.core import granularity, pruning
from sparse_jax.core import layers as layers_lib
from sparse_jax.export import files
from sparse_jax.runtime import records
from sparse_jax.train import exporting, loop
from sparse_jax.train import run as run_lib
from sparse_jax.train import state as state_lib
from sparse_jax.train.console import named_table
from sparse_jax.train.result import headline

TABLE = records.TICKETS
_LOG = logging.getLogger('sparse_jax')


class Round(NamedTuple):
    """What a round came to; costs are those of it and of all rounds before it."""

    round: int
    density: float
    nonzeros: int
    result: str
    score: float  # test accuracy, or validation loss of text
    operations: float  # multiply-adds of training
    seconds: float  # of training


def parse_rounds(text: str) -> int | list[float]:
    """A number of rounds, or the density of each, from the command line's text; ValueError for anything else.

    >>> parse_rounds('5'), parse_rounds('0.5,0.2')
    (5, [0.5, 0.2])
    """
    try:
        if ',' not in text and '.' not in text:
            return int(text)
        return [float(part) for part in text.split(',')]
    except ValueError:
        raise ValueError(
            f'--rounds={text}: must be a number of rounds, or densities separated by commas, such as 0.5,0.2,0.05.'
        ) from None


def run(config: config_lib.Config, folder: pathlib.Path, *, rounds: int | list[float], rewind_step: int) -> list[Round]:
    """Trains the dense network and all rounds.

    Args:
      config: the settings; ``sparsity.density`` is that of the last round, and no mask moves.
      folder: the workdir; made if need be.
      rounds: number of prunings, of which each keeps the same part of the weights that are left; or the density after each. One threshold
        over all layers decides.
      rewind_step: of the dense training, whose weights each round starts with; 0: the first ones.

    Returns:
      A row for the dense network and for each round.

    Raises:
      ValueError: for anything wrong with the input, before a file is made.

    Reference: Frankle et al., `Linear Mode Connectivity and the Lottery Ticket Hypothesis <https://arxiv.org/abs/1912.05671>`_, 2020.
    """
    densities = _densities(config, rounds)
    _check(config)
    run_lib.check_identity(_dense(config), folder / 'round_0')
    prepared = run_lib.prepare(_dense(config), folder / 'round_0')
    experiment, total = prepared.experiment, prepared.experiment.total_steps
    if not 0 <= rewind_step < total:
        raise ValueError(f'--rewind_step={rewind_step}: must be from 0 to {total - 1}, as a training has {total} steps.')
    last = _round(config, total, folder / 'ticket.npz', config.sparsity.density, rewind_step)
    run_lib.check_settings(last)
    run_lib.create_experiment(last, prepared.data)  # raises where its budget or its blocks do not fit
    named = rounds if isinstance(rounds, int) else ','.join(map(str, rounds))
    _keep_settings(folder, {'rounds': named, 'rewind_step': rewind_step, **_identity(last)})
    start, dense = _start(_dense(config, total), folder, prepared, rewind_step), folder / 'round_0'
    before, rows = (_dense(config, total), dense), [_row(0, 1.0, loop.train(_dense(config, total), dense), [])]
    for number, density in enumerate(densities, 1):
        ticket, actual = _ticket(config, folder, number, density, before, start, experiment)
        settings = _round(config, total, ticket, actual, rewind_step)
        result = loop.train(settings, folder / f'round_{number}')
        rows.append(_row(number, result['density'], result, rows))
        before = settings, folder / f'round_{number}'
    records.write(folder / TABLE, {'rewind_step': rewind_step, 'rounds': [row._asdict() for row in rows]})
    return rows


def _densities(config: config_lib.Config, rounds: int | list[float]) -> list[float]:
    """The density after each round."""
    last = config.sparsity.density
    if isinstance(rounds, int):
        if rounds < 1:
            raise ValueError(f'--rounds={rounds}: must be at least 1.')
        return [last ** (number / rounds) for number in range(1, rounds + 1)]
    given = ','.join(map(str, rounds))
    if not all(0 < after < before for before, after in zip([1.0, *rounds], rounds, strict=False)):
        raise ValueError(f'--rounds={given}: densities must fall, from below 1 to above 0.')
    if rounds[-1] != last:
        raise ValueError(f'--rounds={given} ends at another density than sparsity.density={last}: give the same.')
    return rounds


def _check(config: config_lib.Config) -> None:
    if config.train.average_decay or config.train.init_from or config.sparsity.storage != 'dense':
        raise ValueError(
            '--mode=lottery rewinds the weights of a dense network: leave train.average_decay at 0, train.init_from empty and '
            "sparsity.storage='dense'."
        )
    if config.train.schedule_steps:
        raise ValueError(
            f'config.train.schedule_steps={config.train.schedule_steps}: all trainings of --mode=lottery have the same schedule, of their steps: '
            'leave it at 0.'
        )
    if not isinstance(granularity.get(config.sparsity.granularity), granularity.Unstructured | granularity.Block):
        raise ValueError(
            f'config.sparsity.granularity={config.sparsity.granularity!r}: one threshold over all layers prunes single weights or blocks: take these.'
        )
    for name in ('grow', 'prune', 'redistribute', 'distribution'):
        if value := getattr(config.sparsity, name):
            raise ValueError(
                f'config.sparsity.{name}={value!r} has no effect with --mode=lottery, which prunes by magnitude: leave it empty.'
            )
    if config.sparsity.method not in ('static', config_lib.Sparsity().method):
        raise ValueError(f"--mode=lottery moves no masks: leave out sparsity.method={config.sparsity.method!r}, or take 'static'.")


def _identity(config: config_lib.Config) -> dict[str, Any]:
    """The settings of the last round, wherever it lies."""
    return {name: value for name, value in config_lib.identity(config).items() if name != 'train.init_from'}


def _keep_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes what makes up the rounds, before their first file; ValueError where those that are there were made of other settings."""
    path = folder / records.LOTTERY
    if path.exists():
        stored = records.read(path)
        if different := [name for name in settings if stored.get(name) != settings[name]]:
            listed = '; '.join(f'{name}: {stored.get(name)!r} there, {settings[name]!r} given' for name in different[:3])
            raise ValueError(f'--workdir={folder} holds other lottery tickets ({listed}): give another --workdir.')
        return
    folder.mkdir(parents=True, exist_ok=True)
    records.write(path, settings)


def _dense(config: config_lib.Config, steps: int = 0) -> config_lib.Config:
    """The dense training; its sparse layers are those that the rounds prune."""
    kept = {name: getattr(config.sparsity, name) for name in ('dense', 'matrix_axes')}
    sparsity = dataclasses.replace(config_lib.Sparsity(), method='dense', **kept)
    train = dataclasses.replace(
        config.train, steps=steps or config.train.steps, schedule_steps=steps or config.train.schedule_steps
    )
    return dataclasses.replace(config, sparsity=sparsity, train=train)


def _round(config: config_lib.Config, total: int, ticket: pathlib.Path, density: float, rewind_step: int) -> config_lib.Config:
    kept = {name: getattr(config.sparsity, name) for name in ('granularity', 'matrix_axes', 'dense', 'kernels')}
    sparsity = dataclasses.replace(config_lib.Sparsity(), method='static', distribution='uniform', density=density, **kept)
    train = dataclasses.replace(
        config.train, steps=total, schedule_steps=total, init_from=str(ticket.absolute()), start_step=rewind_step
    )
    return dataclasses.replace(config, sparsity=sparsity, train=train)


def _start(config: config_lib.Config, folder: pathlib.Path, prepared: run_lib.Run, rewind_step: int) -> pathlib.Path:
    """The file of the weights that rounds start with; after it the dense run's folder, which goes on from there."""
    path = folder / 'start.npz'
    if not path.exists():
        if rewind_step:
            early = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=rewind_step))
            loop.train(early, folder / 'start')
            tree, masks, _ = exporting.network(early, folder / 'start')
        else:
            state = prepared.devices.first(prepared.experiment.init, jax.random.key(config.seed))
            params, model_state = prepared.devices.host((state.params, state.model_state))
            tree, masks = exporting.with_state(params, jax.tree.map(lambda _: True, params), model_state)
        _save(path, tree, masks, 'unstructured', {'step': rewind_step})
    if rewind_step and not (folder / 'round_0').exists():
        partial = folder / 'round_0.tmp'
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder / 'start', partial, ignore=shutil.ignore_patterns('result.json', 'report.png'))
        partial.rename(folder / 'round_0')
    return path


def _save(path: pathlib.Path, tree: Any, masks: Any, granularity: str, info: dict[str, Any]) -> None:
    with records.replacing(path, '.tmp.npz') as partial:
        files.save(partial, tree, masks, info, granularity=granularity)


def _ticket(
    config: config_lib.Config,
    folder: pathlib.Path,
    number: int,
    density: float,
    before: tuple[config_lib.Config, pathlib.Path],
    start: pathlib.Path,
    experiment: state_lib.Experiment,
) -> tuple[pathlib.Path, float]:
    """The file of a round's first network, and its density: rewound weights under a mask of the largest of the round before."""
    path = folder / f'round_{number}.npz'
    units = config.sparsity.granularity
    if not path.exists():
        tree, _, _ = exporting.network(*before)
        patterns = [pattern for pattern in config.sparsity.dense.split(',') if pattern]
        options: dict[str, Any] = dict(prune_scope='global', granularity=units, dense=patterns, stacked=experiment.stacked)
        options['matrix_axes'] = config.sparsity.matrix_axes or None
        _, masks = jax.device_get(pruning.prune(tree, density, **options))
        values, _, _ = files.load(start)
        rewound = jax.tree.map(lambda value, mask: np.where(mask, value, np.zeros((), value.dtype)), values, masks)
        _save(path, rewound, masks, exporting.units(config), {'round': number, 'density': density})
    _, masks, _ = files.load(path)
    counts = [(int(mask.sum()), mask.size) for _, mask in layers_lib.leaf_paths(masks) if np.ndim(mask)]
    return path, sum(count for count, _ in counts) / sum(size for _, size in counts)


def _row(number: int, density: float, result: dict[str, Any], before: list[Round]) -> Round:
    row = Round(
        round=number,
        density=density,
        nonzeros=result['nonzeros'],
        result=headline(result),
        score=result['eval_loss'] if 'eval_loss' in result else result['test_accuracy'],
        operations=result['operations_training'] + (before[-1].operations if before else 0.0),
        seconds=result['seconds'] + (before[-1].seconds if before else 0.0),
    )
    _LOG.info('lottery: round %d, %.2f%% of the weights: %s', number, 100 * density, row.result)
    return row


def print_table(rows: list[Round]) -> None:
    """Prints the rounds."""
    console = Console()
    cells = [
        (
            f'round {row.round}' if row.round else 'dense',
            f'{row.density:.2%}',
            f'{row.nonzeros:,}',
            row.result,
            f'{row.operations / rows[0].operations:.2f}',
            f'{row.seconds:.0f}',
        )
        for row in rows
    ]
    title = 'lottery tickets: operations (dense = 1) and seconds are of all trainings so far'
    columns = ('', 'density', 'nonzeros', 'result', 'operations', 'seconds')
    console.print(named_table(title, columns, cells, width=console.width, left=('result',)))
