"""A whole training step of four networks: ours dense and sparse, plain jax.lax, and PyTorch.

    python -m benchmarks.steps.train_step --density=0.05,0.2,0.1,0.02,0.01 --json=FILE --torch_python=PYTHON

Forward, backward, SGD with Nesterov momentum and L2, no dropout, float32, a batch of noise. The rivals take turns; times are medians
over rounds, and ratios medians of the ratios within a round:

  - `xla`: plain jax.lax (benchmarks/steps/twins.py);
  - `dense`: ours without sparsity;
  - sparse: ours at each density as launch.py trains, with kernels where they are measured fastest, and with the window of dense
    gradients and a mask update every 390 steps amortised;
  - `torch`: benchmarks/steps/torch_twin.py, run by PYTHON, which must have torch installed.

All of them keep freed memory (allocator.MALLOC), PyTorch is also run with its defaults ("as it comes"). Without --model all four networks
are measured. For images of CIFAR's shape it also prints how many images per second the input pipeline makes. Cost: fifteen minutes on
two cores with five densities.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax as sj
from benchmarks.layers import compare
from benchmarks.steps import twins
from sparse_jax import config as config_lib
from sparse_jax import data as data_lib
from sparse_jax import train
from sparse_jax.core import layers as layers_lib
from sparse_jax.launch import allocator
from sparse_jax.train import kernel_choice

UPDATE_EVERY = 390


def config(
    name: str, method: str, density: float, batch_size: int, *, kernels: str = 'auto', layout: str = 'auto'
) -> config_lib.Config:
    """Returns the config of our step."""
    c = config_lib.Config()
    c.model.name = 'transformer' if name == 'lm_tiny' else name
    if name == 'lm_tiny':
        c.model.depth, c.model.features, c.model.heads = (twins.LM[key] for key in ('depth', 'features', 'heads'))
    c.model.dropout = 0.0 if name.startswith('wrn') else -1.0
    c.data.batch_size = batch_size
    c.optimizer.learning_rate, c.optimizer.momentum, c.optimizer.weight_decay = twins.RATE, twins.MOMENTUM, twins.DECAY
    c.optimizer.schedule = 'constant'
    c.sparsity.method, c.sparsity.density, c.sparsity.update_every = method, density, UPDATE_EVERY
    c.sparsity.kernels, c.model.layout = kernels, layout
    c.train.steps = 100 * UPDATE_EVERY
    return c


class Ours:
    """Our training step from given parameters, as launch.py runs it: with the kernels that are measured fastest, and the window.

    Args:
      name: name of the network.
      method: name of the sparse-training method, or ``'dense'``.
      density: density of the sparse leaves.
      batch: batch that each step trains on.
      params: initial parameters.
      **options: keyword arguments of :func:`config`.
    """

    def __init__(self, name: str, method: str, density: float, batch, params, **options):
        shape, outputs = batch['input'].shape[1:], twins.TOKENS if name == 'lm_tiny' else 10
        settings = config(name, method, density, len(batch['input']), **options)
        num_examples = UPDATE_EVERY * len(batch['input'])
        experiment = train.create(settings, num_examples=num_examples, input_shape=shape, num_outputs=outputs)
        state = jax.jit(experiment.init)(jax.random.key(0))
        params = jax.tree.map(jnp.array, params)
        if method != 'dense':
            params = sj.apply_masks(params, sj.get_masks(state.opt_state))
        self.state = state._replace(params=params)
        self.batch = batch
        with tempfile.TemporaryDirectory() as folder:
            self.patterns = kernel_choice.LayerKernels(settings, experiment, pathlib.Path(folder), 0).patterns(0, self.state)
        self.step = jax.jit(experiment.train_step, donate_argnums=0, static_argnames='dense_gradients')
        is_dense = [experiment.needs_dense_gradient(step) for step in range(UPDATE_EVERY + 1, 2 * UPDATE_EVERY + 1)]
        self.dense_share = sum(is_dense) / UPDATE_EVERY

    def __call__(self, dense_gradients: bool = True) -> float:
        """Makes a step and returns its loss."""
        self.state, metrics = self.step(self.state, self.batch, self.patterns, dense_gradients=dense_gradients)
        loss = float(metrics['loss'])
        jax.block_until_ready(self.state.params)
        return loss

    def before_an_update(self) -> None:
        """Sets the step count so that the next step updates the masks."""
        is_state = lambda x: isinstance(x, sj.SparsifyState)
        late = lambda x: x._replace(count=jnp.full_like(x.count, UPDATE_EVERY - 1)) if is_state(x) else x
        self.state = self.state._replace(opt_state=jax.tree.map(late, self.state.opt_state, is_leaf=is_state))

    def mask_update(self) -> float:
        """Returns the seconds of a step that updates the masks and of making new patterns; the state is restored afterwards."""
        before = jax.tree.map(jnp.copy, self.state)
        self.before_an_update()
        begin = time.perf_counter()
        self()
        if self.patterns is not None:
            masks = jax.device_get(sj.get_masks(self.state.opt_state))
            jax.block_until_ready(jax.device_put(sj.kernels.make_patterns(masks, previous=self.patterns)))
        seconds = time.perf_counter() - begin
        self.state = before
        return seconds

    def density(self) -> float:
        """Returns the density of the masks."""
        return sj.stats.density(sj.get_masks(self.state.opt_state))


class Plain:
    """The training step in plain jax.lax."""

    def __init__(self, name: str, batch, params):
        self._params = jax.tree.map(jnp.array, params)
        self._trace = jax.tree.map(jnp.zeros_like, self._params)
        self.batch = batch
        self._step = jax.jit(twins.step(name), donate_argnums=(0, 1))

    def __call__(self) -> float:
        """Makes a step and returns its loss."""
        self._params, self._trace, loss = self._step(self._params, self._trace, self.batch)
        jax.block_until_ready(self._params)
        return float(loss)


class Torch:
    """The training step in PyTorch, in a separate process that times itself.

    Args:
      python: path of a Python with torch installed.
      name: name of the network.
      batch: batch that each step trains on.
      params: initial parameters.
      folder: folder for the files that the process reads.
      as_it_comes: whether to run without allocator.MALLOC, which makes PyTorch's steps faster too.
    """

    def __init__(self, python: str, name: str, batch, params, folder: pathlib.Path, *, as_it_comes: bool = False):
        np.savez(folder / 'params.npz', **dict(layers_lib.leaf_paths(params)))
        np.savez(folder / 'batch.npz', **batch)
        script = pathlib.Path(__file__).parent / 'torch_twin.py'
        command = [python, str(script), name, str(folder / 'params.npz'), str(folder / 'batch.npz')]
        environment = {key: value for key, value in os.environ.items() if key != 'GLIBC_TUNABLES' or not as_it_comes}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.version = self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit(f'error: the PyTorch twin ended with {self._process.wait()}: is torch installed for --torch_python?')
        return line

    def __call__(self) -> tuple[float, float]:
        """Makes a step and returns its seconds and loss."""
        assert self._process.stdin is not None
        self._process.stdin.write('\n')
        self._process.stdin.flush()
        seconds, loss = self._line().split()
        return float(seconds), float(loss)

    def close(self) -> None:
        self._process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        self._process.wait()


def _seconds(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _pipeline(batch_size: int) -> float:
    """Returns how many images per second the CIFAR pipeline makes, augmentation included, from arrays of noise."""
    images = np.random.default_rng(0).integers(0, 256, (50 * batch_size, 32, 32, 3), dtype=np.uint8)
    split = data_lib.Split(images, np.zeros(len(images), np.int32))
    data = data_lib.Dataset(split, split, split, 10, data_lib.standardized_cifar, data_lib.augment_lib.crop_and_flip)
    batches = data_lib.batches(data, batch_size=batch_size, seed=0, num_batches=50)
    begin = time.perf_counter()
    count = sum(len(batch['label']) for batch in data_lib.stream(batches, 0, 2))
    return count / (time.perf_counter() - begin)


def _take_turns(contenders: dict[str, Callable[[], Any]], torches: dict[str, Torch], rounds: int) -> dict[str, list[float]]:
    """Runs all contenders in turn, round after round; returns the seconds of each, without the first round, which compiles."""
    times: dict[str, list[float]] = {key: [] for key in (*contenders, *torches)}
    for round_ in range(rounds + 1):
        row = {}
        for key, contender in contenders.items():
            time.sleep(0.02)  # OpenMP's threads spin for a while after a step
            row[key] = _seconds(contender)
        for key, torch in torches.items():
            row[key] = torch()[0]
        for key, value in row.items() if round_ else ():
            times[key].append(value)
    return times


def _density_row(density: float, ours: Ours, times: dict[str, list[float]]) -> dict[str, float]:
    """Returns the columns of one density: its three kinds of steps, their average in training, and the ratios to its rivals."""
    assert abs(ours.density() - density) < 1e-3
    sparse, dense = times[f'{density} sparse'], times[f'{density} dense gradients']
    step, window = float(np.median(sparse)), float(np.median(dense))
    update = float(np.median([ours.mask_update() for _ in range(3)])) - window
    share = ours.dense_share
    row = {'density': density, 'step_seconds': step, 'dense_gradient_step_seconds': window, 'mask_update_seconds': update}
    row['seconds'] = (1 - share) * step + share * window + update / UPDATE_EVERY
    average = np.array([(1 - share) * s + share * w for s, w in zip(sparse, dense, strict=True)]) + update / UPDATE_EVERY
    for key in ('xla', 'dense', 'torch', 'torch_as_it_comes'):
        if key in times:
            row[f'{key}_ratio'] = float(np.median(np.array(times[key]) / average))
    return row


def measure(name: str, densities: Sequence[float], batch_size: int, rounds: int, torch_python: str) -> dict[str, Any]:
    """Measures one network; returns a row with all columns of the tables."""
    batch, params = twins.batch(name, batch_size), twins.parameters(name)
    contenders: dict[str, Callable[[], Any]] = {'xla': Plain(name, batch, params), 'dense': Ours(name, 'dense', 1.0, batch, params)}
    sparse = {density: Ours(name, 'sparse_momentum', density, batch, params) for density in densities}
    for density, ours in sparse.items():
        contenders[f'{density} sparse'] = functools.partial(ours, dense_gradients=False)
        contenders[f'{density} dense gradients'] = ours
    with tempfile.TemporaryDirectory() as folder:
        torches = {}
        if torch_python:
            for key, as_it_comes in (('torch', False), ('torch_as_it_comes', True)):
                torches[key] = Torch(torch_python, name, batch, params, pathlib.Path(folder), as_it_comes=as_it_comes)
        times = _take_turns(contenders, torches, rounds)
        for torch in torches.values():
            torch.close()
    result: dict[str, Any] = {
        'model': name,
        'batch_size': batch_size,
        'xla_seconds': float(np.median(times['xla'])),
        'dense_seconds': float(np.median(times['dense'])),
    }
    for key, torch in torches.items():
        result |= {f'{key}_seconds': float(np.median(times[key])), 'torch': torch.version.split()[0]}
    result['densities'] = [_density_row(density, ours, times) for density, ours in sparse.items()]
    fastest = min(result['densities'][0]['seconds'], result['dense_seconds'])
    if name == 'lm_tiny':
        result['tokens_per_second'] = batch_size * twins.LENGTH / fastest
    elif name != 'lenet5':
        result['pipeline_images_per_second'] = _pipeline(batch_size)
        result['fastest_step_images_per_second'] = batch_size / fastest
    return result


def crossover(result: dict[str, Any], rival: str) -> str:
    """Returns the density below which our sparse step is faster than a rival, log-linear between the measured densities."""
    rows = [{'density': row['density'], 'ratios': {rival: row[f'{rival}_ratio']}} for row in result['densities']]
    return compare.crossover(rows, rival)


GOLDEN_SIZES = {'vgg_d': 16, 'wrn_16_8': 4, 'lenet5': 4, 'lm_tiny': 4}


def golden(torch_python: str) -> dict[str, dict]:
    """Records PyTorch's losses over three steps of small batches, for the tests."""
    recorded = {}
    for name, size in GOLDEN_SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            torch = Torch(torch_python, name, twins.batch(name, size), twins.parameters(name), pathlib.Path(folder))
            losses = [torch()[1] for _ in range(3)]
            recorded[name] = {'batch_size': size, 'losses': losses, 'torch': torch.version.split()[0]}
            torch.close()
    return recorded


