"""A compiled program, read from its text: computations, instructions, and where in the source each comes from."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {'pred': 1, 's4': 1, 'u4': 1, 'token': 0} | {
    f'{kind}{bits}': bits // 8 for kind in ('s', 'u', 'f', 'bf', 'c') for bits in (8, 16, 32, 64, 128)
}
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_CALLED = re.compile(
    r'(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)'
)
_ROW = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')


class Instruction(NamedTuple):
    """One operation of a program."""

    name: str
    shape: str  # of its result, as the compiler writes it
    opcode: str
    operands: tuple[str, ...]  # names
    arguments: str  # what stands in its brackets
    attributes: str  # what stands behind them
    is_root: bool  # whether its computation returns it

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        groups = _CALLED.findall(self.attributes)
        return [name.strip(' %') for group in groups for name in group.strip('{}').split(',')]

    def attribute(self, pattern: str) -> str:
        """What a regular expression's group finds in the attributes; empty where it does not match."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ''

    @property
    def path(self) -> str:
        """Which function of the traced program it comes from, such as ``jit(step)/jvp(layer)/dot_general``."""
        return self.attribute(r'op_name="([^"]*)"')


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """A whole program."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[
        int, tuple[tuple[str, int, str], int]
    ]  # of the source, by number: file, line and function, and the frame that called it

    def root(self, computation: str) -> Instruction:
        """What a computation returns."""
        return next(instruction for instruction in self.computations[computation].values() if instruction.is_root)

    def source(self, instruction: Instruction) -> list[tuple[str, int, str]]:
        """File, line and function that an instruction comes from, and their callers; empty where the compiler made it."""
        number, rows = int(instruction.attribute(r'stack_frame_id=(\d+)') or 0), []
        while number in self.frames:
            row, caller = self.frames[number]
            rows.append(row)
            if caller == number:
                break
            number = caller
        if not rows and (file := instruction.attribute(r'source_file="([^"]*)"')):
            rows.append((file, int(instruction.attribute(r'source_line=(\d+)') or 0), ''))
        return rows


@functools.lru_cache(maxsize=4)
def parse(text: str) -> Program:
    """Reads a program.

    Args:
      text: ``jax.jit(f).lower(...).compile().as_text()``.

    Returns:
      It, by computation and instruction.

    Example:
      >>> program = parse('''ENTRY %main (x: f32[4]) -> f32[4] {
      ...   %x = f32[4]{0} parameter(0)
      ...   ROOT %sum = f32[4]{0} add(%x, %x)
      ... }''')
      >>> program.root(program.entry).opcode, program.root(program.entry).operands
      ('add', ('x', 'x'))
    """
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {}
    entry, current, table = '', {}, None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line in ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames'):
            table = tables[line] = {}
        elif table is not None and (row := _ROW.match(line)):
            table[int(row[1])] = row[2] if row[2] is not None else row[3]
        elif match := _INSTRUCTION.match(line):
            arguments, attributes = _split(line, match.end())
            names = tuple(re.findall(r'%([\w.-]+)', arguments))
            current[match[2]] = Instruction(match[2], match[3], match[4], names, arguments, attributes, bool(match[1]))
    return Program(computations, entry, _frames(tables))


def _split(line: str, start: int) -> tuple[str, str]:
    """What stands in the brackets that have been opened, and what stands behind them."""
    depth = 1
    for i in range(start, len(line)):
        depth += {'(': 1, ')': -1}.get(line[i], 0)
        if depth == 0:
            return line[start:i], line[i + 1 :]
    return line[start:], ''


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[tuple[str, int, str], int]]:
    field = lambda row, name: int(found[1]) if (found := re.search(rf'\b{name}=(\d+)', row)) else 0
    files, functions = tables.get('FileNames', {}), tables.get('FunctionNames', {})
    locations = {
        number: (files.get(field(row, 'file_name_id'), ''), field(row, 'line'), functions.get(field(row, 'function_name_id'), ''))
        for number, row in tables.get('FileLocations', {}).items()
    }
    # The compiler counts from 1 and writes a frame that nobody called as its own parent, or one above.
    return {
        number: (locations[field(row, 'file_location_id')], field(row, 'parent_frame_id') - 1)
        for number, row in tables.get('StackFrames', {}).items()
        if field(row, 'file_location_id') in locations
    }


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Type and extents of each array of a shape.

    >>> arrays('(u32[3,2]{1,0}, pred[])')
    [('u32', (3, 2)), ('pred', ())]
    """
    rows = re.findall(r'([a-z]+\d*)\[([\d,]*)\]', shape)
    return [(kind, tuple(int(n) for n in sizes.split(',') if n)) for kind, sizes in rows]


def size_of(shape: str) -> int:
    """Bytes of a shape, or of a tuple of shapes, as the compiler writes them.

    >>> size_of('(u32[3,2]{1,0}, pred[])')
    25
    """
    return sum(_BYTES[kind] * math.prod(sizes) for kind, sizes in arrays(shape))


def in_loops(program: Program) -> dict[str, str]:
    """Which computations run in a loop: the body of the innermost one, by name."""
    calls = {name: {c for row in rows.values() for c in row.called} for name, rows in program.computations.items()}
    whiles = [row for rows in program.computations.values() for row in rows.values() if row.opcode == 'while']
    bodies = {row.attribute(r'body=%?([\w.-]+)') for row in whiles}
    loops: dict[str, str] = {}
    for body in bodies:  # what a loop's body calls is in the loop, unless it is a loop itself
        reached, left = set(), [body]
        while left:
            one = left.pop()
            if one not in reached:
                reached.add(one)
                left += [c for c in calls.get(one, ()) if c not in bodies]
        loops |= dict.fromkeys(reached, body)
    return loops


def executed(program: Program) -> Iterator[tuple[str, Instruction, int]]:
    """The instructions that a run executes as kernels: computation, instruction, and how often; loops by their known trips, and of
    branches the largest one.

    What moves nothing (tuples, bitcasts, parameters) is left out, and what is inside of a fusion belongs to it.
    """
    yield from _executed(program, program.entry, 1)


_FREE = {
    'parameter',
    'constant',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'after-all',
    'opt-barrier',
    'add-dependency',
    'partition-id',
}


def _executed(program: Program, name: str, count: int) -> Iterator[tuple[str, Instruction, int]]:
    for row in program.computations[name].values():
        if row.opcode in _FREE or row.opcode.endswith('-done'):
            continue
        if row.opcode == 'while':
            trips = int(row.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            yield from _executed(program, row.attribute(r'body=%?([\w.-]+)'), count * trips)
        elif row.opcode == 'conditional':
            branches = [list(_executed(program, branch, count)) for branch in row.called]
            yield from max(branches, key=len)
        elif row.opcode in ('call', 'async-start'):
            for called in row.called:
                yield from _executed(program, called, count)
        else:
            yield name, row, count
