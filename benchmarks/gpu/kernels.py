"""Block-sparse kernels on a Hopper GPU: predicted, compiled, checked, measured.

    python -m benchmarks.gpu --predict    # by a model, on any machine: see benchmarks/gpu/model.py for what it assumes
    python -m benchmarks.gpu --compile    # by the real compiler, without a GPU: registers, spills, shared memory (make test-gpu-aot has it)
    python -m benchmarks.gpu --check      # on a GPU: every kernel against the reference, then the sweep
    python -m benchmarks.gpu              # on a GPU: the sweep

The sweep tries each kernel's tile sizes for each shape and block, keeps the best whose results are right for this kind of device (the
user's cache folder, where the kernels find them), and measures forward, both gradients and block scores against XLA's dense products
(cuBLAS, cuDNN), all taking turns; predictions stand beside. It also keeps up to which density each block wins with forward and both
gradients, which ``sparse_dot`` asks when nobody names an implementation. --dry_run does all that with small shapes in Pallas'
interpreter, where times mean nothing, and keeps nothing. Cost: 650 tile sizes are compiled and 240 rows measured, by a guess in half an hour.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import machine_code, model
from benchmarks.gpu.check import CHECKED, arguments, check, operands
from benchmarks.gpu.model import Shape
from sparse_jax import kernels
from sparse_jax.aot import compile_only
from sparse_jax.core.granularity import Block
from sparse_jax.kernels import reference, store
from sparse_jax.kernels.gpu import config as config_lib
from sparse_jax.kernels.reference import Geometry

BLOCKS = ((32, 32), (64, 64), (128, 128))
_PRODUCTS = model.KERNELS[:3]
_SMALL = (Shape((64, 1, 1, 128), (1, 1, 128, 128)), Shape((64, 2, 2, 64), (3, 3, 64, 64), Geometry(padding=((1, 1), (1, 1)))))


def turns(runs: Sequence[Callable], given: tuple, *, rounds: int) -> list[float]:
    """Median time of each run's call among several that are queued, after one that compiles and warms up.

    They take turns, so that a clock that slows down, as the hot device's does, slows all of them.
    """
    for run in runs:
        jax.block_until_ready(run(*given))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, own in zip(runs, times, strict=True):
            begin = time.perf_counter()
            results = [run(*given) for _ in range(10 if rounds > 1 else 1)]
            jax.block_until_ready(results)
            own.append((time.perf_counter() - begin) / len(results))
    return [statistics.median(own) for own in times]


def _fastest(kernel: str, shape: Shape, block: tuple[int, int], given: tuple, configs: Sequence[config_lib.Config], rounds: int):
    """The config that takes least time. The first must run; another that the compiler or the device refuses, or whose result is another,
    is told and left out."""
    runs, first = {}, None
    for config in configs:
        run = jax.jit(model.function(kernel, shape, block, config)[0])
        try:
            result = np.asarray(run(*given), np.float32)
            first = result if first is None else first
            if not np.abs(result - first).max() <= 2**-7 * np.abs(first).max():  # one rounding, up in one and down in the other
                raise ArithmeticError(f'its result is not that of {configs[0]}')
        except Exception as refused:  # jax refuses by assertions too
            if config == configs[0]:
                raise
            print(f'left out: {kernel}, {shape.name}, {block}, {config}: {repr(refused)[:200]}', file=sys.stderr)
        else:
            runs[config] = run
    times = turns(list(runs.values()), given, rounds=rounds)
    return min(zip(times, runs, strict=True), key=lambda pair: pair[0])[1]


@functools.cache
def _dense(kernel: str, shape: Shape) -> Callable:
    """XLA's dense product of the same operands."""
    geometry = shape.geometry
    if kernel == 'forward':
        return jax.jit(lambda x, w, _: reference.convolve_dense(x, w, geometry))
    if kernel == 'input_gradient':
        return jax.jit(lambda dy, w, p: reference.input_gradient(dy, w, p, geometry, shape.x))
    return jax.jit(lambda x, dy, _: reference.dense_weight_gradient(x, dy, shape.w, geometry))


def sweep(
    shapes: tuple[Shape, ...], blocks, sparsities: tuple[float, ...], names=model.KERNELS, *, rounds: int = 7, keep: bool = True
) -> None:
    """Measures all configs at 90%, keeps the best, then measures all sparsities with it; prints a row for each."""
    gpu = 'H200' if 'H200' in jax.devices()[0].device_kind else 'H100'
    print('| kernel | shape | block | sparsity | tiles | dense | sparse | measured | predicted low, high |')
    print('|---|---|---|---:|---|---:|---:|---:|---:|')
    won: dict[tuple[int, int], list[float]] = {}
    for shape in shapes:
        for block in blocks:
            best = {}
            own = operands(shape, block, 0.9)
            for kernel in names:
                known = [config_lib.rule(kernel, block, shape.x[0])]
                if rounds > 1:
                    known = list(dict.fromkeys([*known, *config_lib.candidates(kernel, block, shape.x[0])]))
                best[kernel] = _fastest(kernel, shape, block, arguments(kernel, *own), known, min(rounds, 3))
            if keep:
                config_lib.write({config_lib.key(k, shape.x, shape.w, block, jnp.bfloat16): c for k, c in best.items()})
            for sparsity in sparsities:
                own, predicted_dense, three = operands(shape, block, sparsity), model.dense_seconds(shape, gpu), np.zeros(5)

                def row(kernel, tiles, times, shape=shape, block=block, sparsity=sparsity):
                    dense, sparse, wanted, low, high = times
                    cells = (kernel, shape.name, f'{block[0]}x{block[1]}', f'{sparsity:.0%}', tiles, f'{1e6 * dense:.0f} us')
                    more = f'{1e6 * sparse:.0f} us', f'{dense / sparse:.2f}x', f'{wanted / low:.2f}x, {wanted / high:.2f}x'
                    print('| ' + ' | '.join((*cells, *more)) + ' |', flush=True)

                for kernel in names:
                    given = arguments(kernel, *own)
                    run = jax.jit(model.function(kernel, shape, block, best[kernel])[0])
                    dense, sparse = turns([_dense(kernel, shape), run], given, rounds=rounds)
                    cost = model.cost(kernel, shape, block, sparsity, best[kernel])
                    times = np.array([dense, sparse, predicted_dense, *(cost.seconds(rate, gpu) for rate in model.FEED)])
                    three += times * (kernel in _PRODUCTS)
                    row(kernel, ', '.join(map(str, dataclasses.astuple(best[kernel]))), times)
                row('**all three products**', '', three)
                won.setdefault(block, []).append(1 - sparsity if three[0] > three[1] else 0.0)
    if keep:
        for block, densities in won.items():  # up to which density all measured shapes win
            by_shape = np.array(densities).reshape(len(shapes), -1).max(1)
            store.write_crossover(jax.devices()[0].device_kind, Block(*block), float(by_shape.min()))


