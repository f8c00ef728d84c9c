"""Where each millisecond of a training step goes, next to what its bytes and operations would take at this machine's peaks.

    python -m benchmarks.steps.profile_step --model=wrn_16_8 --density=0.05

It traces some of our steps (benchmarks/steps/train_step.py) with jax.profiler, divides each moment equally among the instructions that
run in it, and prints a table by kind of work; --image=FILE draws it, --instructions=20 lists the longest instructions. Operations are
those of products with active weights; bytes count each operand and result once. Cost: two minutes on two cores.
"""

import argparse
import collections
import math
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt

from benchmarks import trace
from benchmarks.layers import compare
from benchmarks.steps import train_step, twins
from sparse_jax.launch import allocator

_SIZES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}
_SHAPE = re.compile(r'\b(' + '|'.join(_SIZES) + r')\[([\d,]*)\]')
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, |$)(.*)')


class Instruction(NamedTuple):
    """One instruction of a compiled step, from its HLO text."""

    kind: str  # kind of work that it belongs to
    bytes: float  # size of its operands and results
    operations: float  # two for each multiply-add of a product


def _shapes(text: str) -> list[tuple[int, tuple[int, ...]]]:
    return [(_SIZES[kind], tuple(int(n) for n in sides.split(',') if n)) for kind, sides in _SHAPE.findall(text)]


def _bytes(shapes) -> int:
    return sum(size * math.prod(shape) for size, shape in shapes)


_PRODUCTS = {'forward': 'forward', 'input_gradient': 'input gradients', 'weight_gradient': 'weight gradients'}


