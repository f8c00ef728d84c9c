"""A step by part: what its program moves and multiplies, and the time that this needs at assumed rates.

Each kernel takes the longer of its bytes and its operations, plus a launch; sparse products the time that was measured on an H200, or
is interpolated between such times (sparse_jax/kernels/gpu/measured).
"""

import collections
import math
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.gpu import program
from sparse_jax.kernels.gpu import shipped

MEMORY = 4.0e12  # bytes a second that large elementwise kernels reach on an H200
DENSE = 750e12  # operations a second of dense products in bfloat16
LAUNCH = 3e-6  # seconds between two kernels
DEVICE = 'NVIDIA H200'  # whose sparse products were measured
ASSUMED = (
    f'assumed: {MEMORY / 1e12:g} TB/s, dense products {DENSE / 1e12:g} TFLOP/s, {1e6 * LAUNCH:g} us a kernel, sparse products as measured '
    f'on {DEVICE}'
)


class Part(NamedTuple):
    """What one part of a step takes."""

    kernels: int
    operations: float
    bytes: int
    seconds: float  # predicted


class Step(NamedTuple):
    """A whole step."""

    parts: dict[str, Part]
    lines: list[tuple[str, str, Part]]  # by part and line of the source, the slowest first
    part_of: dict[str, str]  # of each kernel, by name

    @property
    def total(self) -> Part:
        return together(self.parts.values())


def count(text: str, density: float, block: int) -> Step:
    """Counts a compiled program.

    Args:
      text: ``jax.jit(step).lower(...).compile().as_text()``, compiled for a GPU.
      density: of the sparse layers.
      block: their blocks' side.

    Raises:
      ValueError: for a kernel whose operations or time nobody knows.
    """
    parts, lines, part_of = collections.defaultdict(list), collections.defaultdict(list), {}
    for kernel in program.kernels(text):
        one = _part(kernel, density, block)
        parts[kernel.part].append(one)
        lines[kernel.part, kernel.line].append(one)
        part_of[kernel.name] = kernel.part
    by_line = sorted(((*key, together(rows)) for key, rows in lines.items()), key=lambda row: -row[2].seconds)
    return Step({name: together(parts[name]) for name in program.PARTS if parts[name]}, by_line, part_of)


def together(rows: Iterable[Part]) -> Part:
    """Their sums."""
    rows = list(rows)
    return Part(*(sum(row[i] for row in rows) for i in range(4)))  # pyright: ignore[reportArgumentType]


def _part(kernel: program.Kernel, density: float, block: int) -> Part:
    operations, moved = kernel.operations, kernel.bytes
    if kernel.kind:
        operations, moved, seconds = _sparse(kernel, density, block)
    else:
        seconds = max(moved / MEMORY, operations / DENSE)
    return Part(kernel.count, kernel.count * operations, kernel.count * moved, kernel.count * (seconds + LAUNCH))


def _sparse(kernel: program.Kernel, density: float, block: int) -> tuple[float, int, float]:
    """Operations, bytes and seconds of a sparse product."""
    first, second, *others, result = kernel.shapes
    is_compact = len(others) == (5 if kernel.kind != 'weight_gradient' else 4)  # with the numbers of units
    is_partial = kernel.kind == 'weight_gradient' and len(result) == 4  # [parts, units, inputs, outputs], added up after the kernel
    if is_partial or is_compact:
        channels = second[-1] if kernel.kind == 'weight_gradient' else result[-1]
        weights = kernel.shapes[4][-1] * first[-1] * channels  # the table of pixels has a column for each tap
    elif kernel.kind == 'weight_gradient':
        weights = math.prod(result)
    else:
        weights = math.prod(second)
    over = {'forward': result, 'input_gradient': first, 'weight_gradient': second}[kernel.kind]
    operations = 2.0 * math.prod(over[:-1]) * weights * density
    moved = 2 * (math.prod(first) + (math.prod(second) if kernel.kind == 'weight_gradient' else density * weights))
    width = 2 if is_partial and result[0] == 1 else 4
    moved = round(moved + (width * result[0] * density * weights if is_partial else 2 * math.prod(result)))
    is_matrix = first[1] == 1
    measured = shipped.seconds(
        DEVICE, kernel.kind, operations / density, weights=weights, is_matrix=is_matrix, block=block, density=density
    )
    if measured is None:
        raise ValueError(f'{kernel.name}: no {kernel.kind} in blocks of {block} was measured on {DEVICE}.')
    return operations, moved, max(measured, moved / MEMORY)
