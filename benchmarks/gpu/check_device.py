"""All that a person with a GPU and some minutes should run: is everything right on this device, and as fast as predicted?

    make check-gpu                        # twelve minutes
    make check-gpu FLAGS=--minutes=4      # the most telling checks first
    make check-gpu FLAGS=--dry_run        # here, without a GPU: tiny shapes, kernels in the interpreter, four minutes

Each check is a process of its own and may fail alone; those that no time is left for are listed as not run. After each one the table is
printed anew and kept, as JSON and with each check's output, in --out. PyTorch beside is used where it is installed, and tokamax.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.gpu import checks, measured
from benchmarks.gpu.checks import CHECKS, Row


def _run(name: str, dry: bool, seconds: float, out: pathlib.Path) -> list[Row]:
    """Runs a check in a process of its own; its output goes to a file. What it found before it failed counts."""
    file = out / name.replace(' ', '_')
    command = [sys.executable, '-m', 'benchmarks.gpu.check_device', f'--only={name}', f'--out={out}']
    begin, code = time.monotonic(), None
    with file.with_suffix('.log').open('w') as log:
        process = subprocess.Popen(
            [*command, '--dry_run'] if dry else command,
            cwd=checks.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(max(1.0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started too
        process.wait()
    took = f'{time.monotonic() - begin:.0f} s'
    found = file.with_suffix('.json')
    rows = [Row(*row) for row in json.loads(found.read_text())] if found.exists() else []
    if code is None:
        return [*rows, Row('', f'not done after {took}: see {file}.log', 'an end', False)]
    if code:
        last = file.with_suffix('.log').read_text(errors='replace').strip().splitlines()[-1:] or ['']
        return [*rows, Row('', f'failed, code {code}: {last[0][:300]} (see {file}.log)', 'no error', False)]
    return [*rows, Row('', f'took {took}')]


def _one(found: Iterator[Row], path: pathlib.Path) -> int:
    """Keeps each row as soon as it is found; says what went wrong in the last line."""
    rows: list[Row] = []
    try:
        for row in found:
            rows.append(row)
            print(row, flush=True)
            path.write_text(json.dumps(rows))
    except Exception as error:
        traceback.print_exc()
        print(f'{type(error).__name__}: {" ".join(str(error).split())}')
        return 1
    return 0


def _print(rows: Sequence[tuple[str, Row]]) -> None:
    table = Table(title='check-gpu')
    for column in ('check', 'of', 'result', 'expected', ''):
        table.add_column(column, overflow='fold')
    for name, row in rows:
        mark = {True: '[green]right[/]', False: '[red]WRONG[/]', None: ''}[row.right]
        table.add_row(name, row.what, row.result, row.expected, mark)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=12.0)
    parser.add_argument('--dry_run', action='store_true', help='without a GPU, with tiny shapes')
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/check_gpu'))
    parser.add_argument('--only', choices=CHECKS, help='one check, in this process')
    args = parser.parse_args(arguments)
    os.environ[checks.OUT] = str(args.out.absolute())
    # a program that several runs need is compiled once: minutes are short, and on a GPU XLA's choices would differ from one to the next
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(args.out.absolute() / 'compiled'))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
    if args.dry_run:
        os.environ['JAX_PLATFORMS'] = 'cpu'
    if args.only:
        run = checks.DRY.get(args.only, CHECKS[args.only].run) if args.dry_run else CHECKS[args.only].run
        return _one(run(args.dry_run), args.out / f'{args.only.replace(" ", "_")}.json')
    if not args.dry_run and (reason := measured.no_gpu()):
        parser.error(f'{reason}: name a Python that has jax for it, as in make check-gpu PYTHON=python3, or give --dry_run.')
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f'--out={args.out} is there already: name another folder, or remove it.')
    args.out.mkdir(parents=True, exist_ok=True)
    begin, rows = time.monotonic(), []
    for name, check in CHECKS.items():
        left = 60 * args.minutes - (time.monotonic() - begin)
        if left > 30:
            rows += [(name, row) for row in _run(name, args.dry_run, min(left, check.seconds), args.out)]
        else:
            rows.append((name, Row('', 'not run: no time was left')))
        (args.out / 'table.json').write_text(json.dumps([{'check': name} | row._asdict() for name, row in rows], indent=1))
        _print(rows)
    print(f'kept in {args.out}/table.json')
    return int(any(row.right is False for _, row in rows))


if __name__ == '__main__':
    sys.exit(main())
