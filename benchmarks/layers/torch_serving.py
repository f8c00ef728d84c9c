"""The dense networks of serving.py in PyTorch, which starts this with another Python.

    python benchmarks/layers/torch_serving.py

It prints its version, then for each line of JSON with "network", "batch" and "calls" the seconds of one call.
"""

import itertools
import json
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]


def networks():
    """The MLP layer, and the CNN in channels_last, whose 'SAME' padding at stride 2 is one pixel after and none before."""
    channels, layers = (3, 64, 128, 128, 256), []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
        if i:
            layers.append(nn.ZeroPad2d((0, 1, 0, 1)))
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2 if i else 1, padding=0 if i else 1, bias=False), nn.ReLU()]
    return {
        'MLP': nn.Linear(2048, 2048, bias=False).eval(),
        'CNN': nn.Sequential(*layers).to(memory_format=torch.channels_last).eval(),
    }


def main():
    print(json.dumps(f'PyTorch {torch.__version__}, {torch.get_num_threads()} threads'), flush=True)
    made = networks()
    for line in sys.stdin:
        request = json.loads(line)
        shape = (request['batch'], 2048) if request['network'] == 'MLP' else (request['batch'], 3, 32, 32)
        x = torch.randn(shape)
        if request['network'] == 'CNN':
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            for _ in range(2):
                made[request['network']](x)
            begin = time.perf_counter()
            for _ in range(request['calls']):
                made[request['network']](x)
            print((time.perf_counter() - begin) / request['calls'], flush=True)


main()
