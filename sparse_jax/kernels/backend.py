"""The backends, and the one place that decides which of them multiplies a layer.

A decision is made while tracing, from what is known then: a name that the caller gives, the pattern's, or a rule: on a GPU the densities
up to which blocks were measured to win there, on a CPU the density and the number of rows. A run measures its own layers (see measure.py), and takes what
:func:`fastest` says of the times.
"""

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sparse_jax.core import errors, target
from sparse_jax.core import granularity as granularity_lib
from sparse_jax.core.granularity import Granularity, Unstructured
from sparse_jax.kernels import device, gpu, reference, sharded, store, tpu
from sparse_jax.kernels.cpu import operations as cpu
from sparse_jax.kernels.layout import CompactWeight, Layout
from sparse_jax.kernels.pattern import Pattern
from sparse_jax.kernels.reference import Geometry

_LOG = logging.getLogger('sparse_jax')

# Up to this density the C++ kernel was faster than XLA's dense product in every shape of benchmarks/layers/compare.py, and with fewer rows
# (of images: pixels) than _FEW up to the lower one (--few_rows): then nothing of the lists' cost is shared. A factor of 2 apart, so that
# a density that comes and goes compiles at most one step anew: see density_bound.
_ON_CPU, _ON_CPU_FEW, _FEW = 0.2, 0.1, 16
# The densities at which benchmarks.gpu compares blocks with the dense product, one of which is the largest that wins.
_MEASURED_ON_GPU = (0.01, 0.05, 0.1, 0.2, 0.5)


class Backend(Protocol):
    """What multiplies layers; reference.py defines each function. A module or an object."""

    def unsupported(self, dtype, granularity: Granularity) -> str:
        """Why it does not run a layer where programs are traced for, and what would work; empty where it does."""
        ...

    def forward(self, x: jax.Array, w: jax.Array, pattern: Pattern, geometry: Geometry) -> jax.Array: ...

    def input_gradient(
        self, dy: jax.Array, w: jax.Array, pattern: Pattern, geometry: Geometry, x_shape: tuple[int, ...]
    ) -> jax.Array: ...

    def weight_gradient(
        self, x: jax.Array, dy: jax.Array, pattern: Pattern, geometry: Geometry, w_shape: tuple[int, ...]
    ) -> jax.Array: ...


class ScoringBackend(Backend, Protocol):
    """A backend that also adds up dense weight gradients by blocks."""

    def block_scores(
        self, x: jax.Array, dy: jax.Array, w_shape: tuple[int, ...], geometry: Geometry, block: tuple[int, int]
    ) -> jax.Array: ...


class FrozenBackend(Backend, Protocol):
    """A backend that also multiplies with compact weights, for inference."""

    def frozen(self, x: jax.Array, weight: CompactWeight, geometry: Geometry) -> jax.Array: ...


class CompactBackend(FrozenBackend, Protocol):
    """A backend that also trains compact weights."""

    def compact_forward(self, x: jax.Array, values: jax.Array, layout: Layout, geometry: Geometry) -> jax.Array: ...

    def compact_input_gradient(
        self, dy: jax.Array, values: jax.Array, layout: Layout, geometry: Geometry, x_shape: tuple[int, ...]
    ) -> jax.Array: ...

    def compact_weight_gradient(self, x: jax.Array, dy: jax.Array, layout: Layout, geometry: Geometry) -> jax.Array: ...


class _Pallas:
    """A package of Pallas kernels, whose operations.py, and with it Pallas, is imported when one runs."""

    def __init__(self, package: ModuleType):
        self._package = package

    def unsupported(self, dtype, granularity: Granularity) -> str:
        return self._package.unsupported(dtype, granularity)

    @contextlib.contextmanager
    def _operations(self) -> Iterator[ModuleType]:
        operations = importlib.import_module(f'{self._package.__name__}.operations')
        with jax.enable_x64(False):  # the kernels count in int32, whatever integers jax has by default
            yield operations

    def forward(self, x, w, pattern, geometry):
        with self._operations() as operations:
            return operations.forward(x, w, pattern, geometry)

    def input_gradient(self, dy, w, pattern, geometry, x_shape):
        with self._operations() as operations:
            return operations.input_gradient(dy, w, pattern, geometry, x_shape)

    def weight_gradient(self, x, dy, pattern, geometry, w_shape):
        with self._operations() as operations:
            return operations.weight_gradient(x, dy, pattern, geometry, w_shape)

    def frozen(self, x, weight, geometry):
        with self._operations() as operations:
            return operations.frozen(x, weight, geometry)

    def compact_forward(self, x, values, layout, geometry):
        with self._operations() as operations:
            return operations.compact_forward(x, values, layout, geometry)

    def compact_input_gradient(self, dy, values, layout, geometry, x_shape):
        with self._operations() as operations:
            return operations.compact_input_gradient(dy, values, layout, geometry, x_shape)

    def compact_weight_gradient(self, x, dy, layout, geometry):
        with self._operations() as operations:
            return operations.compact_weight_gradient(x, dy, layout, geometry)

    def block_scores(self, x, dy, w_shape, geometry, block):
        with self._operations() as operations:
            return operations.block_scores(x, dy, w_shape, geometry, block)


