"""Plans a config: prints the recommendation, and writes the page and the numbers where a folder is named."""

import copy
import json
import pathlib
from collections.abc import Mapping, Sequence

from rich.console import Console

from sparse_jax import config as config_lib
from sparse_jax.aot import lowering
from sparse_jax.plan import answers as answers_lib
from sparse_jax.plan import hardware, network, numbers, page, reasons, words
from sparse_jax.plan.answers import Answer
from sparse_jax.train import console as console_lib

PAGE, NUMBERS = 'plan.html', 'plan.json'


def parse_prices(text: str) -> dict[str, float]:
    """Prices an hour, by device; ValueError for anything else.

    >>> parse_prices('H100=2.5,A100=1.29')
    {'H100': 2.5, 'A100': 1.29}
    """
    prices = {}
    for part in filter(None, (part.strip() for part in text.split(','))):
        name, _, value = part.partition('=')
        try:
            price = float(value)
        except ValueError:
            price = -1.0
        if not (name and 0 <= price < float('inf')):
            raise ValueError(f'--prices={part}: must be DEVICE=PRICE an hour, such as H100=2.5.')
        prices[name] = price
    return prices


def run(
    config: config_lib.Config,
    title: str,
    devices: str,
    *,
    folder: pathlib.Path | None = None,
    outputs: int | None = None,
    own_hardware: pathlib.Path | None = None,
    prices: Mapping[str, float] | None = None,
    deadline: float | None = None,
    exact: bool = False,
    command: str = '',
) -> None:
    """Plans a config.

    Args:
      config: the settings.
      title: what they are called.
      devices: such as ``8xH100,16xv5e``.
      folder: where the page and the numbers go; None: nothing is written.
      outputs: classes or tokens of data that is not read.
      own_hardware: file with more devices, prices or corrections.
      prices: an hour of a device, by name.
      deadline: hours that the training may take.
      exact: whether the platform's compiler is asked for the memory of the recommended plan.
      command: that asked for it.

    Raises:
      ValueError: for anything wrong, and where the network fits on none of the devices.
    """
    if outputs is not None and outputs < 2:
        raise ValueError(f'--vocabulary={outputs}: must be at least 2.')
    if deadline is not None and not deadline > 0:
        raise ValueError(f'--deadline={deadline:g}: must be hours, above 0.')
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f'--workdir={folder} is a file: give a folder, or none.')
    known = hardware.devices(own_hardware, prices)
    groups = hardware.parse(devices, known)
    planned = network.of_config(config, outputs)
    answers = [answers_lib.answer(planned, device, number) for number, device in groups]
    chosen = answers_lib.recommended(answers, deadline)
    _print(answers, chosen)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAGE).write_text(page.page(title, answers, chosen, command))
        (folder / NUMBERS).write_text(json.dumps(numbers.as_json(answers, chosen), indent=2) + '\n')
        print(f'page:    {folder / PAGE}\nnumbers: {folder / NUMBERS}')
    if exact:
        print(_exact(chosen))


_PRINTED = ('devices', 'data x model', 'ms a step', 'a second', 'time', 'cost', 'memory', 'vs dense')


def _exact(chosen: Answer) -> str:
    """What the compiler says of the plan's memory, beside the formula."""
    plan, config = chosen.plan, copy.deepcopy(chosen.plan.network.config)
    for flag in plan.flags():
        name, _, value = flag.removeprefix('--config.').partition('=')
        config_lib.override(config, name, value)
    if plan.device.kind == 'cpu':
        return 'exact:   asks the compilers for GPUs and TPUs only'
    try:
        lowered = lowering.lower(config, {'gpu': 'cuda', 'tpu': 'tpu'}[plan.device.kind])
    except ValueError as error:  # data that is not here, or too few devices to stand in
        return f'exact:   not here ({error})'
    if lowered.memory is None:
        return f'exact:   the compiler is not here ({lowered.why_not_compiled})'
    parts = lowered.memory
    compiled = parts['arguments'] + parts['results'] - parts['of these in place'] + parts['temporary']
    return f'exact:   {words.size(compiled)} by the compiler, {words.size(plan.memory.peak)} by formula'


def _print(answers: Sequence[Answer], chosen: Answer) -> None:
    console = Console()
    rows = [dict(zip(page.COLUMNS, page.row(a), strict=True)) for a in answers]
    shown = [name for name in _PRINTED if any(row[name] for row in rows)]
    cells = [[row[name] for name in shown] for row in rows]
    title = f'{chosen.plan.network.unit} a second, and what they take'
    console.print(console_lib.named_table(title, shown, cells, width=console.width, left=('data x model',)))
    print(page.headline(chosen))
    for sentence in (*reasons.reasons(chosen, answers), *chosen.plan.network.assumed):
        print(f'- {sentence}')
    if flags := ' '.join(chosen.plan.flags()):
        print(f'flags:   {flags}')
