"""The checks of benchmarks/gpu/check_device.py, each a function that gives rows of its table."""

import contextlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.gpu import check, measured, model, parts, step
from benchmarks.gpu import kernels as sweep
from sparse_jax import kernels as kernels_lib
from sparse_jax.kernels.gpu import shipped

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = 'CHECK_GPU_OUT'  # the environment's name of the folder that everything goes to


def _out() -> pathlib.Path:
    return pathlib.Path(os.environ[OUT])


class Row(NamedTuple):
    """One line of the table."""

    what: str
    result: str
    expected: str = ''
    right: bool | None = None  # None: a number without a bound


class Check(NamedTuple):
    """One process."""

    run: Callable[[bool], Iterator[Row]]  # of whether it is a dry run
    seconds: int  # that it may take


def kernels(dry: bool) -> Iterator[Row]:
    """Every block-sparse kernel against the reference in float32."""
    # on jax before 0.11 the interpreter knows no transposed operands
    names = ('forward',) if dry and jax.__version_info__ < (0, 11) else model.KERNELS
    blocks = ((64, 64),) if dry else ((64, 64), (32, 32), (128, 128))
    bound = check.BOUNDS[jnp.bfloat16]
    with kernels_lib.lowering_for('gpu', interpret=True) if dry else contextlib.nullcontext():
        for block in blocks:
            for shape in check.CHECKED[1:2] if dry else check.CHECKED:
                errors = {name: check.error(name, shape, block) for name in names}
                if block == (64, 64):
                    errors |= {f'{n}, compact': check.error(n, shape, block, is_compact=True) for n in names if n != 'scores'}
                wrong = {name: f'{error:.1e}' for name, error in errors.items() if not error <= bound}
                said = f'{len(errors)} kernels, largest error {max(errors.values()):.1e}' + (f', wrong: {wrong}' if wrong else '')
                yield Row(f'{shape.name}, {block[0]}x{block[1]}', said, f'at most {bound:.1e}', not wrong)


def products(dry: bool) -> Iterator[Row]:
    """Kernels beside cuBLAS and cuDNN, by the device's clock, and beside what was measured on an H200."""
    if dry:
        yield Row('times', 'mean nothing without a GPU')
        return
    from jax.experimental.mosaic.gpu import profiler

    def device_us(function: Callable, arguments: Sequence[Any]) -> float:
        times: Any = profiler.measure(jax.jit(function), iterations=9)(*arguments)[1]  # ms
        return 1e3 * statistics.median(times)

    for shape in model.SHAPES:
        for block in ((64, 64), (128, 128), (32, 32)):
            arrays, total = sweep.operands(shape, block, 0.9), [0.0, 0.0]
            for kernel in model.KERNELS:
                arguments = sweep.arguments(kernel, *arrays)
                dense = device_us(sweep.dense_product(kernel, shape), arguments)
                ours = device_us(model.function(kernel, shape, block)[0], arguments)
                if kernel != 'scores':
                    total = [total[0] + dense, total[1] + ours]
                sizes: dict[str, Any] = dict(
                    weights=math.prod(shape.w), is_matrix=shape.w[:2] == (1, 1), block=block[0], density=0.1
                )
                known = shipped.seconds('NVIDIA H200', kernel, shape.dense_operations, **sizes) if kernel != 'scores' else None
                said = f'{1e6 * known:.0f} us on an H200' if known else ''
                yield Row(f'{kernel}, {shape.name}, {block[0]}', f'{dense:.0f} / {ours:.0f} us', said)
            yield Row(f'all three, {shape.name}, {block[0]}', f'{total[0] / total[1]:.2f}x')


