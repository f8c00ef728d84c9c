"""A whole training step on a GPU, by part: predicted from the compiled program, on a machine without one, or measured; dense and sparse.

    python -m benchmarks.gpu.step --predict                                # a Transformer of 4 layers x 2048
    python -m benchmarks.gpu.step --predict --model=lm_4096 --lines=20     # and where in the source the bytes come from
    python -m benchmarks.gpu.step --predict --model=vgg_d --block=64 --density=0.1
    python -m benchmarks.gpu.step --predict --program=FILE --host_ms=9.3   # a program that XLA has dumped
    python -m benchmarks.gpu.step --measure                                # on a GPU; beside PyTorch, where that is installed

Which rates are assumed stands in one line above the table. A prediction is the device's time: while it is busy, the loop of launch.py
prepares the next step. --host_ms adds what a host takes where it does not. --measure has the device's time by part from the profiler;
PyTorch's step is the same network, compiled, with its flash attention and fused AdamW (benchmarks/gpu/torch_step.py). --image draws it.
"""

import argparse
import atexit
import functools
import importlib
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from absl import logging

from benchmarks.gpu import measured, parts, program
from benchmarks.gpu.parts import Part
from configs import lm_350m, lm_tiny
from sparse_jax import config as config_lib
from sparse_jax.aot import compile_only, lowering

LANGUAGE_MODELS = {  # layers, features, sequences and their length
    'lm_2048': (4, 2048, 16, 512),
    'lm_4096': (4, 4096, 8, 1024),
    'lm_128': (2, 128, 2, 64),
}
_SMALL = {
    'vgg_d': 'conv1_1/*,out/*',
    'wrn_16_8': 'conv/*,fc/*,block1_1/conv1/*,block1_1/shortcut/*',
}  # layers that are smaller than a block
MODELS = (*LANGUAGE_MODELS, 'lm_350m', *_SMALL)


