"""Sparse layers against dense ones: forward and both gradients of one layer, at several densities.

    python -m benchmarks.layers --torch_python=PYTHON

PYTHON is a Python in whose environment torch is installed (and, for its column, sparseprop). XLA's dense layer, ours, PyTorch's (oneDNN,
channels_last) and SparseProp's take turns; figures are medians over rounds, ratios are medians of the ratios within a round. Also
printed: how far ours is from the machine's peaks, as measured here (multiply-adds of XLA's largest matrix product, bytes of numpy's copy); the
density below which ours wins; what the kernel reaches where nothing is sparse, which is the ceiling that its loads set; the time of a pattern's rebuild; and what each needs in memory beside operands and results, as XLA counts it.
Cost: ten minutes.
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

# batch, side of the image (0: a matrix product), in, out, taps a side, stride
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
    """
    >>> title(SHAPES[0]), title(SHAPES[-1])
    ('3x3, 256 to 256, 32x16x16', 'linear 2048 to 2048, 1024')
    """
    batch, side, inputs, outputs, taps, stride = shape
    if side == 0:
        return f'linear {inputs} to {outputs}, {batch}'
    return f'{taps}x{taps}, {inputs} to {outputs}, {batch}x{side}x{side}' + (f', stride {stride}' if stride > 1 else '')


class Layer:
    """XLA's dense layer and ours, compiled."""

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
        # padding as PyTorch has it, (taps - 1) / 2 on both sides, at stride 2 too
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
        both = lambda f: lambda x, w, dy, *p: (lambda y, pull: (y, pull(dy)))(*jax.vjp(lambda x, w: f(x, w, *p), x, w))
        self._dense = jax.jit(both(dense)).lower(self._x, self._w, self._dy).compile()
        self._sparse = jax.jit(both(sparse)).lower(self._x, self._w, self._dy, pattern).compile()
        self._pattern = pattern

    def dense(self) -> float:
        return _seconds(lambda: self._dense(self._x, self._w, self._dy))

    def sparse(self) -> float:
        return _seconds(lambda: self._sparse(self._x, self._w, self._dy, self._pattern))

    def rebuild(self) -> float:
        return min(_seconds(lambda: jax.device_put(kernels.make_pattern(self.mask))) for _ in range(5))

    def memory(self) -> tuple[float, float]:
        """Temporary bytes of the dense and the sparse program; of the sparse one with the pattern and the most that the kernel takes itself.

        That is, a nonzero, 8 bytes in order of use and 16 partial sums, and a thread 1 KiB for each output and half a MiB of window.
        """
        of = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
        pattern = sum(leaf.nbytes for leaf in jax.tree.leaves(self._pattern))
        threads = (os.cpu_count() or 1) * (1024 * max(self._w.shape[-2:]) + 2**19)
        return of(self._dense), of(self._sparse) + pattern + 72 * int(self.mask.sum()) + threads


def _seconds(function) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


class Torch:
    """The rivals in PyTorch, in a process of their own, which tells its seconds itself."""

    def __init__(self, python: str):
        script = pathlib.Path(__file__).parent / 'torch_layers.py'
        self._process = subprocess.Popen([python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.version = self._process.stdout.readline().strip()
        if not self.version:
            raise SystemExit(f'error: the PyTorch rival ended with {self._process.wait()}: is torch installed for --torch_python?')

    def ask(self, **request):
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + '\n')
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=60)


