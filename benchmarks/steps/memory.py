"""The memory of whole training runs on CPU, dense and sparse, and the arrays that are alive at a step's peak.

    python -m benchmarks.steps.memory --model=vgg_d,wrn_16_8

Each run is `launch.py` with the config of that network on digits of CIFAR's shape, in a process of its own, over two updates of the masks,
an evaluation and checkpoints. The largest resident set is the system's, of all that the process does: imports, compiling, measuring
kernels, training. The arrays are those that XLA says are alive at the peak of the step that most steps are; names that begin with `state`
are the training state's. --repository=FOLDER measures another checkout of this project. Cost: ten minutes on two cores.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

_STEPS, _EVERY = 70, 30


class Row(NamedTuple):
    """One run, in MiB."""

    model: str
    method: str
    peak: int  # the largest resident set
    state: float  # alive at the peak of a step: the training state, its patterns and a batch
    temporary: float  # what the step has made by then
    alive: list[tuple[float, str]]  # all of these, the largest first


def _flags(model: str, method: str, density: float, batch_size: int, folder: str) -> list[str]:
    settings = {
        'sparsity.method': method, 'sparsity.density': density, 'sparsity.update_every': _EVERY, 'train.steps': _STEPS,
        'data.batch_size': batch_size, 'checkpoint.every': _STEPS // 2, 'train.eval_every': _STEPS // 2,
    }  # fmt: skip
    return [
        f'--config=configs/cifar10_{model}.py:offline',
        f'--workdir={folder}/run',
        *(f'--config.{name}={value}' for name, value in settings.items()),
    ]


def _run(repository: pathlib.Path, flags: list[str], folder: str, xla_flags: str = '') -> dict:
    command, environment = (
        [sys.executable, 'launch.py', *flags],
        os.environ | {'XLA_FLAGS': xla_flags, 'PYTHONPATH': str(repository)},
    )
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f'error: {" ".join(command)} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}')
    return json.loads((pathlib.Path(folder) / 'run' / 'run.json').read_text())


_ALIVE = re.compile(r'[├└]── (.*) \([\d.]+%, total: .*, current: ([\d ]+) bytes')


def alive_at_peak(report: str) -> list[tuple[float, str]]:
    """MiB and names of the arrays that XLA's report on live ranges says are alive at a program's peak, the largest first.

    >>> alive_at_peak('  ├── copy.19 (0.2%, total: 2 097 152 bytes, current: 1 048 576 bytes, remaining: 1 603 076 bytes)')
    [(1.0, 'copy.19')]
    """
    return [(int(size.replace(' ', '')) / 2**20, name) for name, size in _ALIVE.findall(report)]


def _largest(dumps: pathlib.Path) -> list[tuple[float, str]]:
    """Of the step that most steps are, which is the smallest program of that name."""
    reports = [alive_at_peak(path.read_text()) for path in dumps.glob('*train_step*live-range.txt')]
    return min(reports, key=len)


def measure(model: str, method: str, density: float, batch_size: int, repository: pathlib.Path) -> Row:
    """Measures one network, trained by one method: once as it is, once for what XLA says of it."""
    with tempfile.TemporaryDirectory() as folder:
        flags = _flags(model, method, density, batch_size, folder)
        peak = _run(repository, flags, folder)['max_memory_mib']
    with tempfile.TemporaryDirectory() as folder:
        flags = _flags(model, method, density, batch_size, folder)
        dumps = f'--xla_dump_to={folder}/dump --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train_step.*'
        _run(repository, flags, folder, xla_flags=dumps)
        alive = _largest(pathlib.Path(folder) / 'dump')
    state = sum(size for size, name in alive if name.startswith(('state', 'patterns', 'batch')))
    return Row(model, method, peak, state, sum(size for size, _ in alive) - state, alive)


def table(rows: list[Row]) -> str:
    """Formats the rows as Markdown, a dense and a sparse run after the other."""
    lines = [
        '| network | largest resident set, dense | sparse | state and batch of a step, dense | sparse | temporary arrays at its peak, dense | sparse |'
    ]
    lines += ['|---|' + '---:|' * 6]
    for dense, sparse in zip(rows[::2], rows[1::2], strict=True):
        cells = [f'{value:,.0f} MiB' for pair in zip(dense[2:5], sparse[2:5], strict=True) for value in pair]
        lines.append('| ' + ' | '.join([dense.model, *cells]) + ' |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='vgg_d,wrn_16_8', help='networks, separated by commas')
    parser.add_argument('--density', type=float, default=0.05)
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--repository', type=pathlib.Path, default=pathlib.Path(__file__).parents[2])
    parser.add_argument('--arrays', type=int, default=12, help='how many of the arrays to list')
    args = parser.parse_args()
    rows = []
    for model in args.model.split(','):
        for method in ('dense', 'sparse_momentum'):
            row = measure(model, method, args.density, args.batch_size, args.repository)
            print(f'{model}, {method}: largest resident set {row.peak:,} MiB; alive at the peak of a step:', flush=True)
            for size, name in row.alive[: args.arrays]:
                print(f'  {size:8.1f} MiB  {name}')
            rows.append(row)
    print(table(rows))


if __name__ == '__main__':
    main()
