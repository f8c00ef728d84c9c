"""The cases: each kind makes a program, as text, from random numbers. A program that goes wrong is printed as it is."""

import ast
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparse_jax import config as config_lib
from sparse_jax import data, models
from sparse_jax.core import methods


def _pick(random: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[random.integers(len(values))]


# ------------------------------------------------------------------------------------------------------------------------- settings

_WHOLE = (-(2**63), -(2**31), -7, -2, -1, 0, 1, 2, 3, 7, 10, 64, 1000, 4001, 2**31 - 1, 2**31, 2**32, 2**63, 10**30)
_REAL = ('-inf', 'inf', 'nan', -1.0, -0.0, 0.0, 1e-300, 1e-45, 1e-7, 0.05, 0.5, 0.999999999, 1.0, 1.0000001, 2.0, 1e30, 1e300)
_TEXT = (
    '',
    'none',
    'None',
    'x',
    '*',
    '/',
    '../..',
    'é',
    '\0',
    '\n',
    '$x',
    '\udcff',
    ';',
    'a=b',
    '=',
    ',',
    'fc1/*',
    'a' * 300,
    '0',
    '{}',
    '%s',
)
_WRONG = (None, True, 1, 0.5, '1', b'1', [], {}, (1,), [0.5])
_KNOWN = {
    'model.name': models.names(), 'model.dtype': ('float32', 'bfloat16', 'float16', 'int32', 'float64'), 'model.layout': ('auto', 'channels', 'lanes'),
    'data.name': data.NAMES, 'optimizer.name': ('sgd', 'adamw', 'lion'), 'optimizer.schedule': ('step', 'cosine', 'constant'),
    'sparsity.method': (*methods.NAMES, 'snip', 'grasp', 'synflow', 'dense'), 'sparsity.storage': ('dense', 'compact'), 'sparsity.prune': ('magnitude', 'signed_magnitude', 'taylor', 'none'),
    'sparsity.grow': ('momentum', 'gradient', 'random', 'none'), 'sparsity.redistribute': ('mean_momentum', 'nonzeros', 'none'),
    'sparsity.distribution': ('uniform', 'erk', 'erdos_renyi'), 'sparsity.kernels': ('auto', 'dense', 'reference', 'cpu', 'gpu', 'tpu'),
    'sparsity.granularity': ('unstructured', 'block:4x4', 'block:0x4', 'block:4x', 'block:1x1:kernel', 'block:-1x2', 'block:999x999'),
    'sparsity.dense': ('fc1/*', 'fc3/kernel,fc2/*', '*', 'nothing/*'), 'mesh.layout': ('data', 'model', 'fsdp'),
    'mesh.rules': ('fc1/kernel=none,model', 'fc1/kernel=data', '*=none', 'fc1/kernel=nowhere'),
}  # fmt: skip


def _value(random: np.random.Generator, name: str, default: Any) -> Any:
    if random.random() < 0.15:
        return _pick(random, _WRONG)
    if name in _KNOWN and random.random() < 0.7:
        return _pick(random, _KNOWN[name])
    if isinstance(default, bool):
        return _pick(random, (True, False, 'False', 0, 2))
    if isinstance(default, int) or default is None:
        return _pick(random, _WHOLE)
    if isinstance(default, float):
        return _pick(random, _REAL)
    return _pick(random, _TEXT)


def _literal(value: Any) -> str:
    return f"float('{value}')" if value in ('inf', '-inf', 'nan') else ascii(value)


def settings(random: np.random.Generator) -> str:
    """A config with a few settings that are at an end of their range, beyond it, of another type, or unusual."""
    flat = {name: value for name, value in config_lib.flatten(config_lib.Config()).items() if name != 'data.download'}
    names = random.choice(sorted(flat), size=random.integers(1, 4), replace=False)
    config = _pick(random, ('mnist_lenet300', 'mnist_lenet300', 'mnist_lenet5', 'cifar10_vgg_like', 'lm_tiny'))
    lines = [f'config = configs.{config}.get_config({"" if config == "lm_tiny" else repr("offline")})', 'config.train.steps = 2']
    lines += [f'config.{name} = {_literal(_value(random, name, flat[name]))}' for name in names]
    if config == 'mnist_lenet300' and random.random() < 0.1:
        lines += ['result = train.train(config, folder)', 'assert result["steps"] == config.train.steps']
    else:
        lines += ['train_run.check_identity(config, folder)', 'run = train_run.prepare(config, folder)']
        lines += ['assert not folder.exists() and run.experiment.total_steps >= 1']
    return '\n'.join(lines)


# ------------------------------------------------------------------------------------------------------------------------------- API

_SHAPES = ((), (0,), (1,), (3,), (0, 4), (1, 1), (1, 9), (8, 8), (16, 12), (3, 3, 4, 8), (1, 1, 1, 1), (2, 8, 8), (2, 0))
_ARGUMENTS: dict[str, Sequence[Any]] = {
    'density': ('-inf', 'nan', -0.5, 0, 0.0, 1e-9, 0.01, 0.3, 0.5, 1, 1.0, 1.5, None, 'half', True, [0.5]),
    'update_every': (-1, 0, 1, 2, 3, 2.0, None, 'often', 2**31, True),
    'total_steps': (-1, 0, 1, 4, 6, 100, 2**31 - 1, 2**31, None, 6.5),
    'prune': ('magnitude', 'taylor', 'signed_magnitude', 'nothing', None, 3),
    'grow': ('momentum', 'gradient', 'random', 'nothing', None, 3),
    'redistribute': ('mean_momentum', 'nonzeros', 'nothing', None, 3),
    'prune_rate': (-0.1, 0, 0.0, 0.5, 1, 1.0, 1.5, 'nan', None, 'fast'),
    'prune_scope': ('layer', 'global', 'none', None), 'start_step': (-1, 0, 1, 3, 2**31, 1.5, None), 'stop_step': (-1, 0, 1, 3, 2**31, None, 'end'),
    'distribution': ('uniform', 'erk', 'erdos_renyi', 'none', {}, {'w': 0.5}, {'nowhere': 0.5}, None, 3),
    'granularity': ('unstructured', 'block:4x4', 'block:0x1', 'block:2x2:kernel', 'block', None, 3),
    'dense': ((), ('w',), ('*',), ('nothing',), 'w', None, (3,)), 'momentum': (None, 'trace', 'nothing', 3), 'track_exploration': (True, False, None, 'yes'),
    'seed': (0, -1, 2**31, 2**64, 'a', None, 1.5),
}  # fmt: skip
_INNER = (
    'optax.sgd(0.1)',
    'optax.sgd(0.1, momentum=0.9)',
    'optax.adam(1e-3)',
    'optax.lion(1e-3)',
    'optax.adafactor(1e-3)',
    'optax.identity()',
)


def api(random: np.random.Generator) -> str:
    """An optimizer with unusual arguments over unusual arrays, for some steps: the budget holds, or one argument is told."""
    arguments = {'density': 0.3, 'update_every': 2, 'total_steps': 8}
    for name in random.choice(sorted(_ARGUMENTS), size=random.integers(0, 3), replace=False):
        arguments[name] = _pick(random, _ARGUMENTS[name])
    called = 'sj.sparsify'
    if random.random() < 0.4:
        called = f'sj.methods.{_pick(random, [name.replace("set", "set_") if name == "set" else name for name in methods.NAMES])}'
    if called.endswith('sparse_momentum'):
        arguments = {
            name: value for name, value in arguments.items() if name not in ('prune', 'grow', 'redistribute', 'prune_scope')
        }
        inner = '0.1'
    else:
        inner = _pick(random, _INNER)
    given = ', '.join(f'{name}={_literal(value)}' for name, value in arguments.items())
    dtype = _pick(random, ('float32',) * 5 + ('bfloat16', 'float16', 'int32', 'complex64'))
    shapes = [_pick(random, _SHAPES) for _ in range(random.integers(0, 4))]
    special = _pick(random, ('',) * 6 + ('nan', 'inf', '0', '1e38'))
    lines = [f'params = {{name: jnp.asarray(random.normal(size=shape), {dtype!r}) for name, shape in zip("wab", {shapes})}}']
    lines += [f'tx = {called}({inner}, {given})', 'state = tx.init(params)', 'params = sj.apply_masks(params, sj.get_masks(state))']
    lines += ['before, step = sj.stats.nonzeros(state), jax.jit(tx.update)', 'for _ in range(5):']
    gradient = f"float('{special}')" if special else 'random.normal()'
    lines += [f'    grads = jax.tree.map(lambda p: p * 0.5 + jnp.asarray({gradient}, p.dtype), params)']
    lines += ['    updates, state = step(grads, state, params)', '    params = optax.apply_updates(params, updates)']
    if special in ('', '0'):
        lines += ['sj.check_sparse(params, state)']
    if not called.endswith(('gmp', 'granet')):
        lines += ['assert sum(sj.stats.nonzeros(state).values()) == sum(before.values())']
    return '\n'.join(lines)


def calls(random: np.random.Generator) -> str:
    """A product with arguments that do not fit, or a pattern from something that is no mask."""
    shape = _pick(random, ('(8, 8)', '(0, 8)', '(8, 0)', '(3, 3, 4, 8)', '(8,)', '()', '(2, 2, 2, 2, 2)'))
    mask = f'np.random.default_rng(0).random({shape}) < 0.5'
    options = {
        'granularity': ('block:4x4', 'block:3x3', 'none', 3), 'implementation': ('reference', 'cpu', 'gpu', 'tpu', 'none', 'dense', 3),
        'at_least': (-1, 0, 100, 2**31, 'a', 1.5), 'block': ((4, 4), (0, 4), (4,), 4, (2**31, 1)),
    }  # fmt: skip
    name = _pick(random, sorted(options))
    given = f', {name}={_literal(_pick(random, options[name]))}' if random.random() < 0.6 else ''
    lines = [
        f'pattern = k.make_pattern({_pick(random, (mask, mask, mask, "jnp.ones((4, 4))", "None", repr("mask"), "[[True]]"))}{given})'
    ]
    x = _pick(random, ('(5, 8)', '(8,)', '(5, 7)', '(0, 8)', '(2, 5, 5, 4)', '(2, 0, 5, 4)', '(5, 5, 4)', '()'))
    dtype = _pick(random, ('float32', 'float32', 'bfloat16', 'int32'))
    weight = _pick(random, (shape, shape, shape, '(8, 7)', '(4, 4)'))
    call = _pick(random, ('sparse_dot', 'sparse_dot', 'sparse_conv'))
    extra = ''
    if call == 'sparse_conv':
        extra = _pick(
            random,
            (
                '',
                ', strides=(0, 1)',
                ', strides=2',
                ', padding="SAM"',
                ', padding=((1, 1),)',
                ', padding=-1',
                ', dilation=(1, -1)',
                ', groups=0',
                ', groups=3',
            ),
        )
    lines += [
        f'x, w = jnp.ones({x}, {dtype!r}), jnp.ones({weight}, {dtype!r}) * (pattern.to_mask() if hasattr(pattern, "to_mask") else 1)'
    ]
    return '\n'.join([*lines, f'jax.block_until_ready(k.{call}(x, w, pattern{extra}))'])


# --------------------------------------------------------------------------------------------------------------------------- kernels

_EXTENTS = (1, 1, 1, 2, 3, 4, 7, 16, 17)
_CHANNELS = (1, 1, 2, 3, 8, 16, 33, 300)


def kernels(random: np.random.Generator) -> str:
    """A product of extreme shape by the CPU kernels, with both gradients, against one in float64."""
    some = functools.partial(_pick, random)
    density, dense = some((0.0, 0.01, 0.2, 0.5, 1.0)), random.random() < 0.3
    gradients = f'dense_gradient={dense}'
    if random.random() < 0.25:
        x, w = (some((0, 1, 1, 2, 5, 64)), some(_CHANNELS)), some(_CHANNELS)
        return f'check_dot({x[0]}, {x[1]}, {w}, density={density}, {gradients})'
    n, height, width = some((1, 1, 2, 3, 16)), some(_EXTENTS), some(_EXTENTS)
    inputs, outputs = some(_CHANNELS), some(_CHANNELS)
    if inputs * outputs > 10_000:
        outputs = 3
    taps = some((1, 1, 2, 3, 5)), some((1, 2, 3, 3))
    strides, dilation = (some((1, 1, 2, 3, 9)), some((1, 1, 2, 5, 40))), (some((1, 1, 1, 2, 9)), some((1, 1, 1, 3)))
    padding = some(("'SAME'", "'VALID'", str(tuple((int(random.integers(0, 5)), int(random.integers(0, 12))) for _ in range(2)))))
    geometry = f'strides={strides}, padding={padding}, dilation={dilation}'
    return f'check_conv({n, height, width, inputs}, {(*taps, inputs, outputs)}, density={density}, {geometry}, {gradients})'


# -------------------------------------------------------------------------------------------------------------------------- workdirs

_CONTENTS = (
    '',
    'null',
    '[]',
    '{}',
    '"text"',
    '0',
    '[' * 5000,
    '{"step": 3',
    '\xff\xfe\0',
    '{"seed": null}',
    '{"fingerprint": 1}',
    '\n\n',
    'NaN',
)


def workdirs(random: np.random.Generator) -> str:
    """One or two of a finished run's files are lost, cut, overwritten, renamed, or a folder; then the same command again, or a report."""
    lines = ['copy_finished_run(folder)']
    part = lambda: f'{min(float(random.random()), 0.999):.3f}'  # below 1
    for _ in range(random.integers(1, 3)):
        where = part()
        do = _pick(random, ('remove', 'empty', 'cut', 'flip', 'folder', 'rename', 'write', 'write', 'remove_step'))
        extra = f', {_pick(random, _CONTENTS)!a}' if do == 'write' else f', {part()}' if do in ('cut', 'flip') else ''
        lines.append(f'damage.{do}(folder, {where}{extra})')
    if random.random() < 0.5:
        lines.append('damage.unfinish(folder)')
    after = (
        'check_result(train.train(finished_config(), folder))',
        'write_report(folder.parent)',
        'check_evaluation(train.evaluate(finished_config(), folder))',
    )
    return '\n'.join([*lines, _pick(random, (after[0], after[0], *after[1:]))])


KINDS: dict[str, Callable[[np.random.Generator], str]] = {
    'settings': settings, 'api': api, 'calls': calls, 'kernels': kernels, 'workdirs': workdirs,
}  # fmt: skip


def names_in(program: str) -> set[str]:
    """What a message about a program may name: its keyword arguments, the settings and variables that it sets, and what it calls."""
    found = set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found


def program(kind: str, seed: int, number: int) -> str:
    """The case of a kind with this number."""
    return KINDS[kind](np.random.default_rng((seed, list(KINDS).index(kind), number)))
