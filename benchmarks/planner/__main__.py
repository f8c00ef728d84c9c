"""The planner's predictions beside measurements, as tables for the documentation.

    python -m benchmarks.planner
    python -m benchmarks.planner --here --json=FILE

Without flags: trainings that others published, and kernels and a step that were measured on an H200, each kernel's row predicted without it.
With --here also steps of six networks and a sum of gradients between processes, measured now on this machine's processor, which must be the
one of the device `cpu` (or name --hardware, from `python -m sparse_jax.plan.calibrate FILE`). Cost: seconds; with --here eight minutes.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from benchmarks.planner import h200, here, published, shares
from sparse_jax.launch import allocator
from sparse_jax.plan import hardware

_BOUND = {'published': 0.30, 'kernels': 0.25, 'step': 0.30, 'here': 0.25}


def _number(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def table(title: str, unit: str, rows: Sequence[tuple[str, float, float, bool, str]], bound: float) -> str:
    """A Markdown table of (name, measured, predicted, fitted, source), and how many held-out rows are within the bound."""
    lines = [f'| {title} | measured, {unit} | predicted | ratio | |', '|---|---:|---:|---:|---|']
    for name, measured, predicted, fitted, source in rows:
        remark = ', '.join(filter(None, ('fitted' if fitted else '', source)))
        lines.append(f'| {name} | {_number(measured)} | {_number(predicted)} | {predicted / measured:.2f} | {remark} |')
    held_out = [max(p / m, m / p) - 1 for _, m, p, fitted, _ in rows if not fitted]
    good = sum(error <= bound for error in held_out)
    return '\n'.join([*lines, '', f'{good} of {len(held_out)} held-out rows are within {bound:.0%}.'])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--here', action='store_true', help='measure steps on this machine')
    parser.add_argument('--hardware', type=pathlib.Path, help='file with the device cpu')
    parser.add_argument('--json', type=pathlib.Path, help='file for the rows')
    args = parser.parse_args()
    if args.here and 'GLIBC_TUNABLES' not in os.environ:  # as the launcher starts Python
        os.execve(
            sys.executable,
            [sys.executable, '-m', 'benchmarks.planner', *sys.argv[1:]],
            os.environ | {'GLIBC_TUNABLES': allocator.MALLOC},
        )
    found = {}
    for unit in ('images/s', 'tokens/s a device', 'TFLOP/s a device'):
        rows = [(r.name, r.measured, r.predicted, r.is_fitted, r.source) for r in published.rows() if r.unit == unit]
        found[f'published, {unit}'] = (unit, rows, _BOUND['published'])
    found['product on an H200, between measured densities'] = ('us', h200.kernels(interpolated=True), _BOUND['kernels'])
    found['product on an H200, beyond them'] = ('us', h200.kernels(interpolated=False), _BOUND['kernels'])
    found['step on an H200'] = ('ms', h200.steps(), _BOUND['step'])
    if args.here:
        device = hardware.devices(args.hardware)['cpu']
        steps = [
            (f'{r.name}, density {r.density:g}', 1e3 * r.measured, 1e3 * r.predicted, r.is_fitted, '') for r in here.rows(device)
        ]
        found['step on this machine'] = ('ms', steps, _BOUND['here'])
    for title, (unit, rows, bound) in found.items():
        print(f'\n{table(title, unit, rows, bound)}', flush=True)
    if args.here:
        print(f'\n{shares.table(device)}')
    if args.json:
        args.json.write_text(json.dumps({title: rows for title, (_, rows, _) in found.items()}, indent=1) + '\n')


if __name__ == '__main__':
    main()