def step_of(name: str) -> Callable[[bool], Iterator[Row]]:
    """A check of the whole step of a model of benchmarks/gpu/step.py: measured beside predicted, dense and sparse, and PyTorch's."""

    def run(dry: bool) -> Iterator[Row]:
        methods = 'dense', 'sparse_momentum', 'sparse_momentum/compact'
        configs = {method: step.settings(name, method, 0.25 if dry else 0.1, 64) for method in methods}
        if not dry and (rival := step.torch_step(configs['dense'], sys.executable)):  # before our own process takes the memory
            yield Row(f'PyTorch {rival["torch"]}, dense', f'{rival["ms"]:.2f} ms, {rival["bytes"] / 1e9:.2f} GB')
        times = []
        for method, config in configs.items():
            config.sparsity.kernels = 'reference' if dry else 'gpu'
            one = measured.measure(config, rounds=1 if dry else 5, queued=1 if dry else 5)
            print(f'{parts.ASSUMED}\n\n{step.measured_table(one)}', flush=True)
            times.append(one.host)
            busy = sum(seconds for part, seconds in one.by_part.items() if part != measured.IDLE)
            predicted = f'{1e3 * one.counted.total.seconds:.2f} ms predicted'
            yield Row(method, f'{1e3 * one.host:.2f} ms; device {1e3 * busy:.2f} ms', predicted)
            slowest = sorted(one.by_part.items(), key=lambda x: -x[1])
            yield Row(f'{method}, device ms', ', '.join(f'{part} {1e3 * seconds:.2f}' for part, seconds in slowest))
            memory = 'not told' if one.memory is None else f'{one.memory / 1e9:.2f} GB'
            yield Row(f'{method}, memory', f'{memory}; compiled in {one.compile_seconds:.0f} s')
            yield Row(f'{method}, loss', f'{one.loss:.3f}', 'finite', math.isfinite(one.loss))
        yield Row('dense / sparse, dense / compact', f'{times[0] / times[1]:.2f}x, {times[0] / times[2]:.2f}x')

    return run


def _launch(folder: pathlib.Path, *flags: str) -> dict[str, Any]:
    """Runs launch.py to its end; gives its result, with its last speed."""
    command = [sys.executable, 'launch.py', f'--workdir={folder}', *flags]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise RuntimeError(f'launch.py ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}')
    result = json.loads((folder / 'result.json').read_text())
    speeds = [row['steps_per_second'] for line in (folder / 'metrics.jsonl').read_text().splitlines()
              if 'steps_per_second' in (row := json.loads(line))]  # fmt: skip
    return result | {'last_speed': speeds[-1]}


def train(dry: bool) -> Iterator[Row]:
    """The command of `make train`."""
    flags = ['--config=configs/mnist_lenet300.py:offline', *(['--config.train.steps=100'] if dry else [])]
    result = _launch(_out() / 'lenet', *flags)
    least = 0.0 if dry else 0.91
    accuracy, speed = result['test_accuracy'], f'{result["last_speed"]:.0f} steps/s'
    yield Row('test accuracy', f'{accuracy:.3f}, {speed}', f'at least {least}', accuracy >= least)
    yield Row('nonzeros', str(result['nonzeros']), '13310', result['nonzeros'] == 13310)


def runs_of(config: str, *flags: str, dry_flags: Sequence[str]) -> Callable[[bool], Iterator[Row]]:
    """A check of 200 steps of a config in blocks, sparse and dense."""

    def run(dry: bool) -> Iterator[Row]:
        speeds, name = {}, pathlib.Path(config.partition(':')[0]).stem
        length = ['--config.train.steps=200', '--config.train.eval_every=200', '--config.log.every=50']
        for method in ('sparse_momentum', 'dense'):
            common = ['--config.sparsity.granularity=block:64x64', '--config.sparsity.density=0.1'] if method != 'dense' else []
            settings = [f'--config.sparsity.method={method}', *common, *length, *flags, *(dry_flags if dry else ())]
            result = _launch(_out() / f'{name}_{method}', f'--config={config}', *settings)
            speeds[method] = result['last_speed']
            score = {
                key: round(value, 3) for key, value in result.items() if key in ('test_accuracy', 'test_loss', 'validation_loss')
            }
            yield Row(method, f'{speeds[method]:.1f} steps/s, {score}')
        yield Row('sparse / dense', f'{speeds["sparse_momentum"] / speeds["dense"]:.2f}x')

    return run


