"""What this machine's processor reaches, in two minutes: dense and sparse products, a copy, and a sum between processes.

    python -m sparse_jax.plan.calibrate [FILE.json]

It prints a row for ``--hardware``, and writes it into the file. The peak is the best dense product's rate; efficiencies are parts of it. Let
nothing else run meanwhile.
"""

import json
import math
import os
import pathlib
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core.granularity import Unstructured
from sparse_jax.kernels import measure
from sparse_jax.kernels.cpu import compiler
from sparse_jax.kernels.reference import Geometry

DENSITIES = (0.05, 0.1, 0.2, 0.5)
_SAME = Geometry(padding=((1, 1), (1, 1)))
# [batch / 16, height, width, in, 16], and the kernel: layers of VGG and of wide residual networks
_CONVOLUTIONS = (((4, 16, 16, 128, 16), (3, 3, 128, 128)), ((4, 8, 8, 256, 16), (3, 3, 256, 256)))
_PRODUCTS = (((512, 1, 1, 512), (1, 1, 512, 512)), ((2048, 1, 1, 192), (1, 1, 192, 512)))
_SUM = """
import sys, time, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
mesh = Mesh(np.array(jax.devices()), ('data',))
x = jax.make_array_from_callback((2, 4 * 2**20), NamedSharding(mesh, P('data')), lambda i: np.ones((1, 4 * 2**20), np.float32))
step = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P()))
step(x).block_until_ready()
times = []
for _ in range(9):
    begin = time.perf_counter()
    step(x).block_until_ready()
    times.append(time.perf_counter() - begin)
print('seconds', sorted(times)[4])
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


def _sum_rate() -> float:
    """Bytes a second that a process sends in a sum over two."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
    command = [sys.executable, '-c', _SUM, str(port)]
    processes = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=environment) for i in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return 4 * 4 * 2**20 / float(outputs[0].split()[-1])  # 2 (P - 1) / P of 16 MiB


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
        'title': f'{os.cpu_count()} cores, {compiler.processor()}'[:80],
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
    row = {'cpu': measured()}
    text = json.dumps(row, indent=2)
    print(text)
    if len(sys.argv) > 1:
        pathlib.Path(sys.argv[1]).write_text(text + '\n')


if __name__ == '__main__':
    main()