def table(rows: list[dict]) -> str:
    """Formats the rows as two Markdown tables."""
    lines = [
        '| network | density | plain jax.lax | PyTorch dense (as it comes) | ours, dense | ours, sparse | against jax.lax '
        '| against PyTorch (as it comes) | against ours, dense |',
        '|---|---:|---:|---:|---:|---:|---:|---:|---:|',
    ]
    milliseconds = lambda seconds: f'{1e3 * seconds:,.0f} ms' if seconds >= 0.1 else f'{1e3 * seconds:,.1f} ms'
    for row in rows:
        rivals = [key for key in ('xla', 'torch', 'torch_as_it_comes', 'dense') if f'{key}_seconds' in row]
        times = {key: milliseconds(row[f'{key}_seconds']) for key in rivals}
        torch = f'{times["torch"]} ({times["torch_as_it_comes"]})' if 'torch' in times else ''
        for point in row['densities']:
            ratios = {key: f'{point[f"{key}_ratio"]:.1f}x' for key in rivals}
            against = f'{ratios["torch"]} ({ratios["torch_as_it_comes"]})' if torch else ''
            cells = [row['model'], f'{point["density"]:.0%}', times['xla'], torch, times['dense'], milliseconds(point['seconds'])]
            lines.append('| ' + ' | '.join([*cells, ratios['xla'], against, ratios['dense']]) + ' |')
    lines += [
        '',
        '| network | step | with dense gradients | mask update, with patterns | sparse wins over ours, dense, below | over PyTorch below |',
    ]
    lines.append('|---|---:|---:|---:|---:|---:|')
    for row in rows:
        point = row['densities'][0]
        times = [milliseconds(point[f'{key}_seconds']) for key in ('step', 'dense_gradient_step', 'mask_update')]
        wins = [crossover(row, key) if f'{key}_ratio' in point else '' for key in ('dense', 'torch')]
        lines.append('| ' + ' | '.join([f'{row["model"]} at {point["density"]:.0%}', *times, *wins]) + ' |')
    return '\n'.join(lines)


