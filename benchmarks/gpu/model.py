"""What the block-sparse kernels cost on a Hopper GPU, by a model: bytes and operations counted, rates assumed.

Counted: each step of a kernel's loop, from the copies and tensor-core instructions that its traced program has, times the steps that a
pattern takes. Assumed, in tera per second:

- the dense product runs at 700 TFLOP/s (cuBLAS in bfloat16; 798 were measured on an H100 at 8192x8192x8192), or at the memory's rate;
- low: tiles come from the second-level cache at 5.5 TB/s, of which 85% are reached;
- high: at 10.9 TB/s, which is what tokamax's grouped matrix product reaches on an H100 (467 TFLOP/s with tiles of 128x64), whose
  neighbouring programs share tiles, as random blocks do less;
- tensor cores do no more than 600 TFLOP/s in such a loop; memory gives 3.35 TB/s (H100) or 4.8 TB/s (H200).

The longest of the three is a kernel's time. A multiprocessor reaches a 132th of the rates of the cache and the tensor cores: a kernel of
few programs leaves some without work, and of 133 equal ones the last runs alone. What is not in it: starting a kernel (microseconds),
and programs of unequal length. Where the weight gradient is split (``config.num_splits``) its parts are written and added up by XLA, at the
memory's rate, after the kernel.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import kernels
from sparse_jax.kernels.gpu import config as config_lib
from sparse_jax.kernels.gpu import operations
from sparse_jax.kernels.layout import Layout
from sparse_jax.kernels.reference import Geometry

DENSE, MOST = 700e12, 600e12  # operations a second
FEED = {'low': 0.85 * 5.5e12, 'high': 10.9e12}  # bytes a second from the second-level cache
MULTIPROCESSORS = 132  # of both
MEMORY = {'H100': 3.35e12, 'H200': 4.8e12}  # bytes a second
_ITEMSIZE = 2  # bytes, of bfloat16
KERNELS = ('forward', 'input_gradient', 'weight_gradient', 'scores')


class Shape(NamedTuple):
    """A product to be made."""

    x: tuple[int, ...]  # [batch, height, width, in]; a matrix product has one pixel
    w: tuple[int, ...]  # [height, width, in, out]
    geometry: Geometry = Geometry()

    @property
    def y(self) -> tuple[int, ...]:
        return self.geometry.output_shape(self.x, self.w)

    @property
    def name(self) -> str:
        if self.x[1:3] == (1, 1):
            return f'{self.x[0]} tokens, {self.w[2]} to {self.w[3]}'
        taps, stride = f'{self.w[0]}x{self.w[1]}', self.geometry.strides[0]
        images = f'{self.x[0]}x{self.x[1]}x{self.x[2]}'
        return f'{taps} {self.w[2]} to {self.w[3]}, {images}' + (f', stride {stride}' if stride > 1 else '')

    @property
    def dense_operations(self) -> int:
        """Multiplications and additions of one of the three products."""
        return 2 * math.prod(self.y[:3]) * math.prod(self.w)


_SAME = Geometry(padding=((1, 1), (1, 1)))
SHAPES = (
    Shape((8192, 1, 1, 4096), (1, 1, 4096, 4096)),
    Shape((8192, 1, 1, 1024), (1, 1, 1024, 4096)),
    Shape((128, 32, 32, 256), (3, 3, 256, 256), _SAME),
    Shape((128, 16, 16, 512), (3, 3, 512, 512), _SAME),
)
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)


class Step(NamedTuple):
    """One step of a kernel's loop."""

    operations: int  # of the tensor cores
    bytes: int  # copied into shared memory
    copies: int
    multiplications: int  # calls of the tensor cores' instruction in the program


