"""The communication in a compiled program: each collective operation and its bytes, read from the program's text."""

import math
import re
from typing import NamedTuple

KINDS = ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter', 'collective-broadcast')
_BYTES = {'pred': 1, 's4': 1, 'u4': 1, 'token': 0} | {
    f'{kind}{bits}': bits // 8 for kind in ('s', 'u', 'f', 'bf', 'c') for bits in (8, 16, 32, 64, 128)
}
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(')
_HEADER = re.compile(r'^(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_CALLED = re.compile(
    r'(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)'
)


class Collective(NamedTuple):
    """One operation of a compiled program."""

    kind: str  # one of KINDS
    bytes: int  # of its result on one device, each time it runs
    shape: str
    loop: str  # the body of the innermost loop that it is in, by name; empty: it runs once


def find(text: str) -> list[Collective]:
    """The collectives of a program.

    Args:
      text: ``jax.jit(f).lower(...).compile().as_text()``.

    Returns:
      In the order of the text.

    Example:
      >>> find('''ENTRY %main (x: f32[4]) -> f32[4] {
      ...   ROOT %all-reduce.1 = f32[4]{0} all-reduce(%x), to_apply=%add
      ... }''')
      [Collective(kind='all-reduce', bytes=16, shape='f32[4]{0}', loop='')]
    """
    operations: dict[str, list[tuple[str, str]]] = {}  # by the computation that they are in
    calls: dict[str, set[str]] = {}
    bodies, name = set(), ''
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[1]
            operations[name], calls[name] = [], set()
        elif instruction := _INSTRUCTION.match(line):
            kind = instruction[2].removesuffix('-start')
            if kind in KINDS:
                operations[name].append((kind, instruction[1]))
            called = {c.strip(' %') for group in _CALLED.findall(line) for c in group.strip('{}').split(',')}
            calls[name] |= called
            if instruction[2] == 'while':
                bodies |= set(re.findall(r'body=%?([\w.-]+)', line))
    loops: dict[str, str] = {}
    for body in bodies:  # what a loop's body calls is in the loop, unless it is a loop itself
        reached, left = set(), [body]
        while left:
            one = left.pop()
            if one not in reached:
                reached.add(one)
                left += [c for c in calls.get(one, ()) if c not in bodies]
        loops |= dict.fromkeys(reached, body)
    return [
        Collective(kind, size_of(shape), shape, loops.get(name, '')) for name, rows in operations.items() for kind, shape in rows
    ]


def size_of(shape: str) -> int:
    """Bytes of a shape, or of a tuple of shapes, as the compiler writes them.

    >>> size_of('(u32[3,2]{1,0}, pred[])')
    25
    """
    arrays = re.findall(r'([a-z]+\d*)\[([\d,]*)\]', shape)
    return sum(_BYTES[kind] * math.prod(int(n) for n in sizes.split(',') if n) for kind, sizes in arrays)