def settings(model: str, method: str, density: float, block: int, remat: str = 'none') -> config_lib.Config:
    """The config of a benchmark's run; a method with '/compact' behind it is trained with compact storage."""
    method, _, storage = method.partition('/')
    if model in LANGUAGE_MODELS:
        config = lm_tiny.get_config()
        depth, features, sequences, length = LANGUAGE_MODELS[model]
        config.model.depth, config.model.features, config.model.heads = depth, features, max(2, features // 128)
        config.data.batch_size, config.data.length = sequences, length
        config.model.remat = remat
    elif model == 'lm_350m':
        config = lm_350m.get_config()
        config.data.dir, config.data.tokenizer = _made_up_text(50_257, words=3_000_000)
        config.data.batch_size, config.train.accumulate = 32, 1
        config.model.remat = remat
    else:
        config = importlib.import_module(f'configs.cifar10_{model}').get_config('offline')
        config.data.batch_size = 128
        config.sparsity.dense = '' if method == 'dense' else _SMALL[model]
    config.model.dtype, config.sparsity.method, config.mesh.data, config.mesh.model = 'bfloat16', method, 1, 1
    if method != 'dense':
        config.sparsity.density, config.sparsity.granularity = density, f'block:{block}x{block}'
        config.sparsity.storage = storage or 'dense'
    return config


@functools.cache
def _made_up_text(vocabulary: int, words: int) -> tuple[str, str]:
    """A folder of words and a tokenizer that knows as many: only their numbers decide a program."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix='made_up_text'))
    atexit.register(shutil.rmtree, folder)
    for i in range(40):
        (folder / f'{i}.txt').write_text('w0 ' * (words // 40))
    tokens = {f'w{i}': i for i in range(vocabulary)}
    model = {'type': 'WordLevel', 'vocab': tokens, 'unk_token': 'w0'}
    (folder / 'tokenizer.json').write_text(
        json.dumps({'version': '1.0', 'added_tokens': [], 'pre_tokenizer': {'type': 'Whitespace'}, 'model': model})
    )
    return str(folder), str(folder / 'tokenizer.json')


def predict(config: config_lib.Config) -> tuple[parts.Step, str]:
    """Compiles a config's ordinary step for a GPU and counts what it takes; and what is to be said of its program.

    Raises:
      ValueError: where nothing can be compiled for a GPU here.
    """
    begin = time.perf_counter()
    lowered = lowering.lower(config, 'cuda')
    seconds = time.perf_counter() - begin
    if lowered.why_not_compiled or lowered.memory is None:
        raise ValueError(f'nothing can be compiled for a GPU here: {lowered.why_not_compiled}.')
    is_dense = config.sparsity.method == 'dense'
    block = 0 if is_dense else int(config.sparsity.granularity.rpartition('x')[2])
    counted = parts.count(lowered.compiled_text, 1.0 if is_dense else config.sparsity.density, block)
    return counted, f'temporary memory {lowered.memory["temporary"] / 1e9:.2f} GB, compiled in {seconds:.0f} s'


def _row(name: str, part: Part, *more: str) -> str:
    cells = [
        name,
        f'{part.kernels:,}',
        f'{part.operations / 1e12:.2f}',
        f'{part.bytes / 1e9:.2f}',
        f'{1e3 * part.seconds:.2f}',
        *more,
    ]
    return '| ' + ' | '.join(cells) + ' |'


def table(step: parts.Step, lines: int = 0, host: float = 0.0) -> str:
    """A predicted step's parts in Markdown, and the lines of the source that take longest."""
    text = ['| part | kernels | TFLOP | GB | ms |', '|---|---:|---:|---:|---:|']
    text += [_row(name, part) for name, part in step.parts.items()]
    if host:
        text.append(_row('host, while the device waits', Part(0, 0.0, 0, host)))
    text.append(_row('**all**', step.total._replace(seconds=step.total.seconds + host)))
    for part, line, row in step.lines[:lines]:
        text.append(_row(f'{part}: {line}', row))
    return '\n'.join(text)


def measured_table(step: measured.Measured) -> str:
    """A measured step's parts in Markdown, predicted beside."""
    text = ['| part | kernels | TFLOP | GB | predicted ms | measured ms |', '|---|---:|---:|---:|---:|---:|']
    took = dict(step.by_part)
    text += [_row(name, part, f'{1e3 * took.pop(name, 0.0):.2f}') for name, part in step.counted.parts.items()]
    text += [f'| {name} | | | | | {1e3 * seconds:.2f} |' for name, seconds in took.items()]
    text.append(_row('**all**', step.counted.total, f'{1e3 * sum(step.by_part.values()):.2f}'))
    text.append(f"| by the host's clock | | | | | {1e3 * step.host:.2f} |")
    return '\n'.join(text)


def torch_step(config: config_lib.Config, python: str, timeout: float = 300.0) -> dict[str, Any] | None:
    """What benchmarks/gpu/torch_step.py measures for the same Transformer; None where there is no PyTorch, or another network."""
    has_torch = python != sys.executable or importlib.util.find_spec('torch') is not None
    if config.model.name != 'transformer' or not has_torch:
        return None
    sizes = config.model.depth, config.model.features, config.model.heads, config.data.batch_size, config.data.length
    script = pathlib.Path(__file__).with_name('torch_step.py')
    done = subprocess.run([python, script, *map(str, sizes)], capture_output=True, text=True, check=False, timeout=timeout)
    if done.returncode:
        print(f'PyTorch: {done.stderr.strip().splitlines()[-1:]}', file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def draw(steps: dict[str, dict[str, float]], title: str, path: pathlib.Path) -> None:
    """One bar a step, made of its parts (seconds by name), as a picture."""
    figure, axes = plt.subplots(figsize=(9, 0.7 * len(steps) + 2.2), layout='constrained')
    order = [*program.PARTS, measured.OTHER, measured.IDLE]
    names = sorted({name for step in steps.values() for name in step}, key=order.index)
    left = dict.fromkeys(steps, 0.0)
    for name in names:
        widths = [1e3 * step.get(name, 0.0) for step in steps.values()]
        color = '#cccccc' if name == measured.IDLE else f'C{order.index(name)}'
        axes.barh(list(steps), widths, left=list(left.values()), color=color, label=name)
        left = {key: left[key] + width for key, width in zip(left, widths, strict=True)}
    for i, total in enumerate(left.values()):
        axes.text(total, i, f' {total:.1f}', va='center')
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left.values()))
    axes.set_xlabel('milliseconds a step')
    axes.set_title(title)
    axes.grid(axis='x', alpha=0.3)
    figure.legend(loc='outside lower center', ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--predict', action='store_true', help='compile here, for a GPU that need not be there')
    what.add_argument('--measure', action='store_true', help='on the GPU that is here')
    parser.add_argument('--model', default='lm_2048', choices=MODELS)
    parser.add_argument('--density', type=float, default=0.1)
    parser.add_argument('--block', type=int, default=64, choices=(32, 64, 128))
    parser.add_argument('--remat', default='none', choices=('none', 'products', 'all'))
    parser.add_argument('--methods', default='dense,sparse_momentum', help='sparse_momentum/compact: with compact storage')
    parser.add_argument('--lines', type=int, default=0, help='how many lines of the source to list')
    parser.add_argument('--program', type=pathlib.Path, help='count this text of an optimised program instead of a model')
    parser.add_argument('--host_ms', type=float, default=0.0, help='what a host adds to each step, while the device waits')
    parser.add_argument('--torch_python', default=sys.executable, help='a Python that has PyTorch')
    parser.add_argument('--image', type=pathlib.Path, help='draws the steps by part')
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)  # tokamax warns of every call that it has not tuned on a device that is not here
    if not 0 < args.density <= 1:
        parser.error(f'--density={args.density}: must be in (0, 1].')
    if args.program and not args.program.is_file():
        parser.error(f'--program={args.program} is not a file.')
    if args.program is None and args.predict and (reason := compile_only.unavailable('gpu')):
        parser.error(f'nothing can be compiled for a GPU here: {reason}.')
    if args.measure and (reason := measured.no_gpu()):
        parser.error(f'{reason}: --predict needs none.')
    print(parts.ASSUMED + '\n')
    try:
        if args.program:
            print(table(parts.count(args.program.read_text(), args.density, args.block), args.lines, args.host_ms * 1e-3))
        else:
            _print_steps(args)
    except ValueError as error:
        parser.error(str(error))