class Cost(NamedTuple):
    """A kernel, or several one after the other, for one pattern."""

    operations: float  # of the tensor cores, those for tiles' empty parts too
    cache_bytes: float  # from the second-level cache into shared memory, and results
    memory_bytes: float  # each operand that is needed and each result once; copies in which zeros are added
    programs: int  # of equal work
    sum_bytes: float = 0  # of a gradient's parts, read and added up after the kernel, and the result

    def seconds(self, rate: str, gpu: str) -> float:
        return max(self.seconds_by_resource(rate, gpu).values()) + self.sum_bytes / MEMORY[gpu]

    def seconds_by_resource(self, rate: str, gpu: str) -> dict[str, float]:
        """Seconds of the kernel by resource."""
        turns = -(-self.programs // MULTIPROCESSORS)
        idle = turns * MULTIPROCESSORS / max(1, self.programs)
        return {
            'tensor cores': self.operations / MOST * idle,
            'cache': self.cache_bytes / FEED[rate] * idle,
            'memory': self.memory_bytes / MEMORY[gpu],
        }


def random_mask(shape: Shape, block: tuple[int, int], density: float) -> np.ndarray:
    """A mask of whole blocks, drawn at random, with exactly that part of them (rounded)."""
    units = *shape.w[:2], -(-shape.w[2] // block[0]), -(-shape.w[3] // block[1])
    flat = np.zeros(math.prod(units), bool)
    flat[np.random.default_rng(0).permutation(flat.size)[: max(1, round(density * flat.size))]] = True
    whole = np.repeat(np.repeat(flat.reshape(units), block[0], axis=2), block[1], axis=3)
    return whole[:, :, : shape.w[2], : shape.w[3]]


def function(kernel: str, shape: Shape, block: tuple[int, int], config: config_lib.Config | None = None):
    """A kernel as a function of its arrays and a pattern, and the shapes of the arrays."""
    x, w, y = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (shape.x, shape.w, shape.y))
    geometry = shape.geometry
    if kernel == 'forward':
        return lambda x, w, p: operations.forward(x, w, p, geometry, config), (x, w)
    if kernel == 'input_gradient':
        return lambda dy, w, p: operations.input_gradient(dy, w, p, geometry, shape.x, config), (y, w)
    if kernel == 'weight_gradient':
        return lambda x, dy, p: operations.weight_gradient(x, dy, p, geometry, shape.w, config), (x, y)
    return lambda x, dy, p: operations.block_scores(x, dy, shape.w, geometry, block, config), (x, y)


def compact_function(kernel: str, shape: Shape, layout: Layout, config: config_lib.Config | None = None):
    """Likewise with compact values, of their layout's arrays."""
    x, values, y = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (shape.x, layout.values_shape, shape.y))
    geometry = shape.geometry
    if kernel == 'forward':
        return lambda x, v, p: operations.compact_forward(x, v, p, geometry, config), (x, values)
    if kernel == 'input_gradient':
        return lambda dy, v, p: operations.compact_input_gradient(dy, v, p, geometry, shape.x, config), (y, values)
    return lambda x, dy, p: operations.compact_weight_gradient(x, dy, p, geometry, config), (x, y)


def chosen(kernel: str, shape: Shape, block: tuple[int, int]) -> config_lib.Config:
    """The config that a kernel takes."""
    return config_lib.choose(kernel, shape.x, shape.w, block, jnp.bfloat16)


@functools.cache
def step(kernel: str, shape: Shape, block: tuple[int, int], config: config_lib.Config) -> Step:
    """What one step of a kernel's loop copies and multiplies, counted in its traced program."""
    pattern = kernels.make_pattern(random_mask(shape, block, 0.1), block=block, implementation='gpu')
    run, arrays = function(kernel, shape, block, config)
    with kernels.lowering_for('gpu'):
        jaxpr = jax.make_jaxpr(run)(*arrays, pattern).jaxpr
    loops = [body for body in _bodies(jaxpr) if any(_is_product(equation) for equation in _equations(body))]
    inside = list(_equations(min(loops, key=lambda body: len(list(_equations(body))))))
    operations = bytes_copied = copies = products = 0
    for equation in inside:
        avals: Any = [variable.aval for variable in equation.invars]
        if _is_product(equation):
            m, n = avals[0].shape
            k = math.prod(avals[1].shape[1:]) // m
            operations, products = operations + 2 * m * n * k, products + 1
        if equation.primitive.name == 'copy_gmem_to_smem':
            tile_bytes = math.prod(avals[1].shape[1:]) * avals[1].dtype.itemsize
            bytes_copied, copies = bytes_copied + tile_bytes, copies + 1
    return Step(operations=operations, bytes=bytes_copied, copies=copies, multiplications=products)


def _is_product(equation) -> bool:
    return equation.primitive.name.startswith('wgmma') and len(equation.invars) >= 3


def _subjaxprs(equation):
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            inner = getattr(part, 'jaxpr', part)
            if hasattr(inner, 'eqns'):
                yield inner


