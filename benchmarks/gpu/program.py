"""A compiled step counted: operations and bytes of each kernel, the part of the step it belongs to, and where in the source it is from.

Bytes are those that a kernel has to move: each operand and each result once; of an operand that is only sliced or gathered from, and of
a result that is updated in place, what is touched. A loop counts as often as it turns. Operations are those of matrix products, whose
custom calls (sparse products, attention) are counted by formulas.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from sparse_jax.aot import hlo
from sparse_jax.aot.hlo import Instruction, Program

PARTS = ('sparse products', 'dense products', 'attention', 'normalisation and activations', 'loss', 'optimizer', 'masks', 'copies')
_SLICES = ('dynamic-slice', 'slice', 'gather')
_MOVES = ('bitcast', 'copy', 'convert', 'reshape', 'transpose')  # that a fusion does on the way


class Kernel(NamedTuple):
    """One kernel of a program."""

    name: str
    part: str  # one of PARTS
    line: str  # of the source: file:line function
    count: int  # how often a step runs it
    operations: float  # each time
    bytes: int  # each time
    kind: str = ''  # of a sparse product: forward, input_gradient or weight_gradient
    shapes: tuple[tuple[int, ...], ...] = ()  # of its operands and result


def kernels(text: str) -> list[Kernel]:
    """The kernels of a program, in its order.

    Args:
      text: ``jax.jit(f).lower(...).compile().as_text()``.

    Raises:
      ValueError: for a custom call without a formula.
    """
    program = hlo.parse(text)
    return [_kernel(program, computation, row, count) for computation, row, count in hlo.executed(program)]


def _kernel(program: Program, computation: str, row: Instruction, count: int) -> Kernel:
    inside = [x for name in _fused(program, row) for x in program.computations[name].values()]
    call = next((x for x in (row, *inside) if x.opcode == 'custom-call'), None)
    part, line = _part(program, row, inside, call)
    kind, shapes, operations = '', (), 0.0
    if call is not None:
        kind, shapes, operations = _custom_call(program, computation if call is row else _fused(program, row)[-1], call, part)
    else:
        products = [(x, name) for name in _fused(program, row) for x in program.computations[name].values() if x.opcode == 'dot']
        products += [(row, computation)] if row.opcode == 'dot' else []
        operations = float(sum(_dot_operations(program.computations[name], x) for x, name in products))
    return Kernel(row.name, part, line, count, operations, _bytes(program, computation, row), kind, shapes)


def _fused(program: Program, row: Instruction) -> list[str]:
    """The computations inside of a fusion, those of fusions in it too."""
    if not row.opcode.startswith('fusion'):
        return []
    names = list(row.called)
    for name in names:
        names += [c for x in program.computations[name].values() if x.opcode == 'fusion' for c in x.called]
    return names


# ----------------------------------------------------------------------------------------------------------------------------- bytes


def _bytes(program: Program, computation: str, row: Instruction) -> int:
    shapes = program.computations[computation]
    size = lambda name: hlo.size_of(shapes[name].shape)
    if row.opcode.startswith('fusion'):
        (called,) = row.called[:1]
        return _fusion_bytes(program, called)
    if row.opcode == 'dynamic-update-slice':
        return 2 * size(row.operands[1])
    if row.opcode in _SLICES:
        return 2 * hlo.size_of(row.shape)
    results = hlo.arrays(row.shape)
    if row.opcode == 'custom-call' and len(results) > 1 and results[-1][0] in ('s8', 'u8'):  # the last one is its workspace
        written = hlo.size_of(row.shape) - math.prod(results[-1][1])
    else:
        written = hlo.size_of(row.shape)
    return written + sum(size(name) for name in row.operands)


def _fusion_bytes(program: Program, name: str) -> int:
    rows = program.computations[name]
    users = collections.defaultdict(list)
    for row in rows.values():
        for operand in row.operands:
            users[operand].append(row)
    read = sum(_read(program, rows, users, row) for row in rows.values() if row.opcode == 'parameter')
    root = program.root(name)
    results = [rows[operand] for operand in root.operands] if root.opcode == 'tuple' else [root]
    return read + sum(_written(rows, result) for result in results)


def _read(program: Program, rows, users, row: Instruction) -> int:
    """Bytes of a fusion's parameter that are read."""
    whole = hlo.size_of(row.shape)
    total, left, seen = 0, [row], set()
    while left:
        value = left.pop()
        for user in users[value.name]:
            if user.name in seen:
                continue
            seen.add(user.name)
            if user.opcode in _SLICES and user.operands[0] == value.name:
                total += hlo.size_of(user.shape)
            elif user.opcode == 'dynamic-update-slice' and user.operands[0] == value.name:
                continue  # in place
            elif user.opcode == 'bitcast':
                left.append(user)
            elif user.opcode == 'tuple':
                continue  # a parameter that is handed on
            elif user.opcode == 'fusion':
                called = user.called[0]
                inner = program.computations[called]
                parameter = next(
                    x for x in inner.values() if x.opcode == 'parameter' and int(x.arguments) == user.operands.index(value.name)
                )
                inner_users = collections.defaultdict(list)
                for x in inner.values():
                    for operand in x.operands:
                        inner_users[operand].append(x)
                total += _read(program, inner, inner_users, parameter)
            else:
                return whole
    return min(total, whole)


