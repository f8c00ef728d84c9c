"""What the programs of the fuzzer find around them: modules, oracles, and a finished run to damage."""

import contextlib
import functools
import io
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax as sj
from configs import cifar10_vgg_like, lm_tiny, mnist_lenet5, mnist_lenet300
from sparse_jax import data as data_lib
from sparse_jax import kernels, train
from sparse_jax.report.write import write_report
from sparse_jax.train import run as train_run


def _cached(load: Callable[..., Any]) -> Callable[..., Any]:
    """Reads each data set once: thousands of programs name the same few."""
    kept: dict[str, Any] = {}

    def cached(*args, **options):
        key = repr((args, options))
        if key not in kept:
            kept[key] = load(*args, **options)
        return kept[key]

    return cached


def prepare() -> None:
    """What holds for all programs of a process."""
    data_lib.load = _cached(data_lib.load)


def check_dot(rows: int, inputs: int, outputs: int, *, density: float, dense_gradient: bool) -> None:
    """sparse_dot and both its gradients against float64."""
    random = np.random.default_rng(rows + 7 * inputs + 11 * outputs)
    mask = random.random((inputs, outputs)) < density
    x, w, dy = (random.normal(size=shape) for shape in ((rows, inputs), (inputs, outputs), (rows, outputs)))
    w = np.where(mask, w, 0)
    pattern = kernels.make_pattern(mask, implementation='cpu')
    product = functools.partial(kernels.sparse_dot, pattern=pattern, dense_gradient=dense_gradient)
    _compare(product, x, w, dy, (x @ w, dy @ w.T, x.T @ dy), mask, dense_gradient)


def check_conv(x_shape, w_shape, *, density: float, strides, padding, dilation, dense_gradient: bool) -> None:
    """sparse_conv and both its gradients against XLA's in float64; where XLA refuses a geometry, so must it."""
    random = np.random.default_rng(sum(x_shape) + 7 * sum(w_shape))
    mask = random.random(w_shape) < density
    x, w = random.normal(size=x_shape), np.where(mask, random.normal(size=w_shape), 0)
    pattern = kernels.make_pattern(mask, implementation='cpu')
    geometry: dict[str, Any] = dict(strides=strides, padding=padding, dilation=dilation)
    product = functools.partial(kernels.sparse_conv, pattern=pattern, dense_gradient=dense_gradient, **geometry)
    numbers = ('NHWC', 'HWIO', 'NHWC')
    with jax.enable_x64(True):
        dense = functools.partial(
            jax.lax.conv_general_dilated, window_strides=strides, padding=padding, rhs_dilation=dilation, dimension_numbers=numbers
        )
        y, pull = jax.vjp(dense, jnp.asarray(x), jnp.asarray(w))
        dy = random.normal(size=y.shape)
        expected = [np.asarray(a) for a in (y, *pull(jnp.asarray(dy)))]
    _compare(product, x, w, dy, expected, mask, dense_gradient)


def _compare(product, x, w, dy, expected, mask, dense_gradient: bool) -> None:
    x, w, dy = (jnp.asarray(a, jnp.float32) for a in (x, w, dy))
    y, pull = jax.vjp(product, x, w)
    for got, right, where in zip((y, *pull(dy)), expected, (None, None, None if dense_gradient else mask), strict=True):
        right = right if where is None else np.where(where, right, 0)
        assert got.shape == right.shape, (got.shape, right.shape)
        error = np.abs(np.asarray(got, np.float64) - right).max(initial=0)
        assert error <= 1e-5 * max(1.0, np.abs(right).max(initial=0)), f'off by {error}'


def finished_config():
    """Of the run that is damaged."""
    config = mnist_lenet300.get_config('offline')
    config.train.steps, config.sparsity.update_every, config.log.every, config.data.batch_size = 6, 3, 2, 20
    config.checkpoint.every, config.checkpoint.keep, config.sparsity.kernels = 2, 5, 'dense'
    return config


_KEPT = pathlib.Path(tempfile.gettempdir()) / f'sparse_jax_fuzz_{os.getpid()}'


@functools.cache
def _finished() -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        return train.train(finished_config(), _KEPT)


def clean() -> None:
    """Removes what was kept for later programs."""
    shutil.rmtree(_KEPT, ignore_errors=True)


def copy_finished_run(folder: pathlib.Path) -> None:
    """A finished run, in this folder."""
    _finished()
    shutil.copytree(_KEPT, folder, ignore=shutil.ignore_patterns('.lock'))


def check_result(result: dict[str, Any]) -> None:
    """It is the undisturbed run's, but for its times."""
    without = lambda values: {name: value for name, value in values.items() if 'second' not in name}
    assert without(result) == without(_finished()), "another result than the undisturbed run's"


def check_evaluation(result: dict[str, Any]) -> None:
    """It is that of some step, and of the last one as in the result."""
    assert result['step'] in (2, 4, 6)
    assert result['step'] < 6 or result['test_loss'] == _finished()['test_loss']


def _file(folder: pathlib.Path, where: float) -> pathlib.Path:
    """The file at this place among all; a sixth of the places are those that orbax names by chance, of which there are more or less."""
    files = sorted(path for path in folder.rglob('*') if path.is_file() and not path.is_symlink())
    named = [path for path in files if path.parent.name != 'd']
    unnamed = sorted(set(files) - set(named), key=lambda path: (path.stat().st_size, path))
    return named[int(where * 1.2 * len(named))] if where * 1.2 < 1 or not unnamed else unnamed[int((where * 6 - 5) * len(unnamed))]


def _remove(folder, where):
    _file(folder, where).unlink()


def _empty(folder, where):
    _file(folder, where).write_bytes(b'')


def _cut(folder, where, share):
    path = _file(folder, where)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def _flip(folder, where, share):
    path = _file(folder, where)
    content = bytearray(path.read_bytes())
    if content:
        content[int(share * len(content))] ^= 1 << int(8 * where)
        path.write_bytes(content)


def _folder(folder, where):
    path = _file(folder, where)
    path.unlink()
    path.mkdir()


def _rename(folder, where):
    path = _file(folder, where)
    path.rename(path.with_name(f'{path.name}.old'))


def _write(folder, where, content):
    """Over a record, or a checkpoint's."""
    path = _file(folder, where)
    path.write_bytes(content.encode('latin-1'))


def _remove_step(folder, where):
    steps = sorted((folder / 'checkpoints').glob('[0-9]*'))
    if steps:
        shutil.rmtree(steps[int(where * len(steps))])


def _unfinish(folder):
    (folder / 'result.json').unlink(missing_ok=True) if not (folder / 'result.json').is_dir() else None


damage = types.SimpleNamespace(
    remove=_remove, empty=_empty, cut=_cut, flip=_flip, folder=_folder, rename=_rename, write=_write, remove_step=_remove_step, unfinish=_unfinish,
)  # fmt: skip


def namespace(folder: pathlib.Path) -> dict[str, Any]:
    """What a program sees."""
    return dict(
        jax=jax, jnp=jnp, np=np, optax=optax, sj=sj, k=kernels, train=train, train_run=train_run, write_report=write_report,
        configs=types.SimpleNamespace(
            mnist_lenet300=mnist_lenet300, mnist_lenet5=mnist_lenet5, cifar10_vgg_like=cifar10_vgg_like, lm_tiny=lm_tiny
        ),
        random=np.random.default_rng(0), folder=folder, damage=damage, copy_finished_run=copy_finished_run, check_result=check_result,
        check_evaluation=check_evaluation, finished_config=finished_config, check_dot=check_dot, check_conv=check_conv,
    )  # fmt: skip
