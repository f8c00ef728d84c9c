"""The Transformer of benchmarks/gpu/step.py in PyTorch: compiled, with its flash attention and fused AdamW, in bfloat16 over float32 weights.

    python benchmarks/gpu/torch_step.py LAYERS FEATURES HEADS SEQUENCES LENGTH

It needs only torch. Prints one line of JSON: milliseconds a step by the host's clock, steps queued, and bytes at the peak.
"""

import json
import statistics
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

TOKENS = 257  # bytes and the end of a text


def rotary(x):
    half = x.shape[-1] // 2
    place = torch.arange(x.shape[1], device=x.device)[:, None]
    angle = place * 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, features: int, heads: int):
        super().__init__()
        hidden = -(-8 * features // 3 // 64) * 64
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(features, eps=1e-6), nn.RMSNorm(features, eps=1e-6)
        self.q, self.k, self.v, self.out = (linear(features, features) for _ in range(4))
        self.gate, self.up, self.down = linear(features, hidden), linear(features, hidden), linear(hidden, features)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k, v = (z.transpose(1, 2) for z in (rotary(q), rotary(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    def __init__(self, depth: int, features: int, heads: int):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, features)
        self.layers = nn.ModuleList(Layer(features, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(features, eps=1e-6)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, x):
        y = self.embed(x)
        for layer in self.layers:
            y = layer(y)
        logits = F.linear(self.norm(y), self.embed.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten())


def main() -> None:
    depth, features, heads, sequences, length = map(int, sys.argv[1:])
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    model = Transformer(depth, features, heads).to(device)
    fused = {'fused': True} if device == 'cuda' else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, **fused)
    x = torch.randint(0, 256, (sequences, length), device=device)
    forward = torch.compile(model) if device == 'cuda' else model  # a CPU's compiler is not what is asked here

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = forward(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    seconds = []
    for i in range(6):
        begin = time.perf_counter()
        for _ in range(5):
            loss = step()
        wait()
        seconds += [(time.perf_counter() - begin) / 5] * (i > 0)
    peak = torch.cuda.max_memory_allocated() if device == 'cuda' else 0
    row = {'ms': 1e3 * statistics.median(seconds), 'bytes': peak, 'loss': float(loss), 'torch': torch.__version__}
    print(json.dumps(row))


if __name__ == '__main__':
    main()
