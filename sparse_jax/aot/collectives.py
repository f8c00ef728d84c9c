"""The communication in a compiled program: each collective operation and its bytes, read from the program's text."""

from typing import NamedTuple

from sparse_jax.aot import hlo

KINDS = ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter', 'collective-broadcast')


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
    program = hlo.parse(text)
    loops = hlo.in_loops(program)
    rows = [(name, row) for name, computation in program.computations.items() for row in computation.values()]
    return [
        Collective(kind, hlo.size_of(row.shape), row.shape, loops.get(name, ''))
        for name, row in rows
        if (kind := row.opcode.removesuffix('-start')) in KINDS
    ]
