"""What this machine's processor reaches, in two minutes: dense and sparse products, a copy, and a sum between processes.

    python -m sparse_jax.plan.calibrate [FILE.json]

It prints a row for ``--hardware``, and writes it into the file. The peak is the best dense product's rate; efficiencies are parts of it. Let
nothing else run meanwhile.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax._malloc import MALLOC
from sparse_jax.core.granularity import Unstructured
from sparse_jax.kernels import measure
from sparse_jax.kernels.cpu import compiler
from sparse_jax.kernels.reference import Geometry

DENSITIES = (0.05, 0.1, 0.2, 0.5)
_SAME = Geometry(padding=((1, 1), (1, 1)))
# [batch / 16, height, width, in, 16], and the kernel: layers of VGG and of wide residual networks
_CONVOLUTIONS = (((4, 16, 16, 128, 16), (3, 3, 128, 128)), ((4, 8, 8, 256, 16), (3, 3, 256, 256)))
_PRODUCTS = (((512, 1, 1, 512), (1, 1, 512, 512)), ((2048, 1, 1, 192), (1, 1, 192, 512)))
_PROGRAM = """
import sys, time, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
port, number, index, size = (int(x) for x in sys.argv[1:5])
if number > 1:
    jax.distributed.initialize(f'localhost:{port}', number, index)
mesh = Mesh(np.array(jax.devices()), ('data',))
replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
w = jax.device_put(np.full((size, size), 1e-3, np.float32), replicated) if number == 1 else jax.make_array_from_callback(
    (size, size), replicated, lambda i: np.full((size, size), 1e-3, np.float32)[i])
x = jax.make_array_from_callback((number * 256, size), split, lambda i: np.ones((number * 256, size), np.float32)[i])
loss = lambda w, x: jnp.mean(jnp.square(jnp.tanh(x @ w) @ w))
def local(w, x):
    return jax.grad(loss)(w, x)[None]
alone = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P('data')), out_specs=P('data'), check_vma=False))
whole = jax.jit(jax.grad(loss), out_shardings=replicated)
for name, step in (('alone', alone), ('whole', whole)):
    step(w, x).block_until_ready()
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        step(w, x).block_until_ready()
        times.append(time.perf_counter() - begin)
    print(name, sorted(times)[4])
"""


def seconds(function: Callable[..., Any], *arguments: Any, least: int = 5) -> float:
    """The median time of a call, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    while len(times) < least or sum(times) < 0.5:
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def _layers(shapes: tuple, density: float | None) -> float:
    """Operations a second on existing weights, forward and both gradients; of dense layers without a density."""
    rates = []
    for x, w in shapes:
        geometry = _SAME if w[0] == 3 else Geometry()
        call = measure.Call('', x, w, geometry, Unstructured(), 'float32')
        times = measure.measure(call, density or 0.1, at_least=1.0)
        images = x[0] * (x[4] if len(x) == 5 else 1)
        operations = 3 * 2 * images * math.prod(x[1:3]) * math.prod(w)
        name = 'dense' if density is None else next((n for n in times if n != 'dense'), 'dense')
        rates.append(operations * (density or 1.0) / times[name])
    return math.exp(float(np.mean(np.log(rates))))


def step_of_processes(processes: int, size: int) -> tuple[float, float]:
    """Seconds of a training step of a few large products, by processes that share this machine: with the sum of its gradient, and without.

    Args:
      processes: how many; each has a part of the batch.
      size: side of the weight, float32.

    Returns:
      Both times, medians of nine steps.
    """
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
    command = [sys.executable, '-c', _PROGRAM, str(port), str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(i), str(size)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        for i in range(processes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    of_step = [
        line.split() for line in outputs[0].splitlines() if line.startswith(('alone', 'whole'))
    ]  # gloo prints lines of its own
    times = dict(of_step)
    return float(times['whole']), float(times['alone'])


def _sum_rate(size: int = 1024) -> float:
    """Bytes a second that a process sends of a gradient that two add up."""
    whole, alone = step_of_processes(2, size)
    return 4 * size**2 / max(whole - alone, 1e-6)  # 2 (P - 1) / P of it is the whole


def _model() -> str:
    """What the processor is called."""
    found = re.search(r'model name\s*:\s*(.+)', compiler.processor())
    return found[1].strip() if found else platform.processor() or platform.machine()


def measured() -> dict[str, Any]:
    """The row of this machine."""
    square = jnp.ones((2048, 2048))
    peak = 2 * 2048**3 / seconds(jax.jit(lambda x: x @ x), square)
    large = jnp.ones(2**26)
    bandwidth = 2 * large.nbytes / seconds(jax.jit(lambda x: x + 1), large)
    efficiency = {
        'products': _layers(_PRODUCTS, None) / peak,
        'convolutions': _layers(_CONVOLUTIONS, None) / peak,
        'bandwidth': 1.0,
        'links': 1.0,
    }
    sparse = {
        name: [[density, round(_layers(shapes, density) / peak, 4)] for density in DENSITIES]
        for name, shapes in (('products', _PRODUCTS), ('convolutions', _CONVOLUTIONS))
    }
    rate = _sum_rate()
    pages = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return {
        'title': f'{os.cpu_count()} cores of {_model()}',
        'kind': 'cpu',
        'dense_tflops': {'float32': round(peak / 1e12, 4)},
        'memory_gb': round(pages / 1e9, 1),
        'bandwidth_gb_s': round(bandwidth / 1e9, 2),
        'link_gb_s': round(rate / 1e9, 3),
        'devices_per_host': 1,
        'network_gb_s': round(rate / 1e9, 3),
        'efficiency': {name: round(value, 3) for name, value in efficiency.items()},
        'sparse': sparse,
        'fitted_on': 'single layers on this machine',
        'source': f'measured with jax {jax.__version__} on {platform.machine()}',
        'date': time.strftime('%Y-%m-%d'),
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', type=pathlib.Path, nargs='?', help='JSON file to write, for --hardware')
    args = parser.parse_args()
    if args.file and (args.file.is_dir() or not args.file.parent.is_dir()):
        parser.error(f'{args.file} cannot be written: give a file in a folder that is there.')
    if 'GLIBC_TUNABLES' not in os.environ:  # keep freed memory, as the launcher does
        command = [sys.executable, '-m', 'sparse_jax.plan.calibrate', *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {'GLIBC_TUNABLES': MALLOC})
    text = json.dumps({'cpu': measured()}, indent=2)
    print(text)
    if args.file:
        args.file.write_text(text + '\n')


if __name__ == '__main__':
    main()