def instructions(text: str, density: float) -> dict[str, Instruction]:
    """Parses the text of an HLO module; returns its instructions by name.

    >>> line = '  %dot.1 = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, metadata={op_name="jit(step)/jvp()/dot"}'
    >>> defined = '  %a = f32[8,16]{1,0} parameter(0)\\n  %b = f32[16,4]{1,0} parameter(1)\\n'
    >>> instructions(defined + line, 1.0)['dot.1']
    Instruction(kind='matrix products', bytes=896, operations=1024.0)
    """
    results, by_name = {}, {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            results[match[1]] = _shapes(match[2])
    for line in text.splitlines():
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, _, opcode, operand_names, attributes = match.groups()
        operands = [shape for operand in re.findall(r'%([\w.\-]+)', operand_names) for shape in results.get(operand, [])]
        size, operations = _bytes(operands) + _bytes(results[name]), 0.0
        path = m[1] if (m := re.search(r'op_name="([^"]*)"', attributes)) else ''
        if target := re.search(r'custom_call_target="sparse_jax_(\w+)"', attributes):
            kind = 'pooling'
            if target[1] in _PRODUCTS:
                dense = 's32[0]' in attributes  # an empty list of nonzeros
                operations = _product_operations(operands + results[name]) * (1 if dense else density)
                kind = f'{"dense" if dense else "sparse"} products, {_PRODUCTS[target[1]]}'
        elif opcode == 'convolution' or '__conv' in attributes or 'convolution' in name:
            kind = "XLA's convolutions"
        elif opcode == 'dot' or name.startswith('dot') or path.endswith('dot_general'):
            kind = 'matrix products'
            operations = 2.0 * math.sqrt(math.prod(math.prod(s) for _, s in [*operands[:2], *results[name][:1]]))
        elif 'transpose(jvp' in path:
            kind = 'elementwise and sums, backward'
        elif 'jvp(' in path:
            kind = 'elementwise and sums, forward'
        else:
            kind = 'optimizer and masks'
        by_name[name] = Instruction(kind, size, operations)
    return by_name


def _product_operations(shapes) -> float:
    """Returns the operations of one of our kernels' products with a dense weight, from its operands' and results' shapes."""
    sides = [side for _, side in shapes]
    weight = next((s for s in sides if len(s) == 4 and math.prod(s[:2]) <= 121), (1, 1, 1, 1))
    pixels = [math.prod(s) // s[3] for s in sides if len(s) == 5 and s[3] == weight[3]]
    pixels += [math.prod(s[:3]) for s in sides if len(s) == 4 and s[3] == weight[3] and s != weight]
    return 2.0 * math.prod(weight) * min(pixels, default=0)


def measure(
    name: str, density: float, batch_size: int, dense_gradients: bool, steps: int, layout: str
) -> tuple[list[dict], list[dict]]:
    """Profiles steps of a network; returns rows by kind of work and rows by instruction, the longest first."""
    batch, params = twins.batch(name, batch_size), twins.parameters(name)
    method = 'dense' if density == 1 else 'sparse_momentum'
    ours = train_step.Ours(name, method, density, batch, params, layout=layout)
    jit = ours.step.lower(ours.state, batch, ours.patterns, dense_gradients=dense_gradients)
    compiled, state = jit.compile(), ours.state
    by_name = instructions(compiled.as_text() or '', density)
    for _ in range(2):
        state, _ = compiled(state, batch, ours.patterns)
    jax.block_until_ready(state)
    seconds: collections.Counter[str] = collections.Counter()
    for _ in range(steps):  # one trace per step, so that the time between two steps counts for neither
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state, _ = compiled(state, batch, ours.patterns)
                jax.block_until_ready(state)
            seconds.update(trace.shares(trace.events(pathlib.Path(folder), 'jit_train_step')))
    rows = []
    for instruction, total in seconds.items():
        kind, bytes_, operations = by_name.get(instruction, Instruction('other', 0, 0))
        kind = instruction if instruction == 'nothing runs' else kind
        rows.append({'name': instruction, 'kind': kind, 'seconds': total / steps, 'bytes': bytes_, 'operations': operations})
    rows.sort(key=lambda row: -row['seconds'])
    kinds: dict[str, dict[str, Any]] = {}
    for row in rows:
        kind = kinds.setdefault(row['kind'], {'kind': row['kind'], 'seconds': 0.0, 'bytes': 0.0, 'operations': 0.0})
        for key in ('seconds', 'bytes', 'operations'):
            kind[key] += row[key]
    return sorted(kinds.values(), key=lambda row: -row['seconds']), rows


def _floors(row: dict, peak: tuple[float, float]) -> tuple[float, float]:
    """Returns the seconds that a row's operations and its bytes would take at the peaks."""
    return row['operations'] / 2 / peak[0], row['bytes'] / peak[1]


def table(rows: list[dict], peak: tuple[float, float]) -> str:
    """Formats the rows by kind of work as a Markdown table."""
    total = {'kind': 'the step', **{key: sum(row[key] for row in rows) for key in ('seconds', 'bytes', 'operations')}}
    lines = [
        '| part | time | share | operations | at the peak they take | bytes | at the peak they take |',
        '|---|---:|---:|---:|---:|---:|---:|',
    ]
    for row in [*rows, total]:
        operations, bytes_ = _floors(row, peak)
        cells = [
            row['kind'],
            f'{1e3 * row["seconds"]:.1f} ms',
            f'{row["seconds"] / total["seconds"]:.0%}',
            f'{row["operations"] / 1e9:.1f} G' if row['operations'] else '',
            f'{1e3 * operations:.1f} ms' if row['operations'] else '',
            f'{row["bytes"] / 1e6:,.0f} MB' if row['bytes'] else '',
            f'{1e3 * bytes_:.1f} ms' if row['bytes'] else '',
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw(rows: list[dict], peak: tuple[float, float], title: str, path: pathlib.Path) -> None:
    """Draws bars of the measured times, each with a mark at the larger of its two floors."""
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.4), layout='constrained')
    heights = range(len(rows))[::-1]
    axes.barh(heights, [1e3 * row['seconds'] for row in rows], color='#4878a8', label='measured')
    floors = [1e3 * max(_floors(row, peak)) for row in rows]
    axes.scatter(
        floors, heights, marker='|', s=260, color='#d0602a', linewidths=2.5, zorder=3, label='its operations or bytes at the peak'
    )
    axes.set_yticks(heights, [row['kind'] for row in rows])
    axes.set_xlabel('milliseconds')
    axes.set_title(title)
    axes.grid(axis='x', alpha=0.3)
    axes.legend(loc='lower right')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=twins.MODELS, default='wrn_16_8')
    parser.add_argument('--density', type=float, default=0.05, help='1 profiles the dense twin')
    parser.add_argument('--dense_gradients', action='store_true', help='profile a step of the window before a mask update')
    parser.add_argument('--layout', default='auto', help="'channels' uses plain XLA between the products")
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--instructions', type=int, default=0, help='number of the longest instructions to list')
    parser.add_argument('--image', type=pathlib.Path, help='default: runs/profile_step/MODEL-DENSITY.png')
    args = parser.parse_args()
    peak = compare.peaks()
    kinds, rows = measure(args.model, args.density, args.batch_size, args.dense_gradients, args.steps, args.layout)
    print(f'peaks: {2 * peak[0] / 1e9:.0f} GFLOP/s, {peak[1] / 1e9:.1f} GB/s')
    print(table(kinds, peak))
    for row in rows[: args.instructions]:
        print(f'{1e3 * row["seconds"]:8.2f} ms  {row["bytes"] / 1e6:8.1f} MB  {row["kind"]}: {row["name"]}')
    title = f'{args.model}, {args.density:.0%} of the weights, batch {args.batch_size}: {1e3 * sum(r["seconds"] for r in rows):.0f} ms a step'
    draw(kinds, peak, title, args.image or pathlib.Path(f'runs/profile_step/{args.model}-{args.density:g}.png'))


if __name__ == '__main__':
    allocator.keep_memory()
    main()