def summary(shapes: tuple[Shape, ...], blocks=BLOCKS, sparsities=model.SPARSITIES) -> Iterator[str]:
    """Ratios of all three products to dense ones on an H100, at the low and the high rate; bold where the low one wins."""
    yield '| shape | block | ' + ' | '.join(f'{sparsity:.0%}' for sparsity in sparsities) + ' |'
    yield '|---|---|' + '---:|' * len(sparsities)
    for shape in shapes:
        dense = len(_PRODUCTS) * model.dense_seconds(shape, 'H100')
        for block in blocks:
            cells = [shape.name, f'{block[0]}x{block[1]}']
            for sparsity in sparsities:
                costs = [model.cost(kernel, shape, block, sparsity) for kernel in _PRODUCTS]
                low, high = (f'{dense / sum(cost.seconds(rate, "H100") for cost in costs):.2f}x' for rate in model.FEED)
                cells.append(f'**{low}**, {high}' if float(low[:-1]) > 1 else f'{low}, {high}')
            yield '| ' + ' | '.join(cells) + ' |'


def predicted(shapes: tuple[Shape, ...], blocks=BLOCKS, sparsities=model.SPARSITIES) -> Iterator[str]:
    """The table of predictions, line by line."""
    columns = 'shape', 'block', 'sparsity', 'kernel', 'programs', 'GFLOP', 'memory MB', 'cache MB', 'H100 limit low, high'
    yield '| ' + ' | '.join((*columns, 'H100 low', 'H100 high', 'ratio to dense', 'H200 low', 'H200 high', 'ratio to dense')) + ' |'
    yield '|---|---|---:|---|---:|---:|---:|---:|---|' + '---:|' * 6
    for shape in shapes:
        for block in blocks:
            for sparsity in sparsities:
                costs = {kernel: model.cost(kernel, shape, block, sparsity) for kernel in model.KERNELS}
                rows = {name: [cost] for name, cost in costs.items()}
                rows['**all three products**'] = [costs[name] for name in _PRODUCTS]
                for name, parts in rows.items():
                    cells = [shape.name, f'{block[0]}x{block[1]}', f'{sparsity:.0%}', name]
                    cells.append(f'{parts[0].programs:,}' if len(parts) == 1 else '')
                    cells.append(f'{sum(c.operations for c in parts) / 1e9:.1f}')
                    cells += [
                        f'{sum(moved) / 1e6:.0f}'
                        for moved in zip(*((c.memory_bytes + c.sum_bytes, c.cache_bytes) for c in parts), strict=True)
                    ]
                    limits = [max(p := parts[0].parts(rate, 'H100'), key=lambda k, p=p: p[k]) for rate in model.FEED]
                    cells.append(', '.join(limits) if len(parts) == 1 else '')
                    for gpu in model.MEMORY:
                        dense = len(parts) * model.dense_seconds(shape, gpu)
                        times = [sum(cost.seconds(rate, gpu) for cost in parts) for rate in model.FEED]
                        cells += [f'{1e6 * t:.0f} us' for t in times] + [', '.join(f'{dense / t:.2f}x' for t in times)]
                    yield '| ' + ' | '.join(cells) + ' |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('predict', 'compile', 'check', 'dry_run'):
        parser.add_argument(f'--{name}', action='store_true')
    asked = parser.parse_args()
    if asked.predict:
        print('\n'.join([*summary(model.SHAPES), '', *predicted(model.SHAPES)]))
        return
    if asked.compile:
        compile_only.run_on_cpu()
        if reason := compile_only.unavailable('gpu'):
            parser.error(f'nothing can be compiled for a GPU here: {reason}.')
        machine_code.print_report()
        return
    if asked.dry_run:
        names: Any = (
            _PRODUCTS if jax.__version_info__ >= (0, 11) else ('forward',)
        )  # older interpreters know no transposed operands
        with kernels.lowering_for('gpu', interpret=True):
            check(_SMALL[:1], ((64, 64),), names)
            sweep(_SMALL, ((64, 64),), (0.5,), names, rounds=1, keep=False)
        return
    if reason := kernels.unsupported('gpu', jnp.bfloat16, 'block:64x64'):
        parser.error(f'no measurement here: {reason}. --predict and --compile need no GPU, --dry_run neither.')
    if asked.check:
        check(CHECKED, BLOCKS)
    sweep(model.SHAPES, BLOCKS, model.SPARSITIES)
