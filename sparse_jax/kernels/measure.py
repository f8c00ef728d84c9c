"""Which implementation is fastest for a layer: found out by running it, and kept on disk by what decides it."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core import target
from sparse_jax.core.granularity import Granularity
from sparse_jax.kernels import api, backend, store
from sparse_jax.kernels.builder import make_pattern
from sparse_jax.kernels.cpu import compiler, lanes
from sparse_jax.kernels.gpu import clock, shipped
from sparse_jax.kernels.pattern import Pattern, is_pattern, with_dense_gradients
from sparse_jax.kernels.reference import Geometry

_FILE = 'measured.json'


class Call(NamedTuple):
    """What decides a product's time, but for its density. A matrix product is a convolution of images of one pixel."""

    name: str  # of the layer
    x: tuple[int, ...]  # [batch, height, width, in], or by lanes [batch / 16, height, width, in, 16]
    w: tuple[int, ...]  # [height, width, in, out]
    geometry: Geometry
    granularity: Granularity
    dtype: str
    input_gradient: bool = True  # whether the gradient with respect to x is wanted: not of the network's own input


def products_of(function: Callable[..., Any], *args: Any) -> list[Call]:
    """The sparse products that a function makes, in the order in which they are traced; on a mesh those of one device.

    Args:
      function: is traced, and not run.
      *args: its arguments, arrays or their shapes; the products with the patterns among them are found.

    Returns:
      A call for each product. Of a function that is traced once and called often (``lax.scan``) it is one.

    Example:
      >>> import numpy as np
      >>> pattern = make_pattern(np.eye(4, dtype=bool), name='fc')
      >>> calls = products_of(lambda x, pattern: api.sparse_dot(x, x, pattern), jnp.ones((4, 4)), pattern)
      >>> calls[0].name, calls[0].x
      ('fc', (4, 1, 1, 4))
    """
    calls: list[Call] = []

    def note(x, w, pattern: Pattern, geometry: Geometry) -> None:
        x_shape, w_shape = (x.shape, w.shape) if pattern.split is None else pattern.split.local(x.shape, w.shape)
        calls.append(Call(pattern.name, x_shape, w_shape, geometry, pattern.granularity, str(x.dtype)))

    jax.eval_shape(function, *observed(args, note))
    return calls


def observed(tree: Any, observer: Callable[..., None]) -> Any:
    """The same tree, its patterns with an observer that is called with (x, w, pattern, geometry) when a product of them is traced.

    It is a static part of them: no function that was traced without it, or with another, is taken from a cache.
    """
    mark = lambda leaf: dataclasses.replace(leaf, observer=observer) if is_pattern(leaf) else leaf
    return jax.tree.map(mark, tree, is_leaf=is_pattern)


def candidates(call: Call) -> tuple[str, ...]:
    """What can run a call here: always 'dense', the product with the masked weight: by lanes on the C++ kernels, else XLA's."""
    return tuple(dict.fromkeys(('dense', backend.of_platform(call.dtype, call.granularity).implementation)))


@functools.cache
def _step(name: str, geometry: Geometry, linear: bool, input_gradient: bool, dense_gradient: bool) -> Callable:
    """The compiled forward product and both gradients; kept, so that another density of the same shapes compiles nothing."""
    options: dict[str, Any] = dict(strides=geometry.strides, padding=geometry.padding, dilation=geometry.dilation)

    def product(x, w, pattern):
        if x.ndim == 5:
            pattern = with_dense_gradients(pattern) if dense_gradient else pattern
            pattern = None if name == 'dense' else pattern
            return lanes.convolve_by_lanes(x, None, w, None, pattern, strides=geometry.strides, padding=geometry.padding)[0]
        if name == 'dense':
            return x @ w if linear else api.convolve(x, w, **options)
        how: dict[str, Any] = dict(dense_gradient=dense_gradient, implementation=name)
        return api.sparse_dot(x, w, pattern, **how) if linear else api.sparse_conv(x, w, pattern, **options, **how)

    @jax.jit
    def step(x, w, pattern, dy):
        y, pull = jax.vjp(lambda x, w: product(x, w, pattern), x, w)
        dx, dw = pull(dy)
        return (y, dx, dw) if input_gradient else (y, dw)

    return step


