"""The block-sparse kernels for TPUs on a machine without one: compiled by the real compiler for a v5e, and run in the interpreter.

    python -m benchmarks.tpu    # in the environment of make test-tpu-aot

Prints a table, in Markdown: how long the compiler takes, the memory that a program needs beside its operands and results (copies of
images and weights in whole tiles; the kernels' own tiles lie in VMEM), and the largest error in the interpreter, on a small product of
the same kind. Cost: a minute. Nothing here is a speed: none was predicted for TPUs, and none measured.
"""

import argparse
import functools
import platform
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu import check, model
from benchmarks.gpu.model import KERNELS, Shape
from sparse_jax import kernels
from sparse_jax.aot import compile_only
from sparse_jax.kernels.reference import Geometry
from sparse_jax.kernels.tpu import BLOCK, operations

BLOCKS = (BLOCK, BLOCK)
CASES = (
    (Shape((8192, 1, 1, 1024), (1, 1, 1024, 1024)), jnp.bfloat16),
    (Shape((500, 1, 1, 1000), (1, 1, 1000, 300)), jnp.float32),
    (Shape((64, 8, 8, 256), (3, 3, 256, 256), Geometry(padding=((1, 1), (1, 1)))), jnp.bfloat16),
    (Shape((64, 8, 8, 256), (3, 3, 256, 256), Geometry((2, 2), ((1, 1), (1, 1)))), jnp.bfloat16),
)


class Compiled(NamedTuple):
    """One kernel's program."""

    seconds: float  # to lower and compile it
    temporary: int  # bytes beside operands and results
    text: str  # as it was lowered
    kernel: bool  # whether the compiled program calls a TPU kernel


def function(kernel: str, shape: Shape) -> Any:
    """A kernel as a function of two arrays and a pattern."""
    geometry = shape.geometry
    if kernel == 'forward':
        return lambda x, w, p: operations.forward(x, w, p, geometry)
    if kernel == 'input_gradient':
        return lambda dy, w, p: operations.input_gradient(dy, w, p, geometry, shape.x)
    if kernel == 'weight_gradient':
        return lambda x, dy, p: operations.weight_gradient(x, dy, p, geometry, shape.w)
    return lambda x, dy, p: operations.block_scores(x, dy, shape.w, geometry, BLOCKS)


@functools.cache
def compiled(kernel: str, shape: Shape, dtype: Any) -> Compiled:
    """Compiles one kernel; ValueError where nothing can be compiled for a TPU here."""
    sharding = SingleDeviceSharding(compile_only.devices('tpu')[0])
    abstract = lambda a, dtype=None: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=sharding)
    pattern = kernels.make_pattern(model.random_mask(shape, BLOCKS, 0.3), block=BLOCKS)
    x, w, dy = (abstract(np.broadcast_to(0, s), dtype) for s in (shape.x, shape.w, shape.y))
    begin = time.perf_counter()
    with kernels.lowering_for('tpu'):
        arguments = check.arguments(kernel, x, w, dy, jax.tree.map(abstract, pattern))
        lowered = jax.jit(function(kernel, shape)).trace(*arguments).lower(lowering_platforms=('tpu',))
    executable = lowered.compile()
    seconds, memory = time.perf_counter() - begin, executable.memory_analysis()
    return Compiled(
        seconds=seconds,
        temporary=int(getattr(memory, 'temp_size_in_bytes', 0)),
        text=lowered.as_text(),
        kernel='tpu_custom_call' in (executable.as_text() or ''),
    )


def error(kernel: str, shape: Shape, dtype: Any) -> float:
    """Largest difference of a kernel, interpreted, from the reference, as a part of the largest value."""
    x, w, dy, pattern = check.operands(shape, BLOCKS, 0.5, dtype)
    with kernels.lowering_for('tpu', interpret=True):
        actual = np.asarray(function(kernel, shape)(*check.arguments(kernel, x, w, dy, pattern)), np.float64)
    desired = np.asarray(check.expected(kernel, shape, x, w, dy, pattern, BLOCKS), np.float64)
    return float(np.abs(actual - desired).max() / np.abs(desired).max())


def stand_in(shape: Shape) -> Shape:
    """A product of the same kind that the interpreter can run, with edges where it has edges."""
    sides = [2 * BLOCK - (16 if n % BLOCK else 0) for n in shape.w[2:]]
    return Shape((40, *(min(n, 4) for n in shape.x[1:3]), sides[0]), (*shape.w[:2], *sides), shape.geometry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    compile_only.run_on_cpu()
    if reason := compile_only.unavailable('tpu'):
        parser.error(f'nothing can be compiled for a TPU here: {reason}.')
    print(f'jax {jax.__version__}, Python {platform.python_version()}, for a TPU v5e, blocks of {BLOCK}x{BLOCK}\n')
    print('| kernel | shape | type | compiled in | temporary memory | error in the interpreter |\n|---|---|---|---:|---:|---:|')
    for shape, dtype in CASES:
        for kernel in KERNELS:
            row, largest_error = compiled(kernel, shape, dtype), error(kernel, stand_in(shape), dtype)
            cells = kernel, shape.name, jnp.dtype(dtype).name, f'{row.seconds:.1f} s', f'{row.temporary:,}', f'{largest_error:.1e}'
            print('| ' + ' | '.join(cells) + ' |', flush=True)
