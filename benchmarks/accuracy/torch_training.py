"""A whole dense training in PyTorch, for benchmarks/accuracy/time_to_accuracy.py: oneDNN, channels_last, torch.optim.SGD.

    python -m benchmarks.accuracy.torch_training FOLDER

It reads FOLDER/settings.json, params.npz and data.npz, and appends step and test accuracy to FOLDER/metrics.jsonl. It needs only torch
and numpy.
"""

import json
import math
import pathlib
import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

from benchmarks.steps import torch_twin


def rate(settings, step):
    """Returns the learning rate of a step, counted from 0, as sparse_jax.train.optimizer does."""
    if settings['schedule'] == 'cosine':
        return settings['learning_rate'] * 0.5 * (1 + math.cos(math.pi * step / settings['steps']))
    return settings['learning_rate'] * settings['decay_factor'] ** (step // settings['decay_every'])


def images(array):
    """Turns images [n, height, width, channels] into a tensor in channels_last format."""
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def main():
    folder = pathlib.Path(sys.argv[1])
    settings, data = json.loads((folder / 'settings.json').read_text()), np.load(folder / 'data.npz')
    p = torch_twin.load(folder / 'params.npz', lambda value: value.clone(memory_format=torch.preserve_format).requires_grad_())
    names = [name.removesuffix('/scale') for name in p if name.endswith('/scale')]
    running = {name: (torch.zeros(len(p[f'{name}/scale'])), torch.ones(len(p[f'{name}/scale']))) for name in names}
    forward = getattr(torch_twin, settings['model'])
    x, y, test_x = images(data['x']), torch.from_numpy(data['y']).long(), images(data['test_x'])
    test_y = torch.from_numpy(data['test_y']).long()
    optimizer = torch.optim.SGD(
        p.values(),
        lr=settings['learning_rate'],
        momentum=settings['momentum'],
        nesterov=True,
        weight_decay=settings['weight_decay'],
    )
    random, size, order = np.random.default_rng(settings['seed']), settings['batch_size'], []

    def apply(x, train):
        return forward(p, x, lambda x, p, name: torch_twin.norm(x, p, name, running, train))

    with open(folder / 'metrics.jsonl', 'a', buffering=1) as metrics:
        for step in range(settings['steps']):
            if len(order) < size:
                order = random.permutation(len(y))
            batch, order = torch.from_numpy(np.array(order[:size])), order[size:]
            optimizer.param_groups[0]['lr'] = rate(settings, step)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(apply(x[batch].contiguous(memory_format=torch.channels_last), True), y[batch]).backward()
            if settings['clip_norm']:
                torch.nn.utils.clip_grad_norm_(p.values(), settings['clip_norm'])
            optimizer.step()
            if (step + 1) % settings['eval_every'] == 0 or step + 1 == settings['steps']:
                with torch.no_grad():
                    predictions = [apply(part, False).argmax(1) for part in test_x.split(250)]
                accuracy = (torch.cat(predictions) == test_y).float().mean().item()
                metrics.write(json.dumps({'step': step + 1, 'test_accuracy': accuracy}) + '\n')


if __name__ == '__main__':
    main()
