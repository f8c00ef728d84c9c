"""A whole training step on a GPU, by part: predicted from the compiled program on a machine without one, dense and sparse.

    python -m benchmarks.gpu.step --predict                                # a Transformer of 4 layers x 2048
    python -m benchmarks.gpu.step --predict --model=lm_4096 --lines=20     # and where in the source the bytes come from
    python -m benchmarks.gpu.step --predict --model=vgg_d --block=64 --density=0.1

Each kernel takes the longer of its bytes and its operations, plus a launch; sparse products the time that was measured on an H200, or
is interpolated between such times (sparse_jax/kernels/gpu/measured). Which rates are assumed stands in one line above the table.
"""

import argparse
import collections
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.gpu import program
from configs import lm_tiny
from sparse_jax import config as config_lib
from sparse_jax.aot import compile_only, lowering
from sparse_jax.kernels.gpu import shipped

MEMORY = 4.0e12  # bytes a second that large elementwise kernels reach on an H200
DENSE = 750e12  # operations a second of dense products in bfloat16
LAUNCH = 3e-6  # seconds between two kernels
DEVICE = 'NVIDIA H200'  # whose sparse products were measured
LANGUAGE_MODELS = {'lm_2048': (4, 2048, 16, 512), 'lm_4096': (4, 4096, 8, 1024)}  # layers, features, sequences and their length
_SMALL = {'vgg_d': 'conv1_1/*,out/*', 'wrn_16_8': 'conv/*,out/*'}  # layers that are smaller than a block
MODELS = (*LANGUAGE_MODELS, 'lm_350m', *_SMALL)


class Part(NamedTuple):
    """What one part of a step takes."""

    kernels: int
    operations: float
    bytes: int
    seconds: float


class Step(NamedTuple):
    """A whole step as it was compiled."""

    parts: dict[str, Part]
    lines: list[tuple[str, str, Part]]  # by part and line of the source, the slowest first
    temporary: int  # bytes
    compile_seconds: float

    @property
    def total(self) -> Part:
        return _sum(self.parts.values())


def settings(model: str, method: str, density: float, block: int, remat: str = 'none') -> config_lib.Config:
    """The config of a benchmark's run."""
    if model in LANGUAGE_MODELS:
        config = lm_tiny.get_config()
        depth, features, sequences, length = LANGUAGE_MODELS[model]
        config.model.depth, config.model.features, config.model.heads = depth, features, features // 128
        config.data.batch_size, config.data.length = sequences, length
        config.model.remat = remat
    elif model == 'lm_350m':
        from configs import lm_350m

        config = lm_350m.get_config()
        config.data.name, config.data.batch_size, config.train.accumulate = 'stdlib', 32, 1
        config.model.remat = remat
    else:
        import importlib

        config = importlib.import_module(f'configs.cifar10_{model}').get_config('offline')
        config.data.batch_size = 128
        config.sparsity.dense = '' if method == 'dense' else _SMALL[model]
    config.model.dtype, config.sparsity.method = 'bfloat16', method
    if method != 'dense':
        config.sparsity.density, config.sparsity.granularity = density, f'block:{block}x{block}'
    return config


def predict(config: config_lib.Config) -> Step:
    """Compiles a config's ordinary step for a GPU and counts what it takes.

    Raises:
      ValueError: where nothing can be compiled for a GPU here.
    """
    begin = time.perf_counter()
    lowered = lowering.lower(config, 'cuda')
    seconds = time.perf_counter() - begin
    if lowered.why_not_compiled or lowered.memory is None:
        raise ValueError(f'nothing can be compiled for a GPU here: {lowered.why_not_compiled}.')
    kernels = program.kernels(lowered.compiled_text)
    density = 1.0 if config.sparsity.method == 'dense' else config.sparsity.density
    block = 0 if config.sparsity.method == 'dense' else int(config.sparsity.granularity.rpartition('x')[2])
    parts, lines = collections.defaultdict(list), collections.defaultdict(list)
    for kernel in kernels:
        one = _part(kernel, density, block)
        parts[kernel.part].append(one)
        lines[kernel.part, kernel.line].append(one)
    by_line = sorted(((*key, _sum(rows)) for key, rows in lines.items()), key=lambda row: -row[2].seconds)
    ordered = {name: _sum(parts[name]) for name in program.PARTS if parts[name]}
    return Step(ordered, by_line, lowered.memory['temporary'], seconds)


