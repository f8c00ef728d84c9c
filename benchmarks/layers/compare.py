"""Sparse layers against dense ones: forward and both gradients of one layer, at several densities.

    python -m benchmarks.layers --torch_python=PYTHON
    python -m benchmarks.layers --few_rows

PYTHON is a Python with torch installed (and, for its column, sparseprop). XLA's dense layer, ours, PyTorch's (oneDNN, channels_last)
and SparseProp's take turns. Times are medians over rounds; ratios are medians of the ratios within a round. Also printed:

  - the fraction of the machine's peaks that ours reaches, as measured here by XLA's matrix product and numpy's copy;
  - the density below which ours is faster;
  - the fraction of the peak that the kernel reaches where nothing is sparse, a ceiling set by its loads;
  - the time to rebuild a pattern, and the temporary memory of each program as XLA counts it.

Cost: ten minutes. ``--few_rows``: matrix products of 2 to 1,024 rows beside XLA's, two minutes; the rule of backend.py rests on it.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import kernels

# batch size, side of the image (0: a matrix product), input and output channels, side of the kernel, stride
SHAPES = [
    (32, 16, 256, 256, 3, 1),
    (32, 32, 128, 128, 3, 1),
    (32, 8, 512, 512, 3, 1),
    (32, 16, 256, 256, 1, 1),
    (32, 16, 256, 256, 3, 2),
    (1024, 0, 2048, 2048, 1, 1),
]
DENSITIES = (0.2, 0.1, 0.05, 0.02)


def title(shape) -> str:
    """Returns a layer's name in the tables.

    >>> title(SHAPES[0]), title(SHAPES[-1])
    ('3x3, 256 to 256, 32x16x16', 'linear 2048 to 2048, 1024')
    """
    batch, side, inputs, outputs, taps, stride = shape
    if side == 0:
        return f'linear {inputs} to {outputs}, {batch}'
    return f'{taps}x{taps}, {inputs} to {outputs}, {batch}x{side}x{side}' + (f', stride {stride}' if stride > 1 else '')


class Layer:
    """XLA's dense layer and our sparse one on the same operands, compiled."""

    def __init__(self, shape, density: float, block: int = 1):
        batch, side, inputs, outputs, taps, stride = shape
        random = np.random.default_rng(0)
        image = (batch, inputs) if side == 0 else (batch, side, side, inputs)
        weight = (inputs, outputs) if side == 0 else (taps, taps, inputs, outputs)
        units = (*weight[:-2], inputs // block, outputs // block)
        self.mask = np.repeat(np.repeat(random.random(units) < density, block, axis=-2), block, axis=-1)
        self._x = jnp.asarray(random.standard_normal(image, np.float32))
        self._w = jnp.asarray(np.where(self.mask, random.standard_normal(weight, np.float32), 0))
        pattern = jax.device_put(kernels.make_pattern(self.mask, block=None if block == 1 else (block, block)))
        # PyTorch's padding: (taps - 1) / 2 on both sides, at stride 2 too
        options: dict[str, Any] = dict(strides=(stride, stride), padding=((taps // 2, taps // 2),) * 2)
        dense = (lambda x, w: x @ w) if side == 0 else functools.partial(kernels.convolve, **options)
        if side == 0:
            sparse = lambda x, w, p: kernels.sparse_dot(x, w, p, implementation='cpu')
        else:
            sparse = lambda x, w, p: kernels.sparse_conv(x, w, p, **options, implementation='cpu')
        y = jax.eval_shape(dense, self._x, self._w)
        self._dy = jnp.asarray(random.standard_normal(y.shape, np.float32))
        self.multiply_adds = 3 * float(self.mask.sum()) * y.size / outputs
        self.bytes = 4.0 * (3 * self._x.size + 3 * y.size + 2 * self._w.size)  # each pass reads or writes each of them once
        with_gradients = lambda f: lambda x, w, dy, *p: (lambda y, vjp: (y, vjp(dy)))(*jax.vjp(lambda x, w: f(x, w, *p), x, w))
        self._dense = jax.jit(with_gradients(dense)).lower(self._x, self._w, self._dy).compile()
        self._sparse = jax.jit(with_gradients(sparse)).lower(self._x, self._w, self._dy, pattern).compile()
        self._pattern = pattern

    def dense(self) -> float:
        """Returns the seconds of one call of the dense layer."""
        return _seconds(lambda: self._dense(self._x, self._w, self._dy))

    def sparse(self) -> float:
        """Returns the seconds of one call of the sparse layer."""
        return _seconds(lambda: self._sparse(self._x, self._w, self._dy, self._pattern))

    def rebuild(self) -> float:
        """Returns the seconds to make the pattern from the mask and to put it on the device."""
        return min(_seconds(lambda: jax.device_put(kernels.make_pattern(self.mask))) for _ in range(5))

    def memory(self) -> tuple[float, float]:
        """Returns the temporary bytes of the dense and of the sparse program.

        The sparse program is charged with the pattern and with the most that the kernel allocates itself: for each nonzero 8 bytes in
        order of use and 16 partial sums, and for each thread 1 KiB an output and half a MiB of window.
        """
        temporary_bytes = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
        pattern_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._pattern))
        thread_bytes = (os.cpu_count() or 1) * (1024 * max(self._w.shape[-2:]) + 2**19)
        kernel_bytes = pattern_bytes + 72 * int(self.mask.sum()) + thread_bytes
        return temporary_bytes(self._dense), temporary_bytes(self._sparse) + kernel_bytes


def _seconds(function) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


class Torch:
    """The layers of PyTorch and SparseProp, in a separate process that times itself."""

    def __init__(self, python: str):
        script = pathlib.Path(__file__).parent / 'torch_layers.py'
        self._process = subprocess.Popen([python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.version = self._process.stdout.readline().strip()
        if not self.version:
            raise SystemExit(f'error: the PyTorch rival ended with {self._process.wait()}: is torch installed for --torch_python?')

    def ask(self, **request):
        """Sends a request of torch_layers.py and returns its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + '\n')
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=60)


def measure(shape, density: float, rounds: int, torch: Torch | None, block: int = 1) -> dict:
    """Measures one layer at one density; returns a row with all columns of the tables."""
    layer = Layer(shape, density, block)
    runs = {'xla': layer.dense, 'ours': layer.sparse}
    if torch:
        for name in torch.ask(shape=shape, density=density):
            runs[name] = functools.partial(torch.ask, run=name)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            time.sleep(0.02)  # OpenMP threads of the previous contender spin for a while, on cores that this one needs
            value = run()
            if number >= 2:
                seconds[name].append(value)
    arrays = {name: np.array(values) for name, values in seconds.items()}
    row = {'shape': shape, 'density': density, 'block': block, 'seconds': {k: float(np.median(v)) for k, v in arrays.items()}}
    row['ratios'] = {k: float(np.median(v / arrays['ours'])) for k, v in arrays.items() if k != 'ours'}
    row['multiply_adds'], row['bytes'] = layer.multiply_adds, layer.bytes
    row['rebuild_seconds'] = layer.rebuild()
    row['dense_temporary_bytes'], row['sparse_temporary_bytes'] = layer.memory()
    return row


def peaks() -> tuple[float, float]:
    """Measures the machine's peaks: multiply-adds per second of a matrix product, and bytes read and written per second by a copy."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    multiply_adds = max(2048**3 / _seconds(lambda: product(a, a)) for _ in range(10))
    source = np.ones(2**26, np.float32)
    target = np.empty_like(source)
    return multiply_adds, max(2 * source.nbytes / _seconds(lambda: np.copyto(target, source)) for _ in range(5))


def crossover(rows: list[dict], rival: str) -> str:
    """Returns the density below which ours is faster than a rival, log-linear between the measured densities."""
    points = sorted((row['density'], row['ratios'][rival]) for row in rows if rival in row['ratios'])
    for (d0, r0), (d1, r1) in itertools.pairwise(points):
        if r0 >= 1 > r1:
            fraction = np.log(r0) / np.log(r0 / r1)
            return f'{np.exp(np.log(d0) + fraction * np.log(d1 / d0)):.0%}'
    return f'above {points[-1][0]:.0%}' if points[-1][1] >= 1 else f'below {points[0][0]:.0%}'


def table(rows: list[dict], peak: tuple[float, float]) -> str:
    """Formats the rows as a Markdown table."""
    names = {'xla': 'XLA dense', 'torch': 'PyTorch dense', 'sparseprop': 'SparseProp'}
    rivals = [name for name in names if any(name in row['seconds'] for row in rows)]
    lines = ['| layer | density | ours | ' + ' | '.join(f'{names[n]} | ours is' for n in rivals) + ' | of peak |']
    lines.append('|---|---:|---:|' + '---:|---:|' * len(rivals) + '---:|')
    for row in rows:
        cells = []
        for name in rivals:
            cells.append(f'{1e3 * row["seconds"][name]:.1f} ms' if name in row['seconds'] else '')
            cells.append(f'{row["ratios"][name]:.1f}x' if name in row['ratios'] else '')
        of_peak = row['multiply_adds'] / row['seconds']['ours'] / peak[0]
        blocks = f', blocks of {row["block"]}' if row['block'] > 1 else ''
        ours = f'{1e3 * row["seconds"]["ours"]:.1f} ms'
        lines.append(f'| {title(row["shape"])}{blocks} | {row["density"]:.0%} | {ours} | {" | ".join(cells)} | {of_peak:.0%} |')
    return '\n'.join(lines)


def _limits_row(rows: list[dict], peak: tuple[float, float]) -> str:
    """Formats one layer's row of the second table, from its rows at all densities."""
    by_density = {row['density']: row for row in rows}
    seconds = {density: row['seconds']['ours'] for density, row in by_density.items()}
    sparse, full = by_density[0.05], by_density[1.0]
    cells = [
        title(sparse['shape']),
        *(crossover(rows, rival) for rival in ('xla', 'torch') if rival in rows[0]['ratios']),
        f'{seconds[0.2] / seconds[0.05]:.1f}x',
        f'{full["multiply_adds"] / seconds[1.0] / peak[0]:.0%}',
        f'{sparse["bytes"] / peak[1] / seconds[0.05]:.0%}',
        f'{1e3 * sparse["rebuild_seconds"]:.1f} ms',
        *(f'{sparse[f"{kind}_temporary_bytes"] / 2**20:.1f} MiB' for kind in ('dense', 'sparse')),
    ]
    return f'| {" | ".join(cells)} |'


def few_rows(rounds: int) -> str:
    """Measures matrix products of few rows; returns a Markdown table of how many times as fast as XLA's dense layer ours is."""
    counts = (2, 4, 8, 16, 32, 64, 128, 256, 1024)
    lines = [f'| rows | {" | ".join(map(str, counts))} |', '|---|' + '---:|' * len(counts)]
    for (inputs, outputs), density in itertools.product(((784, 2048), (2048, 2048), (512, 512), (2048, 10)), (0.2, 0.1, 0.05)):
        ratios = [measure((rows, 0, inputs, outputs, 1, 1), density, rounds, None)['ratios']['xla'] for rows in counts]
        lines.append(f'| {inputs} to {outputs}, {density:.0%} | {" | ".join(f"{ratio:.2f}x" for ratio in ratios)} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--torch_python', default='', help='a Python with torch installed; by default those columns are left out')
    parser.add_argument('--json', type=pathlib.Path, help='file to write the results to')
    parser.add_argument('--few_rows', action='store_true', help='only the table of matrix products of few rows, beside XLA')
    args = parser.parse_args()
    if args.few_rows:
        print(few_rows(args.rounds))
        return
    torch = Torch(args.torch_python) if args.torch_python else None
    peak = peaks()
    rows, blocks, limits = [], [], []
    for shape in SHAPES:
        of_shape = [measure(shape, density, args.rounds, torch) for density in DENSITIES]
        print(table(of_shape, peak), flush=True)
        rows += of_shape
        limits.append(_limits_row(of_shape + [measure(shape, density, 3, torch) for density in (0.4, 0.7, 1.0)], peak))
    for shape in (SHAPES[0], SHAPES[-1]):
        blocks += [measure(shape, density, args.rounds, torch, block=16) for density in (0.1, 0.05)]
    if torch:
        torch.close()
        print(torch.version)
    print(f'peaks: {2 * peak[0] / 1e9:.0f} GFLOP/s, {peak[1] / 1e9:.1f} GB/s; {os.cpu_count()} cores')
    print(table(rows + blocks, peak))
    rivals = ' | '.join(['wins over XLA below', *(['over PyTorch below'] if torch else [])])
    print(
        f'| layer | {rivals} | 20% against 5% | at 100%: of peak | at 5%: its bytes would take | rebuild | temporary, dense | temporary, sparse |'
    )
    print('|---|' + '---:|' * (8 if torch else 7))
    print('\n'.join(limits))
    if args.json:
        args.json.write_text(json.dumps({'peaks': peak, 'rows': rows + blocks}, indent=2) + '\n')