def measure(shape, density: float, rounds: int, torch: Torch | None, block: int = 1) -> dict:
    """All columns of one layer at one density."""
    layer = Layer(shape, density, block)
    runs = {'xla': layer.dense, 'ours': layer.sparse}
    if torch:
        for name in torch.ask(shape=shape, density=density):
            runs[name] = functools.partial(torch.ask, run=name)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            time.sleep(0.02)  # OpenMP's threads of the rival before go on spinning for a while, on a core that is this one's turn
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
    """Multiply-adds a second of a large matrix product and bytes a second of a copy (read and written), the best of some."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    multiply_adds = max(2048**3 / _seconds(lambda: product(a, a)) for _ in range(10))
    big = np.ones(2**26, np.float32)
    copy = np.empty_like(big)
    return multiply_adds, max(2 * big.nbytes / _seconds(lambda: np.copyto(copy, big)) for _ in range(5))


def crossover(rows: list[dict], rival: str) -> str:
    """The density below which ours is faster than a rival, from the measured ones (log-linear between them)."""
    points = sorted((row['density'], row['ratios'][rival]) for row in rows if rival in row['ratios'])
    for (d0, r0), (d1, r1) in itertools.pairwise(points):
        if r0 >= 1 > r1:
            part = np.log(r0) / np.log(r0 / r1)
            return f'{np.exp(np.log(d0) + part * np.log(d1 / d0)):.0%}'
    return f'above {points[-1][0]:.0%}' if points[-1][1] >= 1 else f'below {points[0][0]:.0%}'


def table(rows: list[dict], peak: tuple[float, float]) -> str:
    """The results as Markdown."""
    names = {'xla': 'XLA dense', 'torch': 'PyTorch dense', 'sparseprop': 'SparseProp'}
    there = [name for name in names if any(name in row['seconds'] for row in rows)]
    lines = ['| layer | density | ours | ' + ' | '.join(f'{names[n]} | ours is' for n in there) + ' | of peak |']
    lines.append('|---|---:|---:|' + '---:|---:|' * len(there) + '---:|')
    for row in rows:
        cells = []
        for name in there:
            cells.append(f'{1e3 * row["seconds"][name]:.1f} ms' if name in row['seconds'] else '')
            cells.append(f'{row["ratios"][name]:.1f}x' if name in row['ratios'] else '')
        of_peak = row['multiply_adds'] / row['seconds']['ours'] / peak[0]
        blocks = f', blocks of {row["block"]}' if row['block'] > 1 else ''
        ours = f'{1e3 * row["seconds"]["ours"]:.1f} ms'
        lines.append(f'| {title(row["shape"])}{blocks} | {row["density"]:.0%} | {ours} | {" | ".join(cells)} | {of_peak:.0%} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--torch_python', default='', help='a Python in which torch is installed; default: no such columns')
    parser.add_argument('--json', type=pathlib.Path, help='file for the results')
    args = parser.parse_args()
    torch = Torch(args.torch_python) if args.torch_python else None
    peak = peaks()
    rows, blocks, crossovers = [], [], []
    for shape in SHAPES:
        rows += [measure(shape, density, args.rounds, torch) for density in DENSITIES]
        print(table(rows[-len(DENSITIES) :], peak), flush=True)
        wider = rows[-len(DENSITIES) :] + [measure(shape, density, 3, torch) for density in (0.4, 0.7, 1.0)]
        found = [crossover(wider, rival) for rival in ('xla', 'torch') if rival in wider[0]['ratios']]
        by_density = {row['density']: row['seconds']['ours'] for row in wider}
        row, full = rows[-2], wider[-1]
        ceiling = full['multiply_adds'] / full['seconds']['ours'] / peak[0]
        memory = [f'{row[f"{kind}_temporary_bytes"] / 2**20:.1f} MiB' for kind in ('dense', 'sparse')]
        bound = row['bytes'] / peak[1] / row['seconds']['ours']
        crossovers.append(
            f'| {title(shape)} | {" | ".join(found)} | {by_density[0.2] / by_density[0.05]:.1f}x | {ceiling:.0%} | {bound:.0%} '
            f'| {1e3 * row["rebuild_seconds"]:.1f} ms | {" | ".join(memory)} |'
        )
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
    print('\n'.join(crossovers))
    if args.json:
        args.json.write_text(json.dumps({'peaks': peak, 'rows': rows + blocks}, indent=2) + '\n')