def measure(
    call: Call, density: float, *, dense_gradient: bool = False, at_least: float = 0.2, rounds: int = 7
) -> dict[str, float]:
    """Seconds of a call's forward product and both gradients, by each implementation that can run it.

    The candidates take turns, so that whatever else the machine does meets all of them; the median counts. A GPU's times are its own.

    Args:
      call: its shapes.
      density: of the weight, in (0, 1]; the mask is random.
      dense_gradient: whether the weight gradient is wanted at all positions.
      at_least: seconds after which no more than three rounds are run.
      rounds: of calls at most, after a first that compiles.

    Returns:
      Seconds by name: 'dense', and the platform's kernels where they run.
    """
    random = np.random.default_rng(0)
    linear = call.x[1:3] == call.w[:2] == (1, 1)  # the rival of a matrix product is one
    x = jnp.asarray(random.standard_normal(call.x, np.float32), call.dtype)
    rows, columns = call.granularity.sides
    units = granularity_lib.tap_units(call.granularity, call.w)
    mask = np.repeat(np.repeat(random.random(units) < density, rows, axis=-2), columns, axis=-1)[..., : call.w[-2], : call.w[-1]]
    w = jnp.asarray(np.where(mask, random.standard_normal(call.w, np.float32), 0), call.dtype)
    dy_shape = *call.geometry.output_shape(call.x[:4], call.w), *call.x[4:]
    dy = jnp.asarray(random.standard_normal(dy_shape, np.float32), call.dtype)
    if linear:
        x, w, dy, mask = x.reshape(-1, call.x[-1]), w[0, 0], dy.reshape(-1, call.w[-1]), mask[0, 0]
    pattern = make_pattern(mask, granularity=call.granularity, implementation='reference')  # each step names its own
    pattern = jax.device_put(pattern)

    def run(name: str) -> float:
        step = _step(name, call.geometry, linear, call.input_gradient, dense_gradient and name != 'dense')
        arguments = x, w, None if name == 'dense' else pattern, dy
        if name in warm and target.platform() == 'gpu' and (device_seconds := clock.device_seconds(step, *arguments)):
            return device_seconds
        warm.add(name)
        begin = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        return time.perf_counter() - begin

    names, warm = candidates(call), set()
    for name in names:
        run(name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(rounds):
        for name in names:
            seconds[name].append(run(name))
        if number >= 2 and time.perf_counter() - begin > at_least:
            break
    return {name: float(np.median(values)) for name, values in seconds.items()}


def measured(call: Call, density: float, *, dense_share: float = 0.0) -> dict[str, float]:
    """Seconds of an average step, measured now or before on this machine for these shapes and this density (to two digits).

    Args:
      call: its shapes.
      density: of the weight, in (0, 1].
      dense_share: share of the steps whose weight gradient is wanted at all positions, in [0, 1].

    Returns:
      Seconds by name, as :func:`measure`.
    """
    kinds = [(share, dense) for share, dense in ((1 - dense_share, False), (dense_share, True)) if share > 0]
    rows = [(share, _measured_once(call, density, dense)) for share, dense in kinds]
    return {name: sum(share * row[name] for share, row in rows) for name in rows[0][1]}


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _measured_once(call: Call, density: float, dense_gradient: bool) -> dict[str, float]:
    density, names = store.rounded(density), candidates(call)
    kernels = compiler.key() if 'cpu' in names else ''
    device = f'{compiler.processor()} {_threads()}' if target.platform() == 'cpu' else jax.devices()[0].device_kind
    machine = hashlib.sha256(f'{device} {jax.__version__} {kernels}'.encode()).hexdigest()[:12]
    what = [
        list(call.x),
        list(call.w),
        [list(map(_plain, part)) for part in call.geometry],
        list(call.granularity.sides),
        call.dtype,
        call.input_gradient,
    ]
    key = json.dumps([machine, *what, density, dense_gradient, list(names)])
    if (seconds := _read().get(key)) and seconds.keys() == set(names):
        return seconds
    if 'gpu' in names and (seconds := shipped_seconds(jax.devices()[0].device_kind, call, density, dense_gradient)):
        return seconds
    seconds = measure(call, density, dense_gradient=dense_gradient)
    store.write(_FILE, _read() | {key: seconds})
    return seconds


def shipped_seconds(device: str, call: Call, density: float, dense_gradient: bool) -> dict[str, float]:
    """Seconds as of :func:`measure` where the package knows this kind of GPU and such a call; else nothing."""
    weights = math.prod(call.w)
    operations = 2.0 * math.prod(call.geometry.output_shape(call.x, call.w)[:3]) * weights
    shape: dict[str, Any] = dict(weights=weights, is_matrix=call.w[:2] == (1, 1))
    seconds = {'dense': 0.0, 'gpu': 0.0}
    for kernel in ('forward', 'input_gradient', 'weight_gradient'):
        if kernel == 'input_gradient' and not call.input_gradient:
            continue
        dense = shipped.dense_seconds(device, kernel, operations, **shape)
        sparse = shipped.seconds(device, kernel, operations, **shape, block=min(call.granularity.sides), density=density)
        if dense is None or sparse is None:
            return {}
        seconds['dense'] += dense
        seconds['gpu'] += dense if kernel == 'weight_gradient' and dense_gradient else sparse
    return seconds


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _read() -> dict[str, dict[str, float]]:
    numbers = lambda row: isinstance(row, dict) and row and all(isinstance(s, float) and 0 < s < math.inf for s in row.values())
    return {key: row for key, row in store.read(_FILE).items() if numbers(row)}
