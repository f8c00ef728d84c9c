"""Serving times of frozen networks at 5% of their weights: an MLP layer and a CNN, beside dense XLA, scipy and PyTorch.

    python -m benchmarks.layers.serving --torch_python=PYTHON

PYTHON is a Python with torch installed; without it that column is left out. Prints a table in markdown: microseconds of a call, medians of
rounds in which the contenders take turns, each with some calls in a row, and how often ours fits into the fastest rival's.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparse_jax import kernels
from sparse_jax.core import target

BATCHES = (1, 8, 64, 1024)
CHANNELS = (3, 64, 128, 128, 256)
_SIDE, _INPUTS, _DENSITY = 32, 2048, 0.05


def weights(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal, of variance 1 / fan-in, at 5%."""
    values = random.standard_normal(shape, np.float32) / np.sqrt(_DENSITY * np.prod(shape[:-1]))
    return np.where(random.random(shape) < _DENSITY, values, 0).astype(np.float32)


def mlp(random: np.random.Generator) -> dict[str, Callable[[int], Callable[[], Any]]]:
    """One layer, 2048 to 2048: a function of the batch that gives a call, by contender."""
    w = weights(random, (_INPUTS, _INPUTS))
    frozen, dense, csr = kernels.freeze(w, w != 0), jnp.asarray(w), sparse.csr_matrix(w.T)
    product, ours = jax.jit(jnp.matmul), jax.jit(kernels.sparse_dot)

    def scipy(batch):
        x = np.ascontiguousarray(random.standard_normal((_INPUTS, batch), np.float32))
        return lambda: csr @ x

    def of(function, weight):
        def make(batch):
            x = jnp.asarray(random.standard_normal((batch, _INPUTS), np.float32))
            return lambda: function(x, weight).block_until_ready()

        return make

    return {'XLA': of(product, dense), 'scipy': scipy, 'frozen': of(ours, frozen)}


def cnn(random: np.random.Generator) -> dict[str, Callable[[int], Callable[[], Any]]]:
    """Four 3x3 convolutions on 32x32 images, stride 2 from the second on, each with ReLU."""
    params = [weights(random, (3, 3, *pair)) for pair in itertools.pairwise(CHANNELS)]

    def network(convolve):
        def forward(x, params):
            for i, w in enumerate(params):
                x = jax.nn.relu(convolve(x, w, strides=(1, 1) if i == 0 else (2, 2)))
            return x

        return jax.jit(forward)

    dense = lambda x, w, strides: jax.lax.conv_general_dilated(x, w, strides, 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    contenders = {'XLA': (network(dense), [jnp.asarray(w) for w in params])}
    contenders['frozen'] = network(kernels.sparse_conv), [kernels.freeze(w, w != 0) for w in params]

    def of(function, params):
        def make(batch):
            x = jnp.asarray(random.standard_normal((batch, _SIDE, _SIDE, 3), np.float32))
            return lambda: function(x, params).block_until_ready()

        return make

    return {name: of(*pair) for name, pair in contenders.items()}


class Torch:
    """The dense networks in PyTorch, in a process that times itself."""

    def __init__(self, python: str):
        script = pathlib.Path(__file__).parent / 'torch_serving.py'
        self._process = subprocess.Popen([python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self.ask()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        if request:
            self._process.stdin.write(json.dumps(request) + '\n')
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f'error: the PyTorch rival ended with {self._process.wait()}: is torch installed for --torch_python?')
        return json.loads(line)


def seconds(call: Callable[[], Any], calls: int) -> float:
    """Of one call, the mean of some in a row after two that warm up."""
    for _ in range(2):
        call()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description='Serving times of frozen networks.')
    parser.add_argument('--torch_python', default='', help='a Python with torch installed; by default that column is left out')
    parser.add_argument('--rounds', type=int, default=15, help='rounds in which the contenders take turns')
    args = parser.parse_args()
    if target.platform() != 'cpu':
        raise SystemExit('error: this compares kernels for CPUs: run it with JAX_PLATFORMS=cpu.')
    random = np.random.default_rng(0)
    torch = Torch(args.torch_python) if args.torch_python else None
    print(
        '| network | batch | XLA dense | scipy CSR | PyTorch dense | frozen | of the fastest rival |\n|---|---:|---:|---:|---:|---:|---:|'
    )
    for network, contenders in (('MLP', mlp(random)), ('CNN', cnn(random))):
        for batch in BATCHES:
            made = {name: make(batch) for name, make in contenders.items()}
            times: dict[str, list[float]] = {name: [] for name in (*made, *(['torch'] if torch else []))}
            calls = max(2, 40 // batch)
            for _ in range(args.rounds):
                for name, call in made.items():
                    times[name].append(seconds(call, calls))
                if torch:
                    times['torch'].append(torch.ask(network=network, batch=batch, calls=calls))
            median = {name: 1e6 * float(np.median(values)) for name, values in times.items()}
            cells = [f'{median[name]:,.0f}' if name in median else '' for name in ('XLA', 'scipy', 'torch', 'frozen')]
            rival = min(value for name, value in median.items() if name != 'frozen')
            print(f'| {network} | {batch} | {" | ".join(cells)} | {rival / median["frozen"]:.2f}x |', flush=True)
    if torch:
        print(f'\n{torch.version}')


if __name__ == '__main__':
    main()
