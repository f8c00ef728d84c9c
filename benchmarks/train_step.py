"""A whole training step of four networks: ours dense and sparse, plain jax.lax, and PyTorch.

    python -m benchmarks.train_step --model=vgg_d --density=0.05 --batch_size=64 --json=FILE --torch_python=PYTHON

Forward, backward, SGD with Nesterov momentum and L2, no dropout, float32, a batch of noise. The rivals take turns, and the figures
are medians over rounds: `xla_seconds` (benchmarks/twins.py), `dense_seconds` (ours), `sparse_seconds` (ours at the density, with a mask
update every 390 steps and the window of dense gradients amortised), `torch_seconds` (benchmarks/torch_twin.py by the Python that is
named, in which torch is installed). Without --model all four. For images of CIFAR's shape it also prints how many a second
the input pipeline makes. Cost: six minutes on two cores.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax as sj
from benchmarks import twins
from sparse_jax import config as config_lib
from sparse_jax import data as data_lib
from sparse_jax import masks as masks_lib
from sparse_jax import train

UPDATE_EVERY = 390


def config(name: str, method: str, density: float, batch_size: int) -> config_lib.Config:
    """Settings of our step."""
    made = config_lib.Config()
    made.model.name = 'transformer' if name == 'lm_tiny' else name
    if name == 'lm_tiny':
        made.model.depth, made.model.features, made.model.heads = (twins.LM[key] for key in ('depth', 'features', 'heads'))
    made.model.dropout = 0.0 if name.startswith('wrn') else -1.0
    made.data.batch_size = batch_size
    made.optimizer.learning_rate, made.optimizer.momentum, made.optimizer.weight_decay = twins.RATE, twins.MOMENTUM, twins.DECAY
    made.optimizer.schedule = 'constant'
    made.sparsity.method, made.sparsity.density, made.sparsity.update_every = method, density, UPDATE_EVERY
    made.train.steps = 100 * UPDATE_EVERY
    return made


class Ours:
    """Our training step from given parameters."""

    def __init__(self, name: str, method: str, density: float, batch, params):
        shape, outputs = batch['input'].shape[1:], twins.TOKENS if name == 'lm_tiny' else 10
        settings = config(name, method, density, len(batch['input']))
        made = train.create(settings, num_examples=UPDATE_EVERY * len(batch['input']), input_shape=shape, num_outputs=outputs)
        state = jax.jit(made.init)(jax.random.key(0))
        params = jax.tree.map(jnp.array, params)
        if method != 'dense':
            params = sj.apply_masks(params, sj.get_masks(state.opt_state))
        self.state = state._replace(params=params)
        self.batch = batch
        self._step = jax.jit(made.train_step, donate_argnums=0, static_argnames='dense_gradients')

    def __call__(self, dense_gradients: bool = True) -> float:
        self.state, metrics = self._step(self.state, self.batch, dense_gradients=dense_gradients)
        loss = float(metrics['loss'])
        jax.block_until_ready(self.state.params)
        return loss

    def before_an_update(self) -> None:
        """Sets the clock so that the next step updates the masks."""
        is_state = lambda x: isinstance(x, sj.SparsifyState)
        late = lambda x: x._replace(count=jnp.full_like(x.count, UPDATE_EVERY - 1)) if is_state(x) else x
        self.state = self.state._replace(opt_state=jax.tree.map(late, self.state.opt_state, is_leaf=is_state))

    def density(self) -> float:
        return sj.stats.density(sj.get_masks(self.state.opt_state))


class Plain:
    """The step in plain jax.lax."""

    def __init__(self, name: str, batch, params):
        self._params = jax.tree.map(jnp.array, params)
        self._trace = jax.tree.map(jnp.zeros_like, self._params)
        self.batch = batch
        self._step = jax.jit(twins.step(name), donate_argnums=(0, 1))

    def __call__(self) -> float:
        self._params, self._trace, loss = self._step(self._params, self._trace, self.batch)
        jax.block_until_ready(self._params)
        return float(loss)


class Torch:
    """The step in PyTorch, in a process of its own, which tells its seconds itself."""

    def __init__(self, python: str, name: str, batch, params, folder: pathlib.Path):
        np.savez(folder / 'params.npz', **dict(masks_lib.leaf_paths(params)))
        np.savez(folder / 'batch.npz', **batch)
        script = pathlib.Path(__file__).parent / 'torch_twin.py'
        command = [python, str(script), name, str(folder / 'params.npz'), str(folder / 'batch.npz')]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit(f'error: the PyTorch twin ended with {self._process.wait()}: is torch installed for --torch_python?')
        return line

    def __call__(self) -> tuple[float, float]:
        """Seconds and loss."""
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
    """Images a second of the CIFAR pipeline, augmentation and all, from arrays of noise."""
    images = np.random.default_rng(0).integers(0, 256, (50 * batch_size, 32, 32, 3), dtype=np.uint8)
    split = data_lib.Split(images, np.zeros(len(images), np.int32))
    data = data_lib.Dataset(split, split, split, 10, data_lib.standardized_cifar, data_lib.augment_lib.crop_and_flip)
    batches = data_lib.batches(data, batch_size=batch_size, seed=0, num_batches=50)
    begin = time.perf_counter()
    count = sum(len(batch['label']) for batch in data_lib.stream(batches, 0, 2))
    return count / (time.perf_counter() - begin)


def measure(name: str, density: float, batch_size: int, rounds: int, torch_python: str) -> dict[str, float | str]:
    """All columns of one network."""
    batch, params = twins.batch(name, batch_size), twins.parameters(name)
    plain, dense = Plain(name, batch, params), Ours(name, 'dense', 1.0, batch, params)
    sparse = Ours(name, 'sparse_momentum', density, batch, params)
    times: dict[str, list[float]] = {key: [] for key in ('xla', 'dense', 'sparse', 'update', 'torch')}
    with tempfile.TemporaryDirectory() as folder:
        torch = Torch(torch_python, name, batch, params, pathlib.Path(folder)) if torch_python else None
        for round_ in range(rounds + 1):
            row = {'xla': _seconds(plain), 'dense': _seconds(dense), 'sparse': _seconds(sparse)}
            sparse.before_an_update()
            row['update'] = _seconds(sparse)
            if torch:
                row['torch'] = torch()[0]
            if round_ > 0:  # the first compiles
                for key, value in row.items():
                    times[key].append(value)
        if torch:
            torch.close()
    assert abs(sparse.density() - density) < 1e-3
    median = {key: float(np.median(values)) for key, values in times.items() if values}
    # all steps have dense gradients so far; one in UPDATE_EVERY moves the masks
    amortised = median['sparse'] + (median['update'] - median['sparse']) / UPDATE_EVERY
    result: dict[str, float | str] = {
        'model': name, 'density': density, 'batch_size': batch_size, 'xla_seconds': median['xla'], 'dense_seconds': median['dense'],
        'sparse_seconds': amortised, 'mask_update_seconds': median['update'] - median['sparse'],
    }  # fmt: skip
    if torch:
        result |= {'torch_seconds': median['torch'], 'torch': torch.version.split()[0]}
    fastest = min(value for key, value in result.items() if key.endswith('_seconds') and key != 'mask_update_seconds')  # type: ignore
    if name == 'lm_tiny':
        for key in ('xla', 'dense', 'sparse', 'torch'):
            if f'{key}_seconds' in result:
                result[f'{key}_tokens_per_second'] = batch_size * twins.LENGTH / float(result[f'{key}_seconds'])
    elif name != 'lenet5':
        result['pipeline_images_per_second'] = _pipeline(batch_size)
        result['fastest_step_images_per_second'] = batch_size / float(fastest)
    return result


GOLDEN_SIZES = {'vgg_d': 16, 'wrn_16_8': 4, 'lenet5': 4, 'lm_tiny': 4}


def golden(torch_python: str) -> dict[str, dict]:
    """PyTorch's losses over three steps of small batches, for the tests."""
    recorded = {}
    for name, size in GOLDEN_SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            torch = Torch(torch_python, name, twins.batch(name, size), twins.parameters(name), pathlib.Path(folder))
            losses = [torch()[1] for _ in range(3)]
            recorded[name] = {'batch_size': size, 'losses': losses, 'torch': torch.version.split()[0]}
            torch.close()
    return recorded


def table(rows: list[dict]) -> str:
    """The results as Markdown."""
    lines = [
        '| network | plain jax.lax | ours, dense | ours, sparse | PyTorch | sparse against PyTorch |',
        '|---|---:|---:|---:|---:|---:|',
    ]
    for row in rows:
        seconds = lambda key, row=row: f'{1e3 * row[key]:,.0f} ms' if key in row else ''
        ratio = f'{row["sparse_seconds"] / row["torch_seconds"]:.2f}x' if 'torch_seconds' in row else ''
        columns = ' | '.join(seconds(f'{key}_seconds') for key in ('xla', 'dense', 'sparse', 'torch'))
        lines.append(f'| {row["model"]} | {columns} | {ratio} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=twins.MODELS, help='default: all')
    parser.add_argument('--density', type=float, default=0.05)
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--json', type=pathlib.Path, help='file for the results')
    parser.add_argument('--torch_python', default='', help='a Python in which torch is installed; default: no column torch_seconds')
    parser.add_argument('--golden', type=pathlib.Path, help="only record PyTorch's losses for the tests, into this file")
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
    main()
