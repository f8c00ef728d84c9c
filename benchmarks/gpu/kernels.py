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
from typing import Any, NamedTuple

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


def turns(runs: Sequence[Callable], arrays: tuple, *, rounds: int) -> list[float]:
    """Median time of each run's call among several that are queued, after one that compiles and warms up.

    They take turns, so that a clock that slows down, as the hot device's does, slows all of them.
    """
    for run in runs:
        jax.block_until_ready(run(*arrays))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, run_times in zip(runs, times, strict=True):
            begin = time.perf_counter()
            results = [run(*arrays) for _ in range(10 if rounds > 1 else 1)]
            jax.block_until_ready(results)
            run_times.append((time.perf_counter() - begin) / len(results))
    return [statistics.median(run_times) for run_times in times]


def _fastest(kernel: str, shape: Shape, block: tuple[int, int], arrays: tuple, configs: Sequence[config_lib.Config], rounds: int):
    """The config that takes least time. The first must run; another that the compiler or the device refuses, or whose result is another,
    is told and left out."""
    runs, first = {}, None
    for config in configs:
        run = jax.jit(model.function(kernel, shape, block, config)[0])
        try:
            result = np.asarray(run(*arrays), np.float32)
            first = result if first is None else first
            if not np.abs(result - first).max() <= 2**-7 * np.abs(first).max():  # one rounding, up in one and down in the other
                raise ArithmeticError(f'its result is not that of {configs[0]}')
        except Exception as error:  # jax refuses by assertions too
            if config == configs[0]:
                raise
            print(f'left out: {kernel}, {shape.name}, {block}, {config}: {repr(error)[:200]}', file=sys.stderr)
        else:
            runs[config] = run
    times = turns(list(runs.values()), arrays, rounds=rounds)
    return min(zip(times, runs, strict=True), key=lambda pair: pair[0])[1]


@functools.cache
def dense_product(kernel: str, shape: Shape) -> Callable:
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
    print('| kernel | shape | block | sparsity | tiles | dense | sparse | measured | predicted low, high |')
    print('|---|---|---|---:|---|---:|---:|---:|---:|')
    winning_densities: dict[tuple[int, int], list[float]] = {}
    for shape in shapes:
        for block in blocks:
            best = _best_configs(shape, block, names, rounds)
            if keep:
                config_lib.write({config_lib.key(k, shape.x, shape.w, block, jnp.bfloat16): c for k, c in best.items()})
            for sparsity in sparsities:
                total = _measure(shape, block, sparsity, best, rounds)
                winning_densities.setdefault(block, []).append(1 - sparsity if total.dense > total.sparse else 0.0)
    if keep:
        for block, densities in winning_densities.items():  # up to which density all measured shapes win
            by_shape = np.array(densities).reshape(len(shapes), -1).max(1)
            store.write_crossover(jax.devices()[0].device_kind, Block(*block), float(by_shape.min()))


def _best_configs(shape: Shape, block: tuple[int, int], names: Sequence[str], rounds: int) -> dict[str, config_lib.Config]:
    """Of each kernel; where nothing is measured (one round) that of the rule."""
    best, arrays = {}, operands(shape, block, 0.9)
    for kernel in names:
        configs = [config_lib.rule(kernel, block, shape.x[0])]
        if rounds > 1:
            configs = list(dict.fromkeys([*configs, *config_lib.candidates(kernel, block, shape.x[0])]))
        best[kernel] = _fastest(kernel, shape, block, arguments(kernel, *arrays), configs, min(rounds, 3))
    return best


class _Seconds(NamedTuple):
    """Of a kernel, or of all three products."""

    dense: float
    sparse: float
    predicted_dense: float
    predicted_low: float
    predicted_high: float