_GPU, _TPU = _Pallas(gpu), _Pallas(tpu)
SCORING: dict[str, ScoringBackend] = {'reference': reference, 'gpu': _GPU, 'tpu': _TPU}
BACKENDS: dict[str, Backend] = {'reference': reference, 'cpu': cpu, 'gpu': _GPU, 'tpu': _TPU}
COMPACT: dict[str, CompactBackend] = {'reference': reference, 'cpu': cpu, 'gpu': _GPU}  # of frozen weights, and in training
IMPLEMENTATIONS = tuple(BACKENDS)


def of_pattern(implementation: str, pattern: Pattern) -> Backend:
    """The backend of this name, for a pattern that is divided over a mesh by its parts."""
    backend = BACKENDS[implementation]
    return backend if pattern.split is None else sharded.ByParts(backend)


def of_compact(implementation: str, rows: int) -> CompactBackend:
    """The backend of this name for a product of so many rows with a compact weight: on each device its part of them, where a mesh is named.

    The compiler divides the reference's products itself.
    """
    backend, mesh = COMPACT[implementation], target.mesh()
    if implementation == 'reference' or mesh is None or rows % mesh.shape['data']:
        return backend
    return sharded.OverData(backend, mesh)  # pyright: ignore[reportReturnType]


def unsupported(implementation: str, dtype, granularity: str | Granularity) -> str:
    """Why an implementation cannot run a layer where programs are traced for, and what would work; empty where it can.

    Args:
      implementation: one of IMPLEMENTATIONS.
      dtype: type of x and w.
      granularity: that of the pattern, such as ``'block:64x64'``.

    Returns:
      The reason, or ''.

    Raises:
      ValueError: if there is no such implementation, or no such granularity.

    Example:
      >>> unsupported('gpu', 'bfloat16', 'block:64x64')
      'it runs on an NVIDIA GPU, not on cpu'
    """
    if implementation not in BACKENDS:
        raise errors.unknown('implementation', implementation, IMPLEMENTATIONS)
    return BACKENDS[implementation].unsupported(dtype, granularity_lib.of_products(granularity_lib.get(granularity)))


class Choice(NamedTuple):
    """What multiplies a layer."""

    implementation: str  # one of IMPLEMENTATIONS, or 'dense': the product with the masked weight, without a pattern
    reason: str  # '' where it is the platform's own kernels


def choose(implementation: str | None, dtype, pattern: Pattern, *, rows: int, empty: bool) -> Choice:
    """What multiplies a product that is being traced.

    A pattern may name a backend too; where that cannot run, the reference does, and one log line says so. Where nobody names one the rule
    decides. Of empty operands and results the reference makes zeros, whoever is named.

    Args:
      implementation: the name given with the product; None: none.
      dtype: type of x and w.
      pattern: of w.
      rows: that are multiplied, of images the pixels of the result.
      empty: whether an operand or the result has no elements.

    Raises:
      NotImplementedError: if the implementation that is named with the product cannot run.
      ValueError: if there is no implementation of that name.
    """
    named = implementation or pattern.implementation
    choice = Choice(named, 'it is named') if named else _by_rule(pattern, rows)
    if empty and choice.implementation in BACKENDS:
        return Choice('reference', 'there is nothing to multiply')
    reason = unsupported(choice.implementation, dtype, pattern.granularity)
    if not reason:
        return choice
    if implementation:
        raise NotImplementedError(
            f"implementation={implementation!r} does not run here: {reason}. Take implementation=None or 'reference'."
        )
    if named or target.platform() != 'cpu':
        layer = f' {pattern.name}' if pattern.name else ''
        errors.say_once(f"sparse_jax: the reference multiplies{layer} instead of '{choice.implementation}': {reason}.")
    return Choice('reference', reason)