def _equations(jaxpr):
    """All equations, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _subjaxprs(equation):
            yield from _equations(inner)


def _bodies(jaxpr):
    """The bodies of all loops."""
    for equation in _equations(jaxpr):
        if equation.primitive.name in ('while', 'scan'):
            yield from _subjaxprs(equation)


def cost(kernel: str, shape: Shape, block: tuple[int, int], sparsity: float, config: config_lib.Config | None = None) -> Cost:
    """What a kernel takes for a random pattern of this sparsity."""
    config = config or chosen(kernel, shape, block)
    mask = random_mask(shape, block, 1 - sparsity)
    pattern = kernels.make_pattern(mask, block=block, implementation='gpu')
    one_step = step(kernel, shape, block, config)
    if kernel in ('forward', 'input_gradient'):
        return _product_cost(kernel, shape, block, mask, pattern, one_step, config)
    return _gradient_cost(kernel, shape, block, mask, pattern, one_step, config)


def _has_padding(shape: Shape) -> bool:
    """Whether a copy of an operand is made in which zeros are added."""
    return shape.geometry.padding != ((0, 0), (0, 0)) or shape.geometry.strides != (1, 1)


def _product_cost(
    kernel: str, shape: Shape, block: tuple[int, int], mask, pattern, one_step: Step, config: config_lib.Config
) -> Cost:
    """Of forward or input gradient."""
    if kernel == 'forward':
        lhs_shape, result_shape, unit_k, num_phases, pointers = shape.x, shape.y, block[0], 1, pattern.pointers
    else:
        lhs_shape, result_shape, unit_k = shape.y, shape.x, block[1]
        num_phases, pointers = math.prod(shape.geometry.strides), pattern.transposed_pointers
    units, m_tiles = np.diff(pointers), -(-shape.x[0] // config.block_m)
    num_pixels = math.prod(result_shape[1:3])
    steps = int(units.sum()) * (unit_k // min(unit_k, config.block_k)) * m_tiles * num_pixels / num_phases
    result_bytes = _ITEMSIZE * math.prod(result_shape)
    padded_weight = 2 * mask.size if _has_padding(shape) else 0
    return Cost(
        operations=steps * one_step.operations,
        cache_bytes=steps * one_step.bytes + result_bytes,
        memory_bytes=_ITEMSIZE * (math.prod(lhs_shape) + int(mask.sum()) + padded_weight) + result_bytes,
        programs=m_tiles * num_pixels * len(units),
    )


def _gradient_cost(
    kernel: str, shape: Shape, block: tuple[int, int], mask, pattern, one_step: Step, config: config_lib.Config
) -> Cost:
    """Of weight gradient or scores."""
    units, x, y = np.diff(pattern.pointers), math.prod(shape.x), math.prod(shape.y)
    num_taps, num_pixels = math.prod(shape.w[:2]), math.prod(shape.y[1:3])
    steps, num_splits, sum_bytes = -(-shape.x[0] // config.block_m) * num_pixels, 1, 0
    if kernel == 'weight_gradient':
        programs, result_bytes = int((-(-units // config.units_per_program)).sum()), _ITEMSIZE * mask.size
        possible_units = num_taps * math.prod(-(-n // side) for n, side in zip(shape.w[2:], block, strict=True))
        num_splits = config_lib.num_splits(shape.x[0], num_pixels, possible_units, block)
        if num_splits > 1:
            # XLA reads the parts of all units that there is room for, writes their sums, and reads these into the result
            capacity, dense_bytes = pattern.capacity * math.prod(block), result_bytes
            result_bytes = 4 * num_splits * int(units.sum()) * math.prod(block)
            sum_bytes = (4 * num_splits + 2 * _ITEMSIZE) * capacity + dense_bytes
    else:
        window_k = config_lib.window_rows(kernel, block[0])
        windows = -(-shape.w[2] // window_k) * num_taps
        programs = -(-windows // config.units_per_program) * len(units)
        result_bytes = 4 * windows * window_k * len(units)
    return Cost(
        operations=programs * steps * one_step.operations,
        cache_bytes=programs * steps * one_step.bytes + result_bytes,
        memory_bytes=_ITEMSIZE * (x + y + (2 * x if _has_padding(shape) else 0)) + result_bytes,
        programs=programs * num_splits,
        sum_bytes=sum_bytes,
    )


def dense_seconds(shape: Shape, gpu: str) -> float:
    """One of the three dense products."""
    memory_bytes = _ITEMSIZE * (math.prod(shape.x) + math.prod(shape.w) + math.prod(shape.y))
    return max(shape.dense_operations / DENSE, memory_bytes / MEMORY[gpu])
