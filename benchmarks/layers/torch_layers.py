"""One layer in PyTorch (oneDNN, channels_last) and in SparseProp, for benchmarks/layers/compare.py, which starts it with another Python.

    python benchmarks/layers/torch_layers.py

It reads one JSON object per line from standard input. An object with "shape" (batch, side, in, out, taps, stride) and "density"
prepares a layer and prints which implementations there are; one with "run" ("torch" or "sparseprop") calls it, forward and both
gradients, and prints the seconds, or null if it is not available. It needs torch, and for SparseProp the package sparseprop.
"""

import json
import sys
import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

try:
    from sparseprop.modules import SparseConv2d, SparseLinear  # pyright: ignore[reportMissingImports]
except ImportError:
    SparseConv2d: Any = None
    SparseLinear: Any = None


def prepare(shape, density):
    """Makes the layer of each implementation; returns a function without arguments by name."""
    batch, side, inputs, outputs, taps, stride = shape
    torch.manual_seed(0)
    if side == 0:  # a matrix product
        weight = torch.randn(outputs, inputs)
        x = torch.randn(batch, inputs, requires_grad=True)
        dense = lambda x, w: F.linear(x, w)
    else:
        weight = torch.randn(outputs, inputs, taps, taps)
        x = torch.randn(batch, inputs, side, side)
        dense = lambda x, w: F.conv2d(x, w, stride=stride, padding=taps // 2)
    sparse_weight = weight * (torch.rand_like(weight) < density)
    plain = x.detach().clone().requires_grad_()
    if side:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    x, weight = x.detach().requires_grad_(), weight.requires_grad_()
    gradient = torch.randn_like(dense(x, weight)).detach()
    calls = {'torch': lambda: torch.autograd.grad(dense(x, weight), (x, weight), gradient)}
    if SparseConv2d is not None and density <= 0.2:  # it crashes on denser layers: its offsets are 16 bits wide
        channels_first = gradient.contiguous()
        best = None
        # SparseProp vectorises over the batch or over the image: the faster of the two is compared
        for over_batch in (False, True) if side else (False,):
            layer = SparseConv2d(sparse_weight, None, taps // 2, stride, over_batch) if side else SparseLinear(sparse_weight)
            call = lambda layer=layer: torch.autograd.grad(layer(plain), (plain, layer.weight), channels_first)
            try:
                seconds = min(_seconds(call) for _ in range(3))
            except Exception as error:
                print(f'sparseprop: {error}', file=sys.stderr)
                continue
            if best is None or seconds < best:
                best, calls['sparseprop'] = seconds, call
    return calls


def _seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    print(f'PyTorch {torch.__version__}', flush=True)
    calls = {}
    for line in sys.stdin:
        request = json.loads(line)
        if 'shape' in request:
            calls = prepare(request['shape'], request['density'])
            for call in calls.values():
                call()
            print(json.dumps(sorted(calls)), flush=True)
        else:
            call = calls.get(request['run'])
            print(json.dumps(None if call is None else _seconds(call)), flush=True)


if __name__ == '__main__':
    main()