def _part(kernel: program.Kernel, density: float, block: int) -> Part:
    operations, moved = kernel.operations, kernel.bytes
    if kernel.kind:
        operations, moved, seconds = _sparse(kernel, density, block)
    else:
        seconds = max(moved / MEMORY, operations / DENSE)
    return Part(kernel.count, kernel.count * operations, kernel.count * moved, kernel.count * (seconds + LAUNCH))


def _sparse(kernel: program.Kernel, density: float, block: int) -> tuple[float, int, float]:
    """Operations, bytes and seconds of a sparse product."""
    first, second, *_, result = kernel.shapes
    is_partial = kernel.kind == 'weight_gradient' and len(result) == 4  # [parts, units, inputs, outputs], added up after the kernel
    if is_partial:
        weights = kernel.shapes[4][-1] * first[-1] * second[-1]  # the table of pixels has a column for each tap
    elif kernel.kind == 'weight_gradient':
        weights = math.prod(result)
    else:
        weights = math.prod(second)
    over = {'forward': result, 'input_gradient': first, 'weight_gradient': second}[kernel.kind]
    operations = 2.0 * math.prod(over[:-1]) * weights * density
    moved = 2 * (math.prod(first) + (math.prod(second) if kernel.kind == 'weight_gradient' else density * weights))
    moved = round(moved + (4 * result[0] * density * weights if is_partial else 2 * math.prod(result)))
    is_matrix = first[1] == 1
    measured = shipped.seconds(
        DEVICE, kernel.kind, operations / density, weights=weights, is_matrix=is_matrix, block=block, density=density
    )
    if measured is None:
        raise ValueError(f'{kernel.name}: no {kernel.kind} in blocks of {block} was measured on {DEVICE}.')
    return operations, moved, max(measured, moved / MEMORY)


def _sum(rows) -> Part:
    rows = list(rows)
    return Part(*(sum(row[i] for row in rows) for i in range(4)))  # pyright: ignore[reportArgumentType]


def _row(name: str, part: Part) -> str:
    return f'| {name} | {part.kernels:,} | {part.operations / 1e12:.2f} | {part.bytes / 1e9:.2f} | {1e3 * part.seconds:.2f} |'


def table(title: str, step: Step, lines: int = 0) -> str:
    """A step's parts in Markdown, and the lines of the source that take longest."""
    text = [f'{title}: temporary memory {step.temporary / 1e9:.2f} GB, compiled in {step.compile_seconds:.0f} s', '']
    text += ['| part | kernels | TFLOP | GB | ms |', '|---|---:|---:|---:|---:|']
    text += [_row(name, part) for name, part in step.parts.items()] + [_row('**all**', step.total)]
    for part, line, row in step.lines[:lines]:
        text.append(_row(f'{part}: {line}', row))
    return '\n'.join(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--predict', action='store_true', help='compile here, for a GPU that need not be there')
    parser.add_argument('--model', default='lm_2048', choices=MODELS)
    parser.add_argument('--density', type=float, default=0.1)
    parser.add_argument('--block', type=int, default=64, choices=(32, 64, 128))
    parser.add_argument('--remat', default='none', choices=('none', 'products', 'all'))
    parser.add_argument('--methods', default='dense,sparse_momentum')
    parser.add_argument('--lines', type=int, default=0, help='how many lines of the source to list')
    args = parser.parse_args(arguments)
    if not args.predict:
        parser.error('give --predict.')
    if reason := compile_only.unavailable('gpu'):
        parser.error(f'nothing can be compiled for a GPU here: {reason}.')
    print(
        f'assumed: {MEMORY / 1e12:g} TB/s, dense products {DENSE / 1e12:g} TFLOP/s, {1e6 * LAUNCH:g} us a kernel, sparse products as measured '
        f'on {DEVICE}\n'
    )
    steps = {}
    for method in args.methods.split(','):
        steps[method] = predict(settings(args.model, method, args.density, args.block, args.remat))
        print(table(f'{args.model}, {method}', steps[method], args.lines), end='\n\n', flush=True)
    times = [step.total.seconds for step in steps.values()]
    if len(times) > 1:
        print(f'{times[0] / times[1]:.2f}x')


if __name__ == '__main__':
    main()