def _print_steps(args: argparse.Namespace) -> None:
    """Each method's step, and how they compare."""
    configs = {name: settings(args.model, name, args.density, args.block, args.remat) for name in args.methods.split(',')}
    rival = torch_step(next(iter(configs.values())), args.torch_python) if args.measure else None
    drawn, times = {}, []
    for method, config in configs.items():
        if args.predict:
            step, said = predict(config)
            text, drawn[method] = table(step, args.lines, args.host_ms * 1e-3), {k: x.seconds for k, x in step.parts.items()}
            times.append(step.total.seconds)
        else:
            step = measured.measure(config)
            said = f'peak memory {(step.memory or 0) / 1e9:.2f} GB, compiled in {step.compile_seconds:.0f} s'
            text, drawn[method] = measured_table(step), step.by_part
            times.append(step.host)
        print(f'{args.model}, {method}: {said}\n\n{text}\n', flush=True)
    if rival:
        print(f'PyTorch {rival["torch"]}, dense: {rival["ms"]:.2f} ms, peak memory {rival["bytes"] / 1e9:.2f} GB\n')
    if len(times) > 1:
        print(f'{times[0] / times[1]:.2f}x')
    if args.image:
        draw(drawn, f'{args.model}, {"predicted" if args.predict else "measured"}', args.image)


if __name__ == '__main__':
    main()