def resume(dry: bool) -> Iterator[Row]:
    """A run in blocks that is killed, and goes on: its last state has the bits of one that was not."""
    steps, every = (30, 10) if dry else (120, 30)
    width = 128 if dry else 512
    flags = [
        '--config=configs/lm_tiny.py', f'--config.model.dtype={"float32" if dry else "bfloat16"}', f'--config.model.features={width}', '--config.model.depth=2',
        f'--config.data.length={32 if dry else 64}', '--config.data.batch_size=8', '--config.data.validation=0.0005', '--config.sparsity.granularity=block:64x64',
        '--config.sparsity.density=0.25', '--config.optimizer.warmup_steps=10', f'--config.sparsity.kernels={"cpu" if dry else "gpu"}', f'--config.train.steps={steps}', f'--config.train.eval_every={steps}',
        '--config.sparsity.update_every=20', f'--config.sparsity.stop_step={steps}', f'--config.checkpoint.every={every}',
    ]  # fmt: skip
    if not dry:  # else XLA picks other algorithms in each process, some of which add up in any order
        flags_before = os.environ.get('XLA_FLAGS', '')
        os.environ['XLA_FLAGS'] = f'{flags_before} --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0'
    whole, killed = _out() / 'whole', _out() / 'killed'
    _launch(whole, *flags)
    command = [sys.executable, 'launch.py', f'--workdir={killed}', *flags]
    with subprocess.Popen(command, cwd=ROOT) as process:
        while not any((killed / 'checkpoints').glob('[1-9]*/commit_success.txt')) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    had = process.returncode != 0
    _launch(killed, *flags)
    files = [folder / 'checkpoints' / str(steps) / 'meta' / 'metadata' for folder in (whole, killed)]
    bits = [json.loads(file.read_text())['fingerprint'] for file in files]
    said = ('equal bits' if bits[0] == bits[1] else 'other bits') if had else 'was not killed in time'
    yield Row('killed after its first checkpoint', said, 'equal bits', had and bits[0] == bits[1])


_SMALL_TEXT = (
    '--config.train.steps=10', '--config.train.eval_every=10', '--config.data.length=32', '--config.data.batch_size=4', '--config.data.validation=0.0005',
    '--config.sparsity.update_every=5', '--config.sparsity.stop_step=8', '--config.log.every=5', '--config.optimizer.warmup_steps=5',
    '--config.model.dtype=float32', '--config.model.features=128', '--config.model.heads=2', '--config.model.depth=2',
    '--config.sparsity.density=0.25', '--config.sparsity.kernels=cpu',
)  # fmt: skip
_SMALL_IMAGES = (
    '--config.train.steps=4', '--config.train.eval_every=4', '--config.data.batch_size=8', '--config.data.eval_batch_size=100',
    '--config.sparsity.update_every=2', '--config.log.every=2', '--config.model.dtype=float32', '--config.model.name=lenet5', '--config.sparsity.dense=conv1/*',
    '--config.sparsity.granularity=block:8x8', '--config.sparsity.kernels=cpu',
)  # fmt: skip
CHECKS = {  # the most telling ones first
    'kernels': Check(kernels, 180),
    'step lm_2048': Check(step_of('lm_2048'), 240),
    'make train': Check(train, 180),
    'resume': Check(resume, 180),
    'lm_tiny': Check(runs_of(
        'configs/lm_tiny.py', '--config.model.dtype=bfloat16', '--config.model.features=512', '--config.model.heads=8', dry_flags=_SMALL_TEXT,
    ), 150),
    'vgg_d': Check(runs_of(
        'configs/cifar10_vgg_d.py:offline', '--config.model.dtype=bfloat16', '--config.data.batch_size=128', '--config.sparsity.dense=conv1_1/*,out/*',
        dry_flags=_SMALL_IMAGES,
    ), 180),
    'step lm_4096': Check(step_of('lm_4096'), 240),
    'products': Check(products, 240),
}  # fmt: skip
DRY = {'step lm_2048': step_of('lm_128'), 'step lm_4096': lambda _: iter([Row('', 'left out of a dry run')])}
