"""The block-sparse kernels as the real compiler makes them for Hopper (sm_90a), on a machine without a GPU: see compile_only.NEEDS."""

import dataclasses
import functools
import glob
import math
import os
import pathlib
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu import check, model
from benchmarks.gpu.model import Shape
from sparse_jax import compact, kernels
from sparse_jax.aot import compile_only
from sparse_jax.kernels.gpu import config as config_lib
from sparse_jax.kernels.reference import Geometry

# Matrix products with whole tiles and with edges; convolutions of 3x3 and 1x1 taps, with padding and stride.
CASES = (
    (Shape((8192, 1, 1, 4096), (1, 1, 4096, 4096)), ((32, 32), (64, 64), (128, 128), (64, 32))),
    (Shape((1000, 1, 1, 1000), (1, 1, 1000, 600)), ((64, 64),)),
    (Shape((128, 16, 16, 256), (3, 3, 256, 256), Geometry(padding=((1, 1), (1, 1)))), ((32, 32), (64, 64), (128, 128))),
    (Shape((64, 16, 16, 256), (3, 3, 256, 256), Geometry((2, 2), ((1, 1), (1, 1)))), ((64, 64),)),
    (Shape((64, 16, 16, 256), (1, 1, 256, 512), Geometry((2, 2))), ((64, 64),)),
)
_THREADS = 128  # of a program: each announces its part of the bytes that a stage waits for
_DUMPS = tempfile.TemporaryDirectory(prefix='sparse_jax_gpu_')  # of the compiler; gone with this process


class Compiled(NamedTuple):
    """One kernel's machine code."""

    registers: int
    spills: int  # bytes written and read because registers did not suffice
    shared_memory: int  # bytes
    seconds: float  # to lower and compile the program that holds it
    step_operations: int  # of the tensor cores in one step of its loop
    step_bytes: int  # copied into shared memory in one step
    tensor_core: str  # the instruction
    bulk_loads: int  # by TMA, in the program


@functools.cache
def compiled(
    kernel: str,
    shape: Shape,
    block: tuple[int, int],
    config: config_lib.Config,
    dtype: str = 'bfloat16',
    capacity: int = 0,
    *,
    is_compact: bool = False,
) -> Compiled:
    """Compiles one kernel and reads what came of it; ValueError where the compiler refuses.

    Args:
      kernel: one of model.KERNELS.
      shape: of the product.
      block: inputs and outputs.
      config: tiles.
      dtype: of x and w.
      capacity: least number of units that the pattern has room for.
      is_compact: whether the weight is compact values.
    """
    os.environ['MOSAIC_GPU_DUMP_TO'] = _DUMPS.name
    sharding = SingleDeviceSharding(compile_only.devices('gpu')[0])
    abstract = lambda x, dtype=None: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)
    mask = model.random_mask(shape, block, 0.1)
    if is_compact:
        granularity = f'block:{block[0]}x{block[1]}'
        _, layout = compact.compress(
            {'w': np.zeros(mask.shape, np.float32)}, {'w': mask}, granularity=granularity, implementation='gpu'
        )
        pattern = jax.tree.map(abstract, compact.prepare(layout)['w'])
        run, arrays = model.compact_function(kernel, shape, pattern, config)
    else:
        pattern = jax.tree.map(abstract, kernels.make_pattern(mask, block=block, implementation='gpu', at_least=capacity))
        run, arrays = model.function(kernel, shape, block, config)
    dumped_before, begin = set(glob.glob(f'{_DUMPS.name}/*.ptx')), time.perf_counter()
    with kernels.lowering_for('gpu'):
        jax.jit(run).trace(*(abstract(x, jnp.dtype(dtype)) for x in arrays), pattern).lower(lowering_platforms=('cuda',)).compile()
    seconds = time.perf_counter() - begin
    (path,) = set(glob.glob(f'{_DUMPS.name}/*.ptx')) - dumped_before
    return _read(path, seconds)


def _read(path: str, seconds: float) -> Compiled:
    text = pathlib.Path(path).read_text()
    ptxas = subprocess.run(['ptxas', '-v', '-arch=sm_90a', path, '-o', f'{path}.cubin'], capture_output=True, text=True, check=True)
    if 'serializ' in ptxas.stderr:  # C7510: waits after each instruction, so that nothing overlaps
        raise ValueError(f'the compiler does not let the tensor cores run ahead: {ptxas.stderr}')
    stores, loads = map(int, re.findall(r'(\d+) bytes spill (?:stores|loads)', ptxas.stderr)[:2])
    registers = int(re.search(r'Used (\d+) registers', ptxas.stderr)[1])  # type: ignore[index]
    step_operations, step_bytes = _loop(text)
    return Compiled(
        registers=registers,
        spills=stores + loads,
        shared_memory=_shared_memory(path),
        seconds=seconds,
        step_operations=step_operations,
        step_bytes=step_bytes,
        tensor_core=next(iter(re.findall(r'wgmma\.mma_async\.\S+', text)), ''),
        bulk_loads=len(re.findall(r'cp\.async\.bulk\.tensor\.\dd\.shared', text)),
    )


