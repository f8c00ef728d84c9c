"""The paper's estimate of a sparse network's speed beside its measurement, layer by layer.

    python -m benchmarks.layers.estimate --model=vgg_d --torch_python=PYTHON

The paper could not measure: it took the dense time of each layer, times the share of its weights that exist, times the share of its inputs
that are not zero (it skips products with what ReLU zeroed as well), and so came to 3.5x for VGG and 12x for wide residual networks. Here
each convolution and matrix product of the network is run for real, forward and both gradients, at the densities of a uniform start, by
XLA's dense product, by ours, and by PyTorch's (its other Python as in benchmarks/layers/compare.py; without it the estimate is of XLA's time). The
density of the inputs is counted on a batch of random images at the start of training. Cost: two minutes; wrn_16_8: four.
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

import launch
import sparse_jax as sj
from benchmarks.layers import compare
from benchmarks.steps import twins
from sparse_jax import models
from sparse_jax.core import masks as masks_lib
from sparse_jax.kernels import measure, store


def traced(name: str, batch_size: int, density: float):
    """Calls of each sparse layer in order, with the shares of its weights that exist and of its inputs that are not zero."""
    batch = twins.batch(name, batch_size)
    model = models.create(name, input_shape=batch['input'].shape[1:], num_outputs=10)
    params, state = jax.jit(model.init)(jax.random.key(0))
    masks = sj.get_masks(sj.sparse_momentum(0.1, density, 100, 1000).init(params))
    params = sj.apply_masks(params, masks)
    leaves = [path for path, mask in masks_lib.leaf_paths(masks) if np.ndim(mask)]
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
    shares = {path: float(np.mean(mask)) for path, mask in masks_lib.leaf_paths(masks)}
    return [(call, shares[call.name], seen[call.name]) for call in calls]


def torch_shape(call: measure.Call, batch_size: int) -> tuple[int, ...]:
    """The layer as benchmarks/layers/torch_layers.py takes it."""
    if call.x[1:3] == call.w[:2] == (1, 1):
        side = math.isqrt(call.x[0] // batch_size)  # a 1x1 convolution was flattened
        return (batch_size, side if side > 1 else 0, *call.w[2:], 1, 1)
    return call.x[0], call.x[1], *call.w[2:], call.w[0], call.geometry.strides[0]


@functools.cache
def _torch_seconds(torch, shape: tuple[int, ...]) -> float:
    torch.ask(shape=shape, density=1.0)
    return float(np.median([torch.ask(run='torch') for _ in range(5)]))


def estimate(name: str, batch_size: int, density: float, torch) -> list[dict]:
    """A row a layer; layers of one shape and density are measured once."""
    rows, known = [], {}
    calls = traced(name, batch_size, density)
    if torch:  # at once, and a pause: OpenMP's threads go on spinning for a while
        for call, _, _ in calls:
            _torch_seconds(torch, torch_shape(call, batch_size))
        time.sleep(1)
    for call, weights, inputs in calls:
        key = (call._replace(name=''), store.rounded(weights))
        if key not in known:
            known[key] = measure.measure(call, weights, at_least=1.0, rounds=5)
        seconds = dict(known[key])
        if torch:
            seconds['torch'] = _torch_seconds(torch, torch_shape(call, batch_size))
        seconds['estimate'] = seconds['torch' if torch else 'dense'] * weights * inputs
        rows.append({'layer': call.name, 'weights': weights, 'inputs': inputs, 'seconds': seconds})
    return rows


def table(rows: list[dict]) -> str:
    """The rows and their sum as Markdown."""
    there = 'torch' in rows[0]['seconds']
    header = ['layer', 'weights', 'inputs not zero', 'XLA dense', *(['PyTorch dense'] if there else [])]
    header += ['estimated', 'ours', 'estimated speedup', 'measured speedup']
    lines = ['| ' + ' | '.join(header) + ' |', '|---|' + '---:|' * (len(header) - 1)]
    total = {key: sum(row['seconds'].get(key, row['seconds']['dense']) for row in rows) for key in rows[0]['seconds'] | {'cpu': 0}}
    everything = [*rows, {'layer': 'all of these', 'seconds': total}]
    for row in everything:
        s = row['seconds']
        base, ours = s['torch' if there else 'dense'], s.get('cpu', s['dense'])
        shares = [f'{row["weights"]:.1%}', f'{row["inputs"]:.0%}'] if 'weights' in row else ['', '']
        times = [s['dense'], *([s['torch']] if there else []), s['estimate'], ours]
        cells = [
            row['layer'],
            *shares,
            *(f'{1e3 * t:.2f} ms' for t in times),
            f'{base / s["estimate"]:.1f}x',
            f'{base / ours:.1f}x',
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=[name for name in twins.MODELS if name != 'lm_tiny'], default='vgg_d')
    parser.add_argument('--density', type=float, default=0.05)
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--torch_python', default='', help='a Python in which torch is installed')
    parser.add_argument('--json', type=pathlib.Path, help='file for the results')
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
    launch.keep_memory()
    main()