def _written(rows, row: Instruction) -> int:
    """Bytes of one of a fusion's results that are written."""
    while row.opcode in ('bitcast', 'copy') and row.operands:
        row = rows[row.operands[0]]
    if row.opcode == 'dynamic-update-slice':
        return hlo.size_of(rows[row.operands[1]].shape)
    return 0 if row.opcode == 'parameter' else hlo.size_of(row.shape)


# ------------------------------------------------------------------------------------------------------------------------- operations


def _dot_operations(rows, row: Instruction) -> int:
    """Multiplications and additions of a matrix product."""
    (_, left) = hlo.arrays(rows[row.operands[0]].shape)[0]
    contracted = [int(i) for i in row.attribute(r'lhs_contracting_dims=\{([\d,]*)\}').split(',') if i]
    return 2 * math.prod(hlo.arrays(row.shape)[0][1]) * math.prod(left[i] for i in contracted)


def _custom_call(program: Program, computation: str, call: Instruction, part: str) -> tuple[str, tuple, float]:
    rows = program.computations[computation]
    target = call.attribute(r'custom_call_target="([^"]*)"')
    operands = [hlo.arrays(rows[name].shape)[0][1] for name in call.operands if hlo.arrays(rows[name].shape)]
    results = [sizes for _, sizes in hlo.arrays(call.shape)]
    if found := re.search(r'sparse_jax_(\w+?)(?:/|$)', call.path):
        return found[1], (*operands, *results), 0.0  # by whoever knows the pattern
    if 'gemm' in target or 'cublas' in target or 'matmul' in target:
        (left, right), result = operands[:2], results[0]
        contracted = [int(i) for i in re.findall(r'"lhs_contracting_dimensions":\["?(\d+)', call.attributes)]
        length = (
            math.prod(left[i] for i in contracted)
            if contracted
            else math.sqrt(math.prod(left) * math.prod(right) / math.prod(result))
        )
        return '', (), 2.0 * math.prod(result) * length
    if '$conv' in target:
        return '', (), _convolution_operations(call, target, operands, results)
    if part == 'attention':
        return '', (), _attention_operations(call, operands, results)
    raise ValueError(f'{call.name}: custom calls to {target} have no formula ({call.path or "without a name"}).')


def _convolution_operations(call: Instruction, target: str, operands: Sequence[tuple[int, ...]], results) -> float:
    """Two for each weight and pixel of the convolution's result, in all three products."""
    if 'BackwardFilter' in target:
        images, weight = operands[1], results[0]
    else:
        images, weight = operands[0] if 'BackwardInput' in target else results[0], operands[1]
    labels = call.attribute(r'dim_labels=[\w?]+_[\w?]+->([\w?]+)')
    return 2.0 * math.prod(images) / images[labels.index('f')] * math.prod(weight)