def _shared_memory(path: str) -> int:
    """What the launch asks for, from the compiler's notes beside the machine code."""
    resources = path.removesuffix('.ptx') + '.resources.txt'
    if os.path.exists(resources):
        return int(re.search(r'smem_scratch_bytes=(\d+)', pathlib.Path(resources).read_text())[1])  # type: ignore[index]
    notes = pathlib.Path(path.removesuffix('.ptx') + '.mlir-passes.log').read_text()
    return int(re.search(r'dynamic_shared_memory_size %c(\d+)_i32', notes)[1])  # type: ignore[index]


def _loop(text: str) -> tuple[int, int]:
    """Operations and bytes of one turn of the innermost loop that multiplies, as the machine code has it."""
    lines = text.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r'(\$L\w+):', line))}
    jumps = [(labels[match[1]], i) for i, line in enumerate(lines) if (match := re.search(r'bra(?:\.uni)?\s+(\$L\w+);', line))]
    loops = [lines[low:high] for low, high in jumps if low < high and any('wgmma.mma_async' in line for line in lines[low:high])]
    loop = min((body for body in loops if any('expect_tx' in line for line in body)), key=len)
    shapes = [re.search(r'wgmma\.mma_async\S*\.m(\d+)n(\d+)k(\d+)\.', line) for line in loop]
    operations = sum(2 * math.prod(map(int, match.groups())) for match in shapes if match)
    constants = dict(re.findall(r'mov\.[bu]32\s+(%r\d+), (\d+);', text))
    announced = [re.search(r'expect_tx\S* .*, (%r\d+|\d+);', line) for line in loop]
    return operations, _THREADS * sum(int(constants.get(match[1], match[1])) for match in announced if match)


def cases() -> Iterator[tuple[str, Shape, tuple[int, int], config_lib.Config]]:
    """Every kernel at every shape and block, with the config that the rule gives."""
    for shape, blocks in CASES:
        for block in blocks:
            for kernel in model.KERNELS[: 4 if block[0] == block[1] else 3]:  # scores of 64x32 are the program of 32x32
                yield kernel, shape, block, config_lib.rule(kernel, block, shape.x[0])


def stand_in(shape: Shape, block: tuple[int, int]) -> Shape:
    """A product of the same kind that the interpreter can run: two blocks of inputs and outputs, edges where it has edges."""
    sides = [2 * side - (16 if n % side else 0) for n, side in zip(shape.w[2:], block, strict=True)]
    pixels = [min(n, 4) for n in shape.x[1:3]]
    return Shape((100 if shape.x[0] % 64 else 64, *pixels, sides[0]), (*shape.w[:2], *sides), shape.geometry)


def print_report() -> None:
    """A table of all cases, in Markdown."""
    transposed = jax.__version_info__ >= (0, 11)
    print(f'jax {jax.__version__}, {platform.python_version()}, for sm_90a\n')
    columns = (
        'kernel',
        'shape',
        'block',
        'tiles: block_m, block_k, num_stages, units_per_program',
        'registers',
        'spills',
        'shared memory',
        'compiled in',
    )
    print('| ' + ' | '.join((*columns, 'instruction', 'error in the interpreter')) + ' |')
    print('|---|---|---|---|---:|---:|---:|---:|---|---:|')
    for kernel, shape, block, config in cases():
        row = compiled(kernel, shape, block, config)
        tiles = ', '.join(map(str, dataclasses.astuple(config)))
        cells = [kernel, shape.name, f'{block[0]}x{block[1]}', tiles, row.registers, row.spills, f'{row.shared_memory:,}']
        cells += [f'{row.seconds:.1f} s', f'wgmma {row.tensor_core.split(".")[4]}']
        with kernels.lowering_for('gpu', interpret=True):
            runs = transposed or kernel == 'forward'  # older interpreters know no transposed operands
            cells.append(f'{check.error(kernel, stand_in(shape, block), block):.1e}' if runs else '-')
        print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)