def _densities(text: str) -> list[float]:
    try:
        densities = [float(part) for part in text.split(',')]
    except ValueError:
        densities = []
    if not densities or not all(0 < density < 1 for density in densities):
        raise argparse.ArgumentTypeError(f'{text} must be numbers between 0 and 1, separated by commas')
    return densities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=twins.MODELS, help='network to measure; by default all of them')
    parser.add_argument(
        '--density', type=_densities, default='0.05', help='densities, separated by commas; the second table shows the first one'
    )
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--json', type=pathlib.Path, help='file to write the results to')
    parser.add_argument('--torch_python', default='', help='a Python with torch installed; by default PyTorch is left out')
    parser.add_argument('--golden', type=pathlib.Path, help="only record PyTorch's losses for the tests in this file")
    args = parser.parse_args()
    if args.golden:
        args.golden.write_text(json.dumps(golden(args.torch_python), indent=2) + '\n')
        return
    rows = []
    for name in [args.model] if args.model else twins.MODELS:
        rows.append(measure(name, args.density, args.batch_size, args.rounds, args.torch_python))
        print(json.dumps(rows[-1], indent=2), flush=True)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows[0] if args.model else rows, indent=2) + '\n')


if __name__ == '__main__':
    allocator.keep_memory()
    main()
