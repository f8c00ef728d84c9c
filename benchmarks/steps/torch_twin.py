"""The networks of benchmarks/steps/train_step.py in PyTorch, run by another Python: oneDNN, channels_last, torch.optim.SGD.

    python benchmarks/steps/torch_twin.py MODEL PARAMETERS.npz BATCH.npz

It reads parameters and a batch, then for each line on standard input makes a training step and prints its seconds and loss. It needs
only torch and numpy.
"""

import sys
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]


def load(path, tensor):
    """Reads arrays by path; convolution kernels become [out, in, height, width] in channels_last, matrices [out, in]."""
    params = {}
    for name, array in np.load(path).items():
        value = torch.from_numpy(array)
        if name.endswith('kernel'):
            if value.ndim == 4:
                value = value.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
            else:
                value = value.transpose(-1, -2).contiguous()
        params[name] = tensor(value)
    return params


def conv(x, p, name, stride=1, padding=1):
    return F.conv2d(x, p[f'{name}/kernel'], p.get(f'{name}/bias'), stride, padding)


def norm(x, p, name, running=None, train=True):
    """Batch normalisation; `running` holds running means and variances by name (benchmarks/accuracy/torch_training.py)."""
    mean, var = running[name] if running else (None, None)
    return F.batch_norm(x, mean, var, p[f'{name}/scale'], p[f'{name}/bias'], training=train, eps=1e-5)


def linear(x, p, name):
    return F.linear(x, p[f'{name}/kernel'], p.get(f'{name}/bias'))


def flat(x):
    return x.permute(0, 2, 3, 1).reshape(len(x), -1)


def vgg_d(p, x, norm=norm):
    for stage, depth in enumerate((2, 2, 3, 3, 3), 1):
        for i in range(1, depth + 1):
            x = F.relu(norm(conv(x, p, f'conv{stage}_{i}'), p, f'norm{stage}_{i}'), inplace=True)
        x = F.max_pool2d(x, 2)
    x = flat(x)
    for i in (1, 2):
        x = norm(F.relu(linear(x, p, f'fc{i}')), p, f'fc_norm{i}')
    return linear(x, p, 'out')


def wrn_16_8(p, x, norm=norm):
    x = conv(x, p, 'conv')
    for stage in (1, 2, 3):
        for i in (1, 2):
            b, stride = f'block{stage}_{i}', 2 if stage > 1 and i == 1 else 1
            y = F.relu(norm(x, p, f'{b}/norm1'), inplace=True)
            residual = conv(y, p, f'{b}/shortcut', stride, 0) if f'{b}/shortcut/kernel' in p else x
            y = F.relu(norm(conv(y, p, f'{b}/conv1', stride), p, f'{b}/norm2'), inplace=True)
            x = residual + conv(y, p, f'{b}/conv2')
    return linear(F.relu(norm(x, p, 'norm'), inplace=True).mean((2, 3)), p, 'fc')


def lenet5(p, x, norm=None):
    x = F.relu(F.max_pool2d(conv(x, p, 'conv1', padding=0), 2))
    x = F.relu(F.max_pool2d(conv(x, p, 'conv2', padding=0), 2))
    return linear(F.relu(linear(flat(x), p, 'fc1')), p, 'fc2')


def rotate(x):  # [batch, heads, length, features]
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] / 10_000 ** (torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def lm_tiny(p, tokens, heads=4):
    x = F.embedding(tokens, p['embed/table'])
    features = x.shape[-1]
    row = lambda name, i: p[f'layers/{name}'][i]
    rms = lambda x, scale: F.rms_norm(x, (features,), scale, 1e-6)
    for i in range(len(p['layers/mlp_norm/scale'])):
        y = rms(x, row('attention_norm/scale', i))
        split = lambda w: F.linear(y, w).view(*y.shape[:2], heads, -1).transpose(1, 2)  # noqa: B023, called at once
        query, key, value = (split(row(f'attention/{n}/kernel', i)) for n in ('query', 'key', 'value'))
        y = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        x = x + F.linear(y.transpose(1, 2).reshape(x.shape), row('attention/out/kernel', i))
        y = rms(x, row('mlp_norm/scale', i))
        hidden = F.silu(F.linear(y, row('mlp/gate/kernel', i))) * F.linear(y, row('mlp/up/kernel', i))
        x = x + F.linear(hidden, row('mlp/down/kernel', i))
    return rms(x, p['norm/scale']) @ p['embed/table'].T


def main():
    model, parameters, data = sys.argv[1:]
    params = load(parameters, lambda value: value.clone(memory_format=torch.preserve_format).requires_grad_())
    batch = np.load(data)
    inputs, labels = torch.from_numpy(batch['input']), torch.from_numpy(batch['label']).long()
    inputs = inputs.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs.long()
    optimizer = torch.optim.SGD(params.values(), lr=0.0001, momentum=0.9, nesterov=True, weight_decay=5e-4)
    forward = globals()[model]
    print(torch.__version__, torch.get_num_threads(), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward(params, inputs).flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()
        print(time.perf_counter() - begin, loss.item(), flush=True)


if __name__ == '__main__':
    main()
