"""The paper's estimate of a sparse network's speed next to a measurement, layer by layer.

    python -m benchmarks.layers.estimate --model=vgg_d --torch_python=PYTHON

The paper did not measure: it multiplied the dense time of each layer by the density of its weights and by the density of its inputs
(it also skips products with what ReLU set to zero), which gave 3.5x for VGG and 12x for wide residual networks. Here each convolution
and matrix product of the network is run, forward and both gradients, at the densities of a uniform start: by XLA's dense product, by
ours and by PyTorch's (PYTHON as in benchmarks/layers/compare.py; without it the estimate starts from XLA's time). The density of the
inputs is counted on a batch of random images at the start of training. Cost: two minutes, for wrn_16_8 four.
"""

import argparse
import functools
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax as sj
from benchmarks.layers import compare
from benchmarks.steps import twins
from sparse_jax import models
from sparse_jax.core import layers as layers_lib
from sparse_jax.kernels import measure, store
from sparse_jax.launch import allocator


def traced(name: str, batch_size: int, density: float):
    """Returns the call of each sparse layer, in order, with the densities of its weights and of its inputs."""
    batch = twins.batch(name, batch_size)
    model = models.create(name, input_shape=batch['input'].shape[1:], num_outputs=10)
    params, state = jax.jit(model.init)(jax.random.key(0))
    masks = sj.get_masks(sj.sparse_momentum(0.1, density, 100, 1000).init(params))
    params = sj.apply_masks(params, masks)
    leaves = [path for path, mask in layers_lib.leaf_paths(masks) if np.ndim(mask)]
    patterns = sj.kernels.make_patterns(masks, implementations=dict.fromkeys(leaves, 'reference'))
    inputs: dict[str, jax.Array] = {}
    note = lambda x, w, pattern, geometry: inputs.__setitem__(pattern.name, jnp.mean(x != 0))
    apply = lambda params, x, patterns: model.apply(params, state, x, train=True, rng=jax.random.key(1), patterns=patterns)

    @jax.jit
    def densities(params, x, patterns):
        inputs.clear()
        apply(params, x, patterns)
        return dict(inputs)

    nonzero = densities(params, batch['input'], measure.observed(patterns, note))
    seen = {path: float(value) for path, value in nonzero.items()}
    calls = measure.products_of(apply, params, batch['input'], patterns)
    shares = {path: float(np.mean(mask)) for path, mask in layers_lib.leaf_paths(masks)}
    return [(call, shares[call.name], seen[call.name]) for call in calls]


def torch_shape(call: measure.Call, batch_size: int) -> tuple[int, ...]:
    """Returns a call's shape in the form that benchmarks/layers/torch_layers.py takes."""
    if call.x[1:3] == call.w[:2] == (1, 1):
        side = math.isqrt(call.x[0] // batch_size)  # a flattened 1x1 convolution
        return (batch_size, side if side > 1 else 0, *call.w[2:], 1, 1)
    return call.x[0], call.x[1], *call.w[2:], call.w[0], call.geometry.strides[0]


@functools.cache
def _torch_seconds(torch, shape: tuple[int, ...]) -> float:
    torch.ask(shape=shape, density=1.0)
    return float(np.median([torch.ask(run='torch') for _ in range(5)]))


def estimate(name: str, batch_size: int, density: float, torch) -> list[dict]:
    """Measures each layer and returns a row for each; layers of one shape and density are measured once."""
    rows, measured = [], {}
    calls = traced(name, batch_size, density)
    if torch:  # all before the others, and then a pause, since OpenMP's threads spin for a while
        for call, _, _ in calls:
            _torch_seconds(torch, torch_shape(call, batch_size))
        time.sleep(1)
    for call, weights, inputs in calls:
        key = (call._replace(name=''), store.rounded(weights))
        if key not in measured:
            measured[key] = measure.measure(call, weights, at_least=1.0, rounds=5)
        seconds = dict(measured[key])
        if torch:
            seconds['torch'] = _torch_seconds(torch, torch_shape(call, batch_size))
        seconds['estimate'] = seconds['torch' if torch else 'dense'] * weights * inputs
        rows.append({'layer': call.name, 'weights': weights, 'inputs': inputs, 'seconds': seconds})
    return rows


def table(rows: list[dict]) -> str:
    """Formats the rows and their sum as a Markdown table."""
    with_torch = 'torch' in rows[0]['seconds']
    header = ['layer', 'weights', 'inputs not zero', 'XLA dense', *(['PyTorch dense'] if with_torch else [])]
    header += ['estimated', 'ours', 'estimated speedup', 'measured speedup']
    lines = ['| ' + ' | '.join(header) + ' |', '|---|' + '---:|' * (len(header) - 1)]
    total = {key: sum(row['seconds'].get(key, row['seconds']['dense']) for row in rows) for key in rows[0]['seconds'] | {'cpu': 0}}
    for row in [*rows, {'layer': 'all of these', 'seconds': total}]:
        seconds = row['seconds']
        base, ours = seconds['torch' if with_torch else 'dense'], seconds.get('cpu', seconds['dense'])
        densities = [f'{row["weights"]:.1%}', f'{row["inputs"]:.0%}'] if 'weights' in row else ['', '']
        times = [seconds['dense'], *([seconds['torch']] if with_torch else []), seconds['estimate'], ours]
        cells = [
            row['layer'],
            *densities,
            *(f'{1e3 * t:.2f} ms' for t in times),
            f'{base / seconds["estimate"]:.1f}x',
            f'{base / ours:.1f}x',
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=[name for name in twins.MODELS if name != 'lm_tiny'], default='vgg_d')
    parser.add_argument('--density', type=float, default=0.05)
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--torch_python', default='', help='a Python with torch installed')
    parser.add_argument('--json', type=pathlib.Path, help='file to write the results to')
    args = parser.parse_args()
    torch = compare.Torch(args.torch_python) if args.torch_python else None
    rows = estimate(args.model, args.batch_size, args.density, torch)
    if torch:
        torch.close()
        print(torch.version)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
    allocator.keep_memory()
    main()