def _attention_operations(call: Instruction, operands: Sequence[tuple[int, ...]], results: Sequence[tuple[int, ...]]) -> float:
    """Of causal attention: half of two products forward, and of five backward, which a kernel for keys and one for queries share."""
    del results
    batch, length, heads, features = next(shape for shape in operands if len(shape) == 4)
    one = batch * heads * length * length * features  # half of 2 x length x length x features
    backward = 'transpose(' in call.path
    kernels = 2 if 'mosaic_gpu' in call.attributes and backward else 1  # of tokamax: keys and values in one, queries in the other
    return one * (5 + (2 if kernels == 2 else 0)) / kernels if backward else 2.0 * one


# -------------------------------------------------------------------------------------------------------------------------------- parts

# By the file and the function of the source that a kernel comes from, the innermost first; a transformation's own functions say nothing.
_PLACES = (
    ('core/numerics.py', '', ''), ('train/step.py', 'cross_entropy', 'loss'), ('models/layers.py', 'Embed.logits', 'loss'),
    ('losses/', '', 'loss'), ('models/loss.py', '', 'loss'), ('train/optimizer.py', '', 'optimizer'), ('core/masks.py', '', 'masks'),
    ('/optax/', '', 'optimizer'), ('sparse_jax/core/', '', 'masks'), ('train/step.py', '_masked', 'masks'),
    ('models/', '', PARTS[3]), ('kernels/', '', PARTS[3]), ('train/step.py', 'loss_fn', 'loss'), ('train/step.py', 'gradients', 'loss'),
    ('train/step.py', 'train_step', 'optimizer'),
)  # fmt: skip
_COPIES = {
    'fusion', 'fusion-start', 'parameter', 'tuple', 'dynamic-update-slice', 'constant', 'broadcast', 'concatenate', 'get-tuple-element', 'pad',
    *_SLICES, *(set(_MOVES) - {'convert'}), 'copy-start', 'select', 'compare', 'and', 'add', 'iota',
}  # fmt: skip
_ARITHMETIC = {'add', 'select', 'compare', 'and', 'iota'}  # of indices, in a copy


def _part(program: Program, row: Instruction, inside: Sequence[Instruction], call: Instruction | None) -> tuple[str, str]:
    """The part of a step that a kernel belongs to, and its line in the source."""
    source = next((s for x in (row, *inside) if (s := program.source(x))), [])
    paths = [x.path for x in (row, *inside) if x.path]
    mine = next((s for s in source if '/sparse_jax/' in s[0] or '/benchmarks/' in s[0]), source[0] if source else None)
    line = f'{"/".join(mine[0].split("/")[-2:])}:{mine[1]} {mine[2]}' if mine else ''
    opcodes = {x.opcode for x in inside} | {row.opcode}
    if call is not None and any('sparse_jax_' in path for path in paths):
        return 'sparse products', line
    if any('attention' in path or 'BTNH' in path or 'BNTS' in path for path in paths):
        return 'attention', line
    if any('/tokamax/' in file for file, _, _ in source) or any('attention' in function for _, _, function in source[:3]):
        return 'attention', line
    if {'dot', 'convolution'} & opcodes or (call is not None and re.search(r'cublas|\$conv', call.attributes)):
        return 'dense products', line
    if not opcodes - _COPIES and all(not _is_float(x) for x in inside if x.opcode in _ARITHMETIC):
        return 'copies', line
    for file, _, function in source:
        for place, name, part in _PLACES:
            if place in file and name in function and part:
                return part, line
    return 'copies' if not source else PARTS[3], line


def _is_float(row: Instruction) -> bool:
    return 'f' in row.shape.partition('[')[0]