def choose_compact(implementation: str | None, dtype, layout: Layout) -> Choice:
    """What multiplies with a compact weight in a product that is being traced: a name that is given, or the platform's kernels where it has
    such ones, else the reference, which makes the whole weight at each call.

    Args:
      implementation: the name given with the product; None: none.
      dtype: type of x and of the values.
      layout: of the weight.

    Raises:
      NotImplementedError: if the implementation that is named with the product cannot run.
      ValueError: if there is no implementation of that name.
    """
    named = implementation or layout.implementation
    name = named or (target.platform() if target.platform() in BACKENDS else 'reference')
    reason = unsupported(name, dtype, layout.granularity)
    if not reason and name not in COMPACT:
        reason = 'it has no kernel for compact weights'
    if not reason:
        return Choice(name, 'it is named' if named else '')
    if implementation:
        raise NotImplementedError(
            f"implementation={implementation!r} does not run here: {reason}. Take implementation=None or 'reference'."
        )
    layer = f' {layout.name}' if layout.name else ''
    errors.say_once(f"sparse_jax: the reference multiplies{layer} instead of '{name}': {reason}.")
    return Choice('reference', reason)


def _by_rule(pattern: Pattern, rows: int) -> Choice:
    """What the density, and on a CPU the number of rows, suggest where programs are traced for.

    On a GPU its kernels up to the density, to two digits, at which ``benchmarks.gpu`` measured them to be as fast as the dense product, on
    this kind of device and for this granularity; the reference where that was not measured, which is said once. So far nothing measures
    TPUs. Kernels that do not run there at all are chosen too: :func:`choose` then finds out why, and says so.
    """
    platform, bound = target.platform(), pattern.density_bound
    if platform == 'cpu':
        most, which = (_ON_CPU_FEW, f' and there are fewer than {_FEW} rows') if rows < _FEW else (_ON_CPU, '')
        if bound <= most:
            return Choice('cpu', f'at most {most:.0%} of the weights exist')
        return Choice('reference', f'more than {most:.0%} of the weights exist{which}')
    if device.is_absent():
        return Choice('reference', 'nothing can be measured on a device that is not here')
    if isinstance(pattern.granularity, Unstructured) or platform not in BACKENDS:
        return Choice('reference', f'{platform} has no kernels for {pattern.granularity}')
    if BACKENDS[platform].unsupported(jnp.bfloat16, pattern.granularity):
        return Choice(platform, '')
    kind = jax.devices()[0].device_kind
    crossover = store.crossover(kind, pattern.granularity)
    if crossover is None:
        how = ' measure them with python -m benchmarks.gpu,' if platform == 'gpu' else ''
        errors.say_once(
            f'sparse_jax: {pattern.granularity} were not measured on {kind}, so that sparse products are masked dense ones:{how} name the '
            'implementation, or train with sparsity.kernels=auto, which measures the layers of a run.'
        )
        return Choice('reference', f'{pattern.granularity} were not measured on {kind}')
    won = f'on {kind} {pattern.granularity} were measured to win up to {crossover:.0%} of the weights'
    return Choice(platform if bound <= crossover else 'reference', won)


def density_bound(density: float, granularity: Granularity, *, before: float = 0.0) -> float:
    """A density as the rule needs it: the least of those where its answer may change that is not below, or 1.

    It is static in a pattern, and another one compiles the step anew. So there are few, and one that is above the density stays until
    another is less than half of it.

    Args:
      density: of the mask.
      granularity: that of the pattern.
      before: the bound of the pattern before; 0: there is none.

    >>> density_bound(0.05, Unstructured()), density_bound(0.21, Unstructured()), density_bound(0.05, Unstructured(), before=0.2)
    (0.1, 1.0, 0.2)
    """
    if target.platform() == 'cpu':
        bounds = (_ON_CPU_FEW, _ON_CPU)
    elif isinstance(granularity, Unstructured):
        bounds = ()
    else:
        density, bounds = store.rounded(density), _MEASURED_ON_GPU
    bound = next((bound for bound in bounds if density <= bound), 1.0)
    return before if bound <= before <= 2 * bound else bound


def of_platform(dtype, granularity: Granularity) -> Choice:
    """The kernels of the platform that programs are traced for where they run such layers, else the dense product and the reason."""
    platform = target.platform()
    reason = unsupported(platform, dtype, granularity) if platform in BACKENDS else f'there are none for {platform}'
    return Choice('dense', reason) if reason else Choice(platform, '')


def fastest(seconds: Mapping[str, float]) -> Choice:
    """The implementation with the least measured time; the dense one unless another is faster by a twentieth.

    >>> fastest({'dense': 1.0, 'cpu': 0.99}).implementation, fastest({'dense': 1.0, 'cpu': 0.5})
    ('dense', Choice(implementation='cpu', reason='dense 1000.00 ms, cpu 500.00 ms'))
    """
    name = min(seconds, key=lambda name: seconds[name] * (0.95 if name == 'dense' else 1))
    return Choice(name, ', '.join(f'{name} {1e3 * value:.2f} ms' for name, value in seconds.items()))