def _measure(shape: Shape, block: tuple[int, int], sparsity: float, configs: dict[str, config_lib.Config], rounds: int) -> _Seconds:
    """Measures these kernels at one sparsity, prints a row for each and one for the products together, which it returns."""
    gpu = 'H200' if 'H200' in jax.devices()[0].device_kind else 'H100'
    arrays, total = operands(shape, block, sparsity), np.zeros(len(_Seconds._fields))

    def print_row(kernel: str, tiles: str, seconds: _Seconds) -> None:
        cells = [kernel, shape.name, f'{block[0]}x{block[1]}', f'{sparsity:.0%}', tiles]
        cells += [f'{1e6 * seconds.dense:.0f} us', f'{1e6 * seconds.sparse:.0f} us', f'{seconds.dense / seconds.sparse:.2f}x']
        cells.append(', '.join(f'{seconds.predicted_dense / s:.2f}x' for s in (seconds.predicted_low, seconds.predicted_high)))
        print('| ' + ' | '.join(cells) + ' |', flush=True)

    for kernel, config in configs.items():
        run = jax.jit(model.function(kernel, shape, block, config)[0])
        dense, sparse = turns([dense_product(kernel, shape), run], arguments(kernel, *arrays), rounds=rounds)
        cost = model.cost(kernel, shape, block, sparsity, config)
        predicted = {f'predicted_{rate}': cost.seconds(rate, gpu) for rate in model.FEED}
        seconds = _Seconds(dense, sparse, predicted_dense=model.dense_seconds(shape, gpu), **predicted)
        total += np.array(seconds) * (kernel in _PRODUCTS)
        print_row(kernel, ', '.join(map(str, dataclasses.astuple(config))), seconds)
    print_row('**all three products**', '', _Seconds(*total))
    return _Seconds(*total)


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
                for name, row_costs in rows.items():
                    cells = [shape.name, f'{block[0]}x{block[1]}', f'{sparsity:.0%}', name, *_predicted_cells(shape, row_costs)]
                    yield '| ' + ' | '.join(cells) + ' |'


def _predicted_cells(shape: Shape, costs: Sequence[model.Cost]) -> list[str]:
    """What a row of predictions says of one kernel or of several, one after the other."""
    is_single = len(costs) == 1
    cells = [f'{costs[0].programs:,}' if is_single else '', f'{sum(c.operations for c in costs) / 1e9:.1f}']
    cells += [f'{sum(c.memory_bytes + c.sum_bytes for c in costs) / 1e6:.0f}', f'{sum(c.cache_bytes for c in costs) / 1e6:.0f}']
    by_resource = [costs[0].seconds_by_resource(rate, 'H100') for rate in model.FEED]
    cells.append(', '.join(max(seconds, key=seconds.__getitem__) for seconds in by_resource) if is_single else '')
    for gpu in model.MEMORY:
        dense = len(costs) * model.dense_seconds(shape, gpu)
        times = [sum(cost.seconds(rate, gpu) for cost in costs) for rate in model.FEED]
        cells += [f'{1e6 * t:.0f} us' for t in times] + [', '.join(f'{dense / t:.2f}x' for t in times)]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('predict', 'compile', 'check', 'dry_run'):
        parser.add_argument(f'--{name}', action='store_true')
    flags = parser.parse_args()
    if flags.predict:
        print('\n'.join([*summary(model.SHAPES), '', *predicted(model.SHAPES)]))
        return
    if flags.compile:
        compile_only.run_on_cpu()
        if reason := compile_only.unavailable('gpu'):
            parser.error(f'nothing can be compiled for a GPU here: {reason}.')
        machine_code.print_report()
        return
    if flags.dry_run:
        names: Any = (
            _PRODUCTS if jax.__version_info__ >= (0, 11) else ('forward',)
        )  # older interpreters know no transposed operands
        with kernels.lowering_for('gpu', interpret=True):
            check(_SMALL[:1], ((64, 64),), names)
            sweep(_SMALL, ((64, 64),), (0.5,), names, rounds=1, keep=False)
        return
    if reason := kernels.unsupported('gpu', jnp.bfloat16, 'block:64x64'):
        parser.error(f'no measurement here: {reason}. --predict and --compile need no GPU, --dry_run neither.')
    if flags.check:
        check(CHECKED, BLOCKS)
    sweep(model.SHAPES, BLOCKS, model.SPARSITIES)
